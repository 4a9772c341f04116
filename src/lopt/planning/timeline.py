"""Run optimizer steps against clocks: how long one takes, and what the device waits for.

Six things work side by side: the process that launches, the device, copies to it, copies from it, steps in
host memory, and the averaging of gradients over processes. Each has a clock, which says until when it is
busy; what is launched begins when its clock and all that it needs have come so far. What may be on its way
ahead is decided by the engine's own `HostTransfer`, on these clocks in place of CUDA's streams.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from lopt.engine.host_transfer import HostTransfer, TensorGroup, Tensors, _Outgoing
from lopt.planning.devices import Machine

STEPS = 3
"""Optimizer steps that are run; the last one is like all that follow."""
WAITS = 0.1
"""Share of the time up to which waiting is not what bounds a step."""


@dataclass(frozen=True)
class Turn:
    """What the device does for one stage at a time: all micro-batches in one direction, a step, or both.

    Attributes:
        stage: Its index.
        following: The stage whose weights are announced meanwhile.
        with_graph: Whether its layers run with a graph.
        flops: Of its layers. head_flops: of the LM head and of losses.
        stash_in, stash_out: Bytes of hidden states and of their gradients that come and go, one by one, in
            the midst of the computation.
        averaged: Gradients that are averaged over processes before the turn ends: bytes that each process
            sends, and FLOPs that the device has left in this turn and those before it when that begins.
        gradients_in: Bytes of gradients that come back for a step.
        gradients_out: Bytes of gradients that go to host memory at the end.
        steps: Whether the device steps the stage at the end. announced: Whether its state is fetched ahead.
        handed_over: Stages that are stepped in host memory from the end on, in this order.
    """

    stage: int = 0
    following: int | None = None
    with_graph: bool = True
    flops: float = 0.0
    head_flops: float = 0.0
    stash_in: int = 0
    stash_out: int = 0
    averaged: tuple[tuple[int, float], ...] = ()
    gradients_in: int = 0
    gradients_out: int = 0
    steps: bool = False
    announced: bool = False
    handed_over: tuple[int, ...] = ()


@dataclass
class Update:
    """What stepping some parameters takes.

    Attributes:
        traffic: Bytes of weights, gradients and state that are read, and of weights and state written.
        rounded: Numbers that are rounded stochastically.
        state: The state that comes in for it and goes out; None if it stays where it is stepped.
    """

    traffic: int
    rounded: int = 0
    state: TensorGroup | None = None


@dataclass
class Work:
    """An optimizer step.

    Attributes:
        turns: In order.
        weights: What comes in for each stage.
        updates: Of each stage, part by part.
        stepped_by: The stage whose step changes a group of weights; none of those that do not learn.
    """

    turns: list[Turn]
    weights: list[list[TensorGroup]]
    updates: list[list[Update]]
    stepped_by: dict[TensorGroup, int] = field(default_factory=dict)


@dataclass(frozen=True)
class StepTime:
    """The time of one optimizer step, in seconds.

    Attributes:
        seconds: From one step to the next.
        copies: In which the device waits for copies.
        host: In which it waits for steps in host memory.
        stepping: In which host memory is at work.
        ranks: In which it waits for gradients to be averaged.
    """

    seconds: float
    copies: float
    host: float
    stepping: float
    ranks: float = 0.0

    @property
    def bound(self) -> str:
        """What bounds it: "compute", "bus", "host", "wait" or "ranks".

        "host": it has more to do than the device; "wait": it has less, but the next step begins with the
        layers that it steps last.
        """
        if self.copies + self.host + self.ranks <= WAITS * self.seconds:
            return "compute"
        if self.ranks >= max(self.copies, self.host):
            return "ranks"
        if self.copies >= self.host:
            return "bus"
        at_work = self.seconds - self.copies - self.host - self.ranks
        return "host" if self.stepping > at_work else "wait"


def step_time(work: Work, machine: Machine, prefetch: int) -> StepTime:
    """Return the time of an optimizer step, once the steps before have been alike.

    Args:
        prefetch: Bytes of device memory for what is on its way.
    """
    clocks = _Clocks(machine, prefetch)
    for groups in work.weights:
        for group in groups:
            group.pending = None
    seen = StepTime(0, 0, 0, 0)
    for _ in range(STEPS):
        before, seen = seen, _run(work, clocks)
    return StepTime(
        *(after - now for after, now in zip(vars(seen).values(), vars(before).values(), strict=True))
    )


def _run(work: Work, clocks: _Clocks) -> StepTime:
    """Run one optimizer step; return what the clocks say at its end."""
    present = _Present(clocks, work)
    for turn in work.turns:
        present.enter(turn)
        if turn.gradients_in:
            clocks.fetch(stored(turn.gradients_in))
        clocks.run(turn)
        clocks.average(turn)
        if turn.gradients_out:
            present.arrived[turn.stage] = clocks.send(stored(turn.gradients_out))
        if turn.flops + turn.head_flops and (turn.steps or turn.handed_over):
            clocks.wait(clocks.device_free, "copies")  # the norm is looked at
        if turn.steps:
            present.step()
        for stage in turn.handed_over:
            present.hand_over(stage)
    present.leave()
    clocks.synchronize()
    clocks.wait(clocks.device_free, "copies")
    return clocks.seen()


class _Present:
    """The stage that the device is at, in an optimizer step."""

    def __init__(self, clocks: _Clocks, work: Work) -> None:
        self.clocks, self.work = clocks, work
        self.stage: int | None = None
        self.changed = False
        self.arrived: dict[int, Any] = {}  # when gradients are in host memory, by stage

    def enter(self, turn: Turn) -> None:
        """Turn to a stage, as `lopt.engine.offload.Offload.enter` does."""
        work, clocks = self.work, self.clocks
        if turn.stage != self.stage:
            self.leave()
            self.stage = turn.stage
            for group in work.weights[turn.stage]:
                clocks.fetch(group)
        if turn.announced:
            clocks.prefetch([u.state for u in work.updates[turn.stage] if u.state is not None])
        if turn.following is not None:
            clocks.prefetch(work.weights[turn.following])

    def leave(self) -> None:
        """Release the weights of the stage."""
        for group in self.work.weights[self.stage] if self.stage is not None else ():
            self.clocks.release(group, self.changed and self.work.stepped_by.get(group) == self.stage)
        self.stage, self.changed = None, False

    def step(self) -> None:
        """Step the stage on the device, part by part."""
        assert self.stage is not None
        machine = self.clocks.machine
        for update in self.work.updates[self.stage]:
            if update.state is not None:
                self.clocks.fetch(update.state)
            self.clocks.compute(machine.seconds_of_update(update.traffic, update.rounded))
            if update.state is not None:
                self.clocks.release(update.state)
        self.changed = True

    def hand_over(self, stage: int) -> None:
        """Step a stage in host memory, as soon as its gradient is there."""
        if stage == self.stage:
            self.leave()
        machine, clocks = self.clocks.machine, self.clocks
        updates = self.work.updates[stage]
        seconds = sum(machine.seconds_of_host_update(u.traffic, u.rounded) for u in updates)
        pending = clocks.step_on_host(seconds, self.arrived.get(stage))
        for group in self.work.weights[stage]:
            if self.work.stepped_by.get(group) == stage:
                group.pending = pending


@dataclass(frozen=True)
class _Moment:
    """When something on a clock is done; stands in for a CUDA event and for a `Future`."""

    clocks: _Clocks
    time: float
    reason: str

    def query(self) -> bool:
        return self.clocks.launched >= self.time

    def synchronize(self) -> None:
        self.clocks.wait(self.time, self.reason)

    done, result = query, synchronize


class _Clocks(HostTransfer):
    """Copies that take time, and what they run beside.

    Attributes:
        launched, device_free, in_free, out_free, host_free, link_free: Seconds until which each is busy.
        idle: Seconds in which the device has waited, by what for.
        stepping: Seconds in which host memory was stepped.
    """

    def __init__(self, machine: Machine, budget: int) -> None:
        super().__init__(torch.device("meta"), budget)
        self.machine = machine
        self.launched = self.device_free = self.in_free = self.out_free = self.host_free = 0.0
        self.link_free = 0.0
        self.idle = {"copies": 0.0, "host": 0.0, "ranks": 0.0}
        self.stepping = 0.0

    def seen(self) -> StepTime:
        """Return all seconds so far."""
        idle = self.idle
        return StepTime(self.device_free, idle["copies"], idle["host"], self.stepping, idle["ranks"])

    def run(self, turn: Turn) -> None:
        """Let all micro-batches pass; their hidden states share the bus with what is on its way."""
        machine = self.machine
        coming, going = turn.stash_in / machine.bytes_in, turn.stash_out / machine.bytes_out
        if self.in_free > self.device_free:
            self.in_free += coming
        if self.out_free > self.device_free:
            self.out_free += going
        self.compute(coming + going, "copies")
        self.compute(machine.seconds_of(turn.flops, turn.head_flops, turn.with_graph))

    def average(self, turn: Turn) -> None:
        """Average gradients over processes beside what the device computes, and wait for them."""
        for nbytes, left in turn.averaged:
            begins = max(self.link_free, self.device_free - self.machine.seconds_of(left, 0.0, True))
            self.link_free = begins + nbytes / (self.machine.link_gbps * 1e9)
        if turn.averaged:
            self.wait(self.link_free, "ranks")

    def compute(self, seconds: float, reason: str | None = None) -> None:
        """Let the device work, or wait for a `reason`, after all that it has been given."""
        self.device_free += seconds
        if reason is not None:
            self.idle[reason] += seconds
        if not self.machine.beside:
            self.launched = self.device_free

    def wait(self, time: float, reason: str) -> None:
        """Launch nothing before `time`."""
        self.launched = max(self.launched, time)
        self._idle_until(time, reason)

    def step_on_host(self, seconds: float, arrived: Any) -> Any:
        """Step in host memory after what is under way there."""
        self.stepping += seconds
        if not self.machine.beside:
            self.compute(seconds, "host")
            return _Moment(self, self.launched, "host")
        begins = max(self.host_free, self.launched, arrived.time if arrived is not None else 0.0)
        self.host_free = begins + seconds
        return _Moment(self, self.host_free, "host")

    def _idle_until(self, time: float, reason: str) -> None:
        if time > self.device_free:
            self.idle[reason] += time - self.device_free
            self.device_free = time

    # -- in place of CUDA's streams --------------------------------------------------------------

    def _copy_in(self, group: TensorGroup) -> None:
        leaving = [out.copied.time for out in self._outgoing if out.group is group]  # type: ignore[attr-defined]
        begins = max(self.in_free, self.device_free, self.launched, *leaving, 0.0)
        self.in_free = begins + group.nbytes / self.machine.bytes_in
        arrived: Any = _Moment(self, self.in_free, "copies")
        self._prefetched[group] = ({}, arrived)
        if not self.machine.beside:
            arrived.synchronize()

    def _copy_out(self, group: TensorGroup, tensors: Tensors) -> None:
        begins = max(self.out_free, self.device_free, self.launched)
        self.out_free = begins + group.nbytes / self.machine.bytes_out
        copied: Any = _Moment(self, self.out_free, "copies")
        self._outgoing.append(_Outgoing(group, tensors, copied))
        if not self.machine.beside:
            copied.synchronize()

    def _wait_for(self, arrived: Any) -> None:
        self._idle_until(arrived.time, "copies")


def stored(nbytes: int) -> TensorGroup:
    """Return a group of so many bytes that is in host memory."""
    held: Tensors = {0: torch.empty(nbytes, dtype=torch.uint8, device="meta")}
    group = TensorGroup(lambda: dict(held), lambda tensors: None)
    group.host = dict(held)
    return group
