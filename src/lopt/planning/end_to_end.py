"""The same model end to end on as many devices, for comparison with a pipeline of blocks.

Predicted for other software, not measured: FSDP2 as `lopt.planning.sharded` has it, but with gradients
scattered in every micro-batch, and two pipelines with backward traffic, as `lopt.planning.schedules` lets
them run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lopt.planning.balance import balance
from lopt.planning.devices import Machine
from lopt.planning.measure import Parts
from lopt.planning.optimizer_step import parts_of, state_of, temporary_bytes, traffic_of
from lopt.planning.plan import Planner
from lopt.planning.run import Bytes, Run, Setting
from lopt.planning.schedules import (
    Link,
    StageTime,
    end_to_end,
    held,
    one_forward_one_backward,
    zero_bubble,
)
from lopt.planning.sizes import BlockSizes
from lopt.planning.trace import Trace, total

SCHEDULES: dict[str, Callable[[int, int, int], str]] = {
    "1F1B": one_forward_one_backward,
    "zero bubble": zero_bubble,
}


@dataclass(frozen=True)
class Rival:
    """One way to train the model end to end.

    Attributes:
        name: "FSDP2", "1F1B" or "zero bubble".
        peak: The device that needs most, at its peak.
        seconds: Of an optimizer step.
        tokens: Of an optimizer step, of all devices.
        sent: Bytes that a device sends in an optimizer step, at most.
        held: Micro-batches whose activations a device holds, at most.
    """

    name: str
    peak: Bytes
    seconds: float
    tokens: int
    sent: int
    held: int


def rivals(planner: Planner, size: int, replicas: int, machine: Machine, checkpointing: bool) -> list[Rival]:
    """Return FSDP2 (a step of about as many tokens), 1F1B and zero-bubble on `size` x `replicas` devices.

    Args:
        planner: Of the run.
        size: Stages of a pipeline; no more than layers.
        replicas: Pipelines that average their gradients.
        machine: What decides about time.
        checkpointing: Whether activations are recomputed.
    """
    found = [_fsdp2(planner, size * replicas, size, machine, checkpointing)]
    stages = _Stages(planner, size, replicas, machine, checkpointing)
    return found + [stages.rival(name) for name in SCHEDULES]


def _fsdp2(planner: Planner, devices: int, share: int, machine: Machine, checkpointing: bool) -> Rival:
    """Return FSDP2, which deals out the micro-batches of `share` devices in place of the layers."""
    run = planner.run
    one = replace(run, processes=devices, fsdp2=True, accumulation=1, reference=False)
    plan = Planner(one, planner).plan(Setting("e2e", 1, checkpointing=checkpointing))
    count = max(1, round(run.accumulation / share))
    # Each micro-batch is like a step of one, but for the optimizer's.
    step = sum(machine.seconds_of_update(u.traffic, u.rounded) for own in plan.work.updates for u in own)
    seconds = count * (plan.time(machine).seconds - step) + step
    return Rival("FSDP2", plan.peak, seconds, count * devices * one.step_tokens, count * plan.sent, 1)


class _Stages:
    """The model cut into stages by cost, with the gradient going back through all of them."""

    def __init__(
        self, planner: Planner, size: int, replicas: int, machine: Machine, checkpointing: bool
    ) -> None:
        self._run: Run = planner.run
        self._sizes, self._size, self._replicas, self._machine = planner.sizes, size, replicas, machine
        self._parts: Parts = planner.measured(Setting("e2e", 1, checkpointing=checkpointing))
        layers, count = planner.sizes.layers, self._run.accumulation

        def seconds(position: int, number: int) -> float:
            time = self._time(self._stage(position, layers[:number]))
            return count * (time.forward + time.backward + time.weights) + time.step

        self._counts = balance(len(layers), [1] * size, seconds)
        starts = [sum(self._counts[:n]) for n in range(size)]
        self._stages = [
            self._stage(n, layers[start : start + number])
            for n, (start, number) in enumerate(zip(starts, self._counts, strict=True))
        ]

    def rival(self, name: str) -> Rival:
        """Return what a schedule needs."""
        run, size = self._run, self._size
        orders = [SCHEDULES[name](n, size, run.accumulation) for n in range(size)]
        times = [self._time(stage) for stage in self._stages]
        if name == "1F1B":  # a backward is one piece, after which its gradient goes back
            times = [replace(t, backward=t.backward + t.weights, weights=0.0) for t in times]
        most = [held(order) for order in orders]
        peaks = [self._peak(stage, count) for stage, count in zip(self._stages, most, strict=True)]
        return Rival(
            name,
            max(peaks, key=total),
            end_to_end(times, orders, Link.of(self._machine, self._parts.boundary)),
            run.step_tokens * self._replicas,
            self._sent(),
            max(most),
        )

    def _sent(self) -> int:
        """Return what the stage with the most to send sends in a step: to its neighbours and to replicas."""
        passed, last = self._parts.boundary * self._run.accumulation, self._size - 1
        return max(
            passed * ((n > 0) + (n < last)) + round(self._averaged(stage))
            for n, stage in enumerate(self._stages)
        )

    def _averaged(self, stage: BlockSizes) -> float:
        return 2 * (self._replicas - 1) / self._replicas * stage.gradients  # a ring

    def _stage(self, position: int, layers: list) -> BlockSizes:
        sizes, last = self._sizes, position == self._size - 1
        before = sizes.embedding if position == 0 else []
        after = [*sizes.tail, *sizes.tied] if last else []  # a tied matrix is on both
        return BlockSizes("whole", True, before, layers, after, [])

    def _time(self, stage: BlockSizes) -> StageTime:
        """Return a stage's time; half of a backward, without what is recomputed, is that of weights."""
        run, machine, fresh = self._run, self._machine, self._parts.fresh
        forward = fresh["whole", "forward"].flops * len(stage.layers)
        back = fresh["whole", "backward"].flops * len(stage.layers)
        weights = min(forward, back / 2)
        top = sum(fresh["whole", what].flops for what in ("head", "loss")) if stage.after else 0.0
        step = sum(machine.seconds_of_update(*traffic_of(run, part)) for part in parts_of(stage))
        step += self._averaged(stage) / (machine.between_replicas * 1e9)
        return StageTime(
            machine.seconds_of(forward, 0.0, True),
            machine.seconds_of(back - weights, top * 2 / 3, True),
            machine.seconds_of(weights, top / 3, True),
            step,
        )

    def _peak(self, stage: BlockSizes, count: int) -> Bytes:
        """Return the largest moment of a stage that holds activations of `count` micro-batches."""
        run, parts = self._run, self._parts
        base = Bytes(weights=stage.nbytes + self._sizes.buffers, optimizer=state_of(run, stage.trained))
        trace, received = Trace(base), parts.boundary
        trace.gradients = stage.gradients  # of the micro-batches before
        forwards = ["forward0", *["forward"] * (len(stage.layers) - 1)]
        kept = received + sum(parts.again["whole", what].activations for what in forwards)
        trace.activations = (count - 1) * kept + received
        for what in forwards:
            trace.run(parts.again["whole", what], what)
        back = ["head", "loss"] * bool(stage.after) + ["backward"] * (len(stage.layers) - 1) + ["backward0"]
        for what in [*back, *["embedding"] * bool(stage.before)]:
            if (segment := parts.again.get(("whole", what))) is not None:
                trace.run(segment, what)
        trace.activations = 0
        trace.step(max((temporary_bytes(run, part) for part in parts_of(stage)), default=0))
        return trace.peak
