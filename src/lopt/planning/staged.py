"""Follow an optimizer step of the block-major schedule stage by stage, in the order of the engine.

The order is that of `lopt.engine.block_major` and `lopt.engine.updates`; what is on its way to the device is
found by the engine's own `HostTransfer`, with tensors that have no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lopt.engine.host_transfer import HostTransfer, TensorGroup
from lopt.engine.optimizer import PART_BYTES, part_bytes_within
from lopt.planning.kept import Kept
from lopt.planning.measure import Parts, Segment
from lopt.planning.optimizer_step import parts_of, state_of, temporary_bytes, traffic_of
from lopt.planning.run import Bytes, Run, Setting
from lopt.planning.sizes import StageSizes, size_of
from lopt.planning.timeline import Turn, Update, Work, stored
from lopt.planning.trace import Trace, casts, total

Segments = dict[tuple[str, str], Segment]


@dataclass(frozen=True)
class Reference:
    """The forward of a model that does not learn, for a micro-batch: rise in bytes, and operations."""

    rise: int
    flops: float
    head_flops: float


class StagedStep:
    """An optimizer step; all is known once it is made.

    Args:
        run, setting: what is planned.
        parts: of a micro-batch, measured for the method.
        forward: of a layer without a graph.
        stages: all stages.
        buffers, state: bytes of the model's buffers and of all optimizer state.
        prefetch: bytes of device memory for what is on its way.
        reference: a second model, which is run where the loss is; its weights are among `buffers`.

    Attributes:
        peak: the device at the moment of its largest total.
        host_gradients: bytes of host memory for gradients, whose places are kept from step to step.
        host_work: bytes of host memory for what waits between stages and what steps there add, at most.
        bytes_in, stash_in: bytes that come to the device: weights, state and gradients, and hidden states.
        work: for `lopt.planning.timeline`.
    """

    def __init__(
        self,
        run: Run,
        setting: Setting,
        parts: Parts,
        forward: Segment,
        stages: Sequence[StageSizes],
        buffers: int,
        state: int,
        prefetch: int,
        reference: Reference | None = None,
    ) -> None:
        self._reference = reference
        self.run, self.setting, self.parts, self.forward, self.stages = run, setting, parts, forward, stages
        self._kept = Kept(run, stages)
        self._rows = run.ids_bytes
        self.peak = Bytes()
        self.host_work = self.host_gradients = self.bytes_in = self.stash_in = 0
        self._moves = setting.offload == "block"
        self._on_host = setting.optimizer_device == "cpu"
        self._resident = Bytes(
            weights=buffers + sum(stage.nbytes for stage in stages) * (not self._moves),
            optimizer=state * (setting.offload == "none"),
        )
        self._transfer = HostTransfer(torch.device("meta"), prefetch)
        size = PART_BYTES if setting.offload == "none" or self._on_host else part_bytes_within(prefetch)
        self._parts = [parts_of(stage, size) for stage in stages]
        moving_state = setting.offload != "none" and not self._on_host
        self._state = [[stored(state_of(run, part)) for part in own if moving_state] for own in self._parts]
        self._stepped_by: dict[TensorGroup, int] = {}
        self._weights = [self._weight_groups(stage) for stage in stages]
        if stages[-1].borrowed:  # the token embedding
            self._weights[-1] += self._weights[0][:1]
        # What steps in host memory add, by the stages whose step may still be under way; at first those of
        # the optimizer step before. A stage that is needed waits for its own.
        self._added: dict[int, int] = {}
        for stage in stages if self._on_host else ():
            self._submit(stage)
        self._stage: StageSizes | None = None
        self._held: list[StageSizes] = []
        self._waiting: dict[int, int] = {}  # bytes on the device of gradients that wait, by stage
        self._gradients_on_host: dict[int, int] = {}
        self._shared = 0  # bytes on the device of the gradient of a matrix that the first stage owns
        self._turns: list[Turn] = []
        self._turn = Turn()  # that has begun
        for stage in stages:
            with_graph = stage.closes and stage.learns
            self._enter(stage, with_graph)
            self._pass(stage, with_graph)
            if with_graph:
                self._finish_block(stage)
        self._step_held()
        updates = [updates_of(run, *both) for both in zip(self._parts, self._state, strict=True)]
        self.work = Work(self._turns, self._weights, updates, self._stepped_by)

    # -- the engine's order ----------------------------------------------------------------------

    def _finish_block(self, last: StageSizes) -> None:
        self._stage_done(last)
        own = [stage for stage in self.stages if stage.block == last.block]
        for stage in reversed([stage for stage in own[:-1] if stage.runs_back]):
            self._enter(stage, with_graph=True)
            self._pass(stage, with_graph=True)
            self._stage_done(stage)

    def _enter(self, stage: StageSizes, with_graph: bool) -> None:
        own = [s for s in self.stages if s.block == stage.block]
        earlier = [s for s in own if s.index < stage.index and s.runs_back] if with_graph else []
        later = self.stages[(own[-1].index if with_graph else stage.index) + 1 :]
        following = earlier[-1] if earlier else next(iter(later), None)
        self._turn_to(stage, with_graph and self._steps_at_once(stage), following)

    def _turn_to(self, stage: StageSizes, will_step: bool, following: StageSizes | None) -> None:
        if stage is not self._stage:
            self._put_away()
            self._leave()
            self._stage = stage
            for group in self._weights[stage.index]:
                self._fetch(group)
        if will_step:
            self._transfer.prefetch(self._state[stage.index])
        after = None if following is None else following.index
        self._turn = Turn(stage.index, after, announced=will_step)
        if following is not None:
            self._transfer.prefetch(self._weights[following.index])

    def _steps_at_once(self, stage: StageSizes) -> bool:
        return not self.run.clips or (not stage.reaches_back and self.run.clip == "block")

    def _leave(self) -> None:
        if self._stage is not None:
            for group in self._weights[self._stage.index]:
                self._transfer.release(group)
        self._stage = None

    def _put_away(self) -> None:
        """Move gradients that wait to host memory, where weights are offloaded."""
        if self._moves:
            self._gradients_on_host |= self._waiting
            if self._shared:
                self._gradients_on_host[-1] = self._shared
            borrows = bool(self._turns) and bool(self.stages[self._turns[-1].stage].borrowed)
            self._note_leaving(sum(self._waiting.values()) + self._shared * borrows)
            self._waiting, self._shared = {}, 0
            self.host_gradients = sum(self._gradients_on_host.values())

    def _stage_done(self, stage: StageSizes) -> None:
        if stage.trained:
            self._held.append(stage)
            self._turns[-1] = replace(self._turns[-1], averaged=averaged(self.run, [(stage.gradients, 0.0)]))
        self._waiting[stage.index] = stage.gradients
        if stage.borrowed:
            self._shared = stage.left
        if self._steps_at_once(stage):
            self._step_held()

    def _step_held(self) -> None:
        held, self._held = sorted(self._held, key=lambda stage: stage.index), []
        for number, stage in enumerate(held):
            if self._on_host:
                self._gradients_on_host[stage.index] = stage.gradients
                self._note_leaving(self._waiting.pop(stage.index, 0))
                self._put_away()
                self._submit(stage)
                self._see_host(self.parts.boundary * self._kept.at_step(stage))
                last = self._turns[-1]
                self._turns[-1] = replace(last, handed_over=(*last.handed_over, stage.index))
            else:
                self._step(stage, held[number + 1] if number + 1 < len(held) else None)
        if held and self._on_host:
            self._leave()

    def _submit(self, stage: StageSizes) -> None:
        """Note what the step of a stage in host memory adds until it is done."""
        run = replace(self.run, device="cpu")
        self._added[stage.index] = max((temporary_bytes(run, p) for p in self._parts[stage.index]), default=0)

    def _note_leaving(self, gradients: int) -> None:
        if gradients:
            last = self._turns[-1]
            self._turns[-1] = replace(last, gradients_out=last.gradients_out + gradients)

    # -- moments ---------------------------------------------------------------------------------

    def _pass(self, stage: StageSizes, with_graph: bool) -> None:
        """Run all micro-batches through a stage."""
        run, boundary = self.run, self.parts.boundary
        if stage.index == 0 and with_graph and self.stages[-1].left and self._moves:
            self._shared = self._gradients_on_host.get(-1, 0)  # its gradient is on the device again
            self._turn = replace(self._turn, gradients_in=self._shared)
            self.bytes_in += self._shared
        fed = self._kept.fed(stage, with_graph)
        *stashed, most = self._kept.during(stage, with_graph)
        self._see_host(boundary * stashed[0])
        self._added.pop(stage.index, None)
        self._see_host(boundary * most)
        base = replace(self._base(stage), transfers=self._transfer.bytes_in_flight)
        is_last = stage.index + 1 == len(self.stages)
        trace = Trace(base, self._reference.rise if self._reference is not None and is_last else 0)
        trace.gradients = sum(self._waiting.values()) + self._shared
        # A third micro-batch is like the second.
        every = list(zip(self._micro_batches(stage), stashed, strict=True))
        for segments, count in every[: run.accumulation]:
            trace.stash = boundary * (fed if self._moves else count)
            trace.activations = (run.accumulation - 1) * self._rows
            trace.run(segments[self.stages[0].place, "start"], "start")
            trace.flops = trace.head_flops = 0.0
            if with_graph:
                self._run_with_graph(trace, segments, stage)
            else:
                trace.run_without_graph(self.forward, len(stage.layers), self.parts.casts)
            if segments is self.parts.fresh:  # a shared matrix was measured with both of its gradients
                trace.gradients += stage.left
        self._see(trace.peak)
        self._note_pass(stage, with_graph, trace, fed)

    def _note_pass(self, stage: StageSizes, with_graph: bool, trace: Trace, fed: int) -> None:
        """Note the operations and the traffic of all micro-batches in a stage."""
        run, head = self.run, trace.head_flops
        layers = trace.flops - head
        if run.local_every > 1 and self.setting.method == "lopt" and stage.place in ("first", "middle"):
            learning = 1 / run.local_every
            if with_graph:  # at other times it is a forward, or nothing
                of_layer = self.parts.fresh[stage.place, "forward"].flops
                rest = of_layer * len(stage.layers) * stage.closes
                layers, head = learning * layers + (1 - learning) * rest, learning * head
        if self._reference is not None and stage.index + 1 == len(self.stages):
            layers, head = layers + self._reference.flops, head + self._reference.head_flops
        if with_graph:
            kept = stage.reaches_back + (stage.closes and stage.index + 1 < len(self.stages))
        else:
            kept = 1 + (stage.index == 0 and self._kept.has_first_input(stage))
        moved = run.accumulation * self.parts.boundary * self._moves
        self.stash_in += moved * fed
        turn = replace(
            self._turn,
            with_graph=with_graph,
            flops=run.accumulation * layers,
            head_flops=run.accumulation * head,
            stash_in=moved * fed,
            stash_out=moved * kept,
        )
        self._turns.append(turn)

    def _micro_batches(self, stage: StageSizes) -> tuple[Segments, Segments]:
        """Return the segments of a micro-batch that finds no gradients, and of one that does."""
        fresh, again = self.parts.fresh, self.parts.again
        if left := self.stages[-1].left * (stage.index == 0):
            # Measured was the sum of this gradient and the head's, which has been added already.
            key = (stage.place, "embedding")
            found = again[key]
            only = {key: replace(found, rise=found.rise - left, activations=found.activations + left)}
            fresh, again = fresh | only, again | only
        return fresh, again

    def _run_with_graph(self, trace: Trace, segments: Segments, stage: StageSizes) -> None:
        recomputed = self.parts.casts * len(stage.layers) * self.setting.checkpointing
        # Zeros in place of the embedding go when the forward ends; no graph holds them.
        measured = stage.closes and stage.place != "whole"
        zeros = self.parts.boundary if stage.index > 0 and not measured else 0
        if not stage.layers and stage.closes:
            self._run_head_alone(trace, segments, stage)
        elif stage.opens and stage.closes:
            trace.run_block(segments, stage, casts(self.setting, self.parts, stage))
        elif stage.closes:
            trace.run_stage(segments, stage, casts(self.setting, self.parts, stage) + zeros)
        else:
            trace.run_stage(segments, stage, recomputed + zeros)

    def _run_head_alone(self, trace: Trace, segments: Segments, stage: StageSizes) -> None:
        """Run a last stage without layers: of what came before, only the rows are left.

        What the head's forward keeps goes in its backward, which leaves the gradient of its input, and that
        of its matrix if another stage owns that. Measured was less, as some of the layers' went meanwhile.
        """
        head, loss = (segments[stage.place, what] for what in ("head", "loss"))
        kept = self.parts.boundary + stage.left - loss.activations
        of_layers = kept - head.activations
        trace.activations = self.run.accumulation * self._rows
        trace.run(replace(head, rise=head.rise + of_layers, activations=kept), "head")
        trace.run(loss, "loss")

    def _step(self, stage: StageSizes, following: StageSizes | None) -> None:
        """Step a stage on the device, part by part."""
        here = self._stage is stage
        if self._moves and not here:
            self._turn_to(stage, will_step=True, following=following)
            self._waiting[stage.index] = stage.gradients
            self.bytes_in += stage.gradients
            self._turns.append(replace(self._turn, gradients_in=stage.gradients))
        elif not here:
            self._turns.append(Turn(stage.index))
        if stage.index == 0:
            self._shared = 0
        base = self._base(stage)
        stash = self.parts.boundary * self._kept.at_step(stage) * (not self._moves)
        others = sum(bytes_ for index, bytes_ in self._waiting.items() if index != stage.index) + self._shared
        left = stage.gradients
        for number, part in enumerate(self._parts[stage.index]):
            own = sum(t.nbytes for t in part)
            added = temporary_bytes(self.run, part)
            now = left
            if self.setting.offload != "none":
                group = self._state[stage.index][number]
                self._fetch(group)
                added += state_of(self.run, part)
                # Gradients in bfloat16 are freed as they are copied. A large one meets the copies of
                # those before it; without masters there are more copies later.
                narrow = [t.nbytes for t in part if t.dtype == torch.bfloat16]
                met = max((b - sum(narrow[i + 1 :]) for i, b in enumerate(narrow)), default=0)
                now = left - sum(narrow) + met * bool(self.run.masters)
                left -= own
            moment = replace(
                base,
                gradients=others + now,
                optimizer=base.optimizer + added,
                stash=stash,
                transfers=self._transfer.bytes_in_flight,
            )
            self._see(moment)
            if self.setting.offload != "none":
                self._transfer.release(group)
        self._waiting.pop(stage.index, None)
        self._turns[-1] = replace(self._turns[-1], steps=True)

    def _see_host(self, stash: int) -> None:
        self.host_work = max(self.host_work, stash * self._moves + max(self._added.values(), default=0))

    def _see(self, moment: Bytes) -> None:
        self.peak = max(self.peak, moment, key=total)

    def _base(self, stage: StageSizes) -> Bytes:
        if not self._moves:
            return self._resident
        weights = stage.nbytes + size_of(stage.borrowed)
        return replace(self._resident, weights=self._resident.weights + weights)

    # -- what moves ------------------------------------------------------------------------------

    def _weight_groups(self, stage: StageSizes) -> list[TensorGroup]:
        if not self._moves:
            return []
        groups = []
        for tensors in (stage.before, *stage.layers, stage.after, stage.head):
            for learns in (False, True):  # apart, as base weights are never stepped; they come first
                own = [t for t in tensors if (t.requires_grad and stage.learns) == learns]
                groups += [stored(size_of(own))] if own else []
                self._stepped_by |= {groups[-1]: stage.index} if own and learns else {}
        return groups

    def _fetch(self, group: TensorGroup) -> None:
        self.bytes_in += group.nbytes
        self._transfer.fetch(group)


def averaged(run: Run, gradients: Iterable[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Return gradients of some sizes in bytes as `Turn.averaged`: by what a ring sends of them."""
    sent = 2 * (run.processes - 1) / run.processes
    return tuple((round(sent * nbytes), left) for nbytes, left in gradients if sent * nbytes)


def updates_of(
    run: Run, parts: Sequence[Sequence[Tensor]], states: Sequence[TensorGroup] = ()
) -> list[Update]:
    """Return what stepping some parts takes; `states` are of those whose state moves."""
    return [
        Update(*traffic_of(run, part), state=states[number] if states else None)
        for number, part in enumerate(parts)
    ]
