"""What a run will need, from the model's config alone: device memory by part, host, disk, FLOPs, bus.

`lopt.planning.measure` has the cost of every part of a micro-batch; here they are strung together for a
method, k, a schedule and what is offloaded, and the live bytes are followed to their peak. A steady state is
meant: the optimizer's state exists, gradients are None when an optimizer step begins.

Not counted: CUDA's context, allocator rounding and fragmentation (`RESERVE` allows for them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from lopt.core.config import LoPTConfig
from lopt.planning.devices import Machine
from lopt.planning.measure import Parts, Segment, measure
from lopt.planning.optimizer_step import OPTIMIZERS, parts_of, state_of, temporary_bytes
from lopt.planning.run import Bytes, Run, Setting
from lopt.planning.sharded import computes_in, sharded_peak, sharded_work
from lopt.planning.sizes import BlockSizes, Sizes, StageSizes, size_of
from lopt.planning.staged import Reference, StagedStep, averaged, updates_of
from lopt.planning.timeline import StepTime, Turn, Update, Work, step_time
from lopt.planning.trace import Trace, casts
from lopt.validation import check, check_choice

BACKWARD = 2 / 3
"""Share of a layer's operations that is its backward, without recomputation."""
RESERVE = 2**30
"""Bytes of a GPU that are left for CUDA's context and fragmentation."""


@dataclass(frozen=True)
class Plan:
    """What one setting needs.

    Attributes:
        peak: the device at the moment of its largest total.
        host: bytes of host memory for what is offloaded, by all processes.
        checkpoint, model: bytes on disk of one checkpoint and of the final model.
        flops: per optimizer step (with `local_every`, on average).
        bus: bytes into the device per optimizer step (as many leave it), and of those the ones that grow
            with the tokens (`bus_tokens`).
        tokens: per optimizer step.
        work: what is done in an optimizer step, in order.
        stages: how many the block-major schedule has.
        prefetch: bytes of device memory for what is on its way.
        processes: that average their gradients, and share the host's memory.
    """

    setting: Setting
    peak: Bytes
    host: int
    checkpoint: int
    model: int
    flops: float
    tokens: int
    work: Work = field(repr=False, compare=False)
    bus: int = 0
    bus_tokens: int = 0
    prefetch: int = 0
    stages: int | None = None
    processes: int = 1

    @property
    def total(self) -> int:
        """Peak bytes on the device."""
        return self.peak.total

    @property
    def sent(self) -> int:
        """Bytes that each process sends to the others per optimizer step."""
        return sum(nbytes for turn in self.work.turns for nbytes, _ in turn.averaged)

    def time(self, machine: Machine) -> StepTime:
        """Return the time of one optimizer step."""
        shared = replace(machine, host_gbps=machine.host_gbps / self.processes)
        return step_time(self.work, shared, self.prefetch)

    def hidden_from(self, machine: Machine) -> float:
        """Return the tokens per step from which on copies can hide behind compute; infinity if never."""
        growing = self.flops / (machine.tflops[0] * 1e12) - self.bus_tokens / machine.bytes_in
        fixed = (self.bus - self.bus_tokens) / machine.bytes_in
        return self.tokens * fixed / growing if growing > 0 else math.inf


class Planner:
    """Plans one run in different settings; every part is measured once.

    Args:
        run: what all settings share.
        other: a planner of the same model, whose measurements are shared.

    Raises:
        ValueError: the optimizer is not known, the model cannot be measured.
    """

    def __init__(self, run: Run, other: Planner | None = None) -> None:
        check_choice("optim", run.optimizer, OPTIMIZERS)
        self.run = run
        self._parts: dict[tuple[Any, ...], Parts] = other._parts if other is not None else {}

    @cached_property
    def sizes(self) -> Sizes:
        """The model's weights, on the meta device."""
        return Sizes.of(self.run.config, self.run.dtype, freeze_tied=self.run.tied_embeddings == "freeze")

    @cached_property
    def _adapted_sizes(self) -> Sizes:
        check(self.run.adapters is not None, "method", "lora", "with `adapters`")
        return Sizes.of(self.run.config, self.run.dtype, self.run.adapters)

    def plan(self, setting: Setting, prefetch: int | None = None) -> Plan:
        """Return bytes, FLOPs and bus traffic of the run in `setting`; `prefetch` in place of the run's.

        Raises:
            ValueError: k is more than the layers; a combination that does not exist.
        """
        block_major, offload = setting.schedule == "block_major", setting.offload
        check(offload == "none" or block_major, "offload", offload, "none unless `schedule` is block_major")
        sizes, cut = self._sizes(setting), self.cut(setting)
        run = replace(self.run, masters=cut.keeps_masters(self.run.masters))
        prefetch = run.prefetch if prefetch is None else prefetch
        blocks, parts = sizes.blocks(cut), self.measured(setting)
        trained = [t for block in blocks for t in block.trained]
        weights, state = sum(block.nbytes for block in blocks), state_of(run, trained)
        model = sum(size_of(block.tensors) for block in blocks)
        model = size_of(trained) if setting.method == "lora" else model  # adapters are saved alone
        checkpoint = model + sum(size_of(b.head) for b in blocks) + state
        common: dict[str, Any] = dict(checkpoint=checkpoint, model=model, tokens=run.step_tokens)
        common["processes"] = run.processes
        reference, buffers = self._reference(setting, parts, blocks[-1].place), sizes.buffers
        if reference is not None:
            buffers += self.sizes.buffers + self.sizes.model * run.dtype.itemsize
        if run.fsdp2:
            check(not block_major, "schedule", setting.schedule, "eager with FSDP2")
            peak, work = self._sharded(setting, run, blocks, cut)
            return Plan(setting, peak, host=0, flops=_flops(work), work=work, **common)
        if not block_major:
            resident = Bytes(weights=weights + buffers, optimizer=state)
            peak = self._eager(setting, parts, blocks, resident, reference)
            work = self._eager_work(setting, parts, blocks, reference)
            return Plan(setting, peak, host=0, flops=_flops(work), work=work, **common)
        stages = sizes.stages(cut)
        forward = self._forward(setting, parts, stages)
        step = StagedStep(run, setting, parts, forward, stages, buffers, state, prefetch, reference)
        weights_offloaded = offload == "block"
        host = state * (offload != "none") + weights * weights_offloaded
        host += step.host_gradients + step.host_work
        return Plan(
            setting=setting,
            peak=step.peak,
            host=host * run.processes,
            flops=_flops(step.work),
            work=step.work,
            bus=step.bytes_in + step.stash_in,
            bus_tokens=step.stash_in,
            prefetch=prefetch,
            stages=len(stages),
            **common,
        )

    def _sizes(self, setting: Setting) -> Sizes:
        return self._adapted_sizes if setting.method == "lora" else self.sizes

    def cut(self, setting: Setting) -> LoPTConfig:
        """Return the config of a run in `setting`.

        Raises:
            ValueError: a combination that does not exist.
        """
        run = self.run
        some = setting.method == "lopt" and setting.num_blocks > 1
        return LoPTConfig(
            **{name: getattr(setting, name) for name in _CUT},
            frozen_blocks=run.frozen_blocks if some else 0,
            tied_embeddings=run.tied_embeddings,
        )

    def _forward(self, setting: Setting, parts: Parts, stages: list[StageSizes]) -> Segment:
        """Return the forward of a layer without a graph, which not every setting has."""
        if ("resting", "forward") not in parts.fresh:
            if all(stage.closes and stage.learns for stage in stages):
                return _NOTHING
            parts = self.measured(setting, without_graph=True)
        return parts.fresh["resting", "forward"]

    def measured(self, setting: Setting, without_graph: bool = False) -> Parts:
        """Return the parts of a micro-batch, or those of one whose first layers run without a graph."""
        run, adapters = self.run, self.run.adapters if setting.method == "lora" else None
        method = "frozen" if without_graph else setting.method
        if setting.num_blocks == 1 and method in ("lopt", "frozen") and not without_graph:
            method = "e2e"
        key: tuple[Any, ...] = (method, setting.checkpointing, run.batch, run.tokens, run.dtype, run.autocast)
        key += (run.device, run.tied_embeddings, repr(adapters))
        key += (run.frozen_blocks > 0, run.aux_loss) if method == "lopt" else ()
        if key not in self._parts:
            self._parts[key] = measure(run, method, setting.checkpointing, adapters)
        return self._parts[key]

    # -- micro-batches ---------------------------------------------------------------------------

    def _reference(self, setting: Setting, parts: Parts, last: str) -> Reference | None:
        """Return the forward of DPO's reference model; adapters have none, whose base model is."""
        if not self.run.reference or setting.method == "lora":
            return None
        layer = self.measured(setting, without_graph=True).fresh["resting", "forward"]
        head = parts.fresh[last, "head"]
        flops = layer.flops * len(self.sizes.layers)
        return Reference(max(layer.rise, head.rise), flops, head.flops)

    def _eager(
        self,
        setting: Setting,
        parts: Parts,
        blocks: list[BlockSizes],
        resident: Bytes,
        reference: Reference | None,
    ) -> Bytes:
        trace = Trace(resident, reference=reference.rise if reference else 0)
        if self.run.processes > 1:  # DDP keeps its buckets; earlier blocks' gradients are averaged in place
            trace.gradients = size_of(blocks[-1].trained)
        for segments in self._micro_batches(trace, parts):
            trace.run(segments[blocks[0].place, "start"], "start")
            for block in blocks:
                trace.run_block(segments, block, casts(setting, parts, block))
        trace.step(self._temporaries(blocks))
        return trace.peak

    def _sharded(
        self, setting: Setting, run: Run, blocks: list[BlockSizes], cut: LoPTConfig
    ) -> tuple[Bytes, Work]:
        """Return peak and work under FSDP2, which gathers weights in the dtype that is computed with."""
        narrow = Planner(replace(run, dtype=computes_in(run), autocast=False), self)
        computed, parts = narrow.sizes.blocks(cut), narrow.measured(setting)
        peak = sharded_peak(run, blocks, computed, parts)
        every = run.local_every if setting.method == "lopt" else 1
        return peak, sharded_work(run, blocks, computed, parts, every)

    def _micro_batches(self, trace: Trace, parts: Parts) -> Iterator[dict[tuple[str, str], Segment]]:
        """Yield the segments of the first two micro-batches; a third is like the second."""
        waiting = (self.run.accumulation - 1) * self.run.ids_bytes
        for segments in (parts.fresh, parts.again)[: self.run.accumulation]:
            trace.activations = waiting
            yield segments

    def _temporaries(self, blocks: list[BlockSizes]) -> int:
        """What the step of the largest part adds to gradients and state that are all there."""
        return max((temporary_bytes(self.run, part) for b in blocks for part in parts_of(b)), default=0)

    def _eager_work(
        self, setting: Setting, parts: Parts, blocks: list[BlockSizes], reference: Reference | None
    ) -> Work:
        """Return the blocks' work one by one; an earlier block that rests at times only runs forward then."""
        run, turns, updates = self.run, list[Turn](), list[list[Update]]()
        every = run.local_every if setting.method == "lopt" else 1
        for block in blocks:
            trace, updates = Trace(Bytes()), [*updates, updates_of(run, parts_of(block))]
            trace.run_block(parts.fresh, block, 0)
            layers, head = trace.flops - trace.head_flops, trace.head_flops
            if every > 1 and block.place in ("first", "middle"):
                forward = parts.fresh[block.place, "forward"].flops * len(block.layers)
                layers, head = (layers + (every - 1) * forward) / every, head / every
            if reference is not None and block is blocks[-1]:
                layers, head = layers + reference.flops, head + reference.head_flops
            layers, head = run.accumulation * layers, run.accumulation * head
            turns.append(Turn(len(turns), with_graph=block.learns, flops=layers, head_flops=head))
        if run.processes > 1:  # an earlier block's begin when it is done, DDP's in the midst of the backward
            left, gradients = 0.0, list[tuple[int, float]]()
            for block, turn in reversed([*zip(blocks, turns, strict=True)]):
                own = (turn.flops + turn.head_flops) / run.accumulation
                gradients.insert(0, (block.gradients, left if block is not blocks[-1] else own * BACKWARD))
                left += own
            turns.append(Turn(len(turns) - 1, averaged=averaged(run, gradients)))
        # All blocks are stepped when all micro-batches have run.
        turns += [Turn(index, steps=True) for index, own in enumerate(updates) if own]
        return Work(turns, [[] for _ in blocks], updates)


def _flops(work: Work) -> float:
    return sum(turn.flops + turn.head_flops for turn in work.turns)


_NOTHING = Segment(0, 0, 0, 0, 0.0)
_CUT = {f.name for f in fields(LoPTConfig)} & {f.name for f in fields(Setting)}
