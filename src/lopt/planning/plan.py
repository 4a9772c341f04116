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
from lopt.planning.measure import Parts, Segment, measure
from lopt.planning.optimizer_step import OPTIMIZERS, parts_of, state_of, temporary_bytes
from lopt.planning.run import Bytes, Run, Setting
from lopt.planning.sizes import BlockSizes, Sizes, StageSizes, size_of
from lopt.planning.staged import StagedStep
from lopt.planning.trace import Trace, casts
from lopt.residency import Residency
from lopt.validation import check, check_choice

RESERVE = 2**30
"""Bytes of a GPU that are left for CUDA's context and fragmentation."""
TFLOPS, BANDWIDTH = 100.0, 25.0
"""Defaults of what a GPU reaches in training, and of GB/s from host to GPU and as much back."""
HOST_BANDWIDTH = 40.0
"""GB/s at which a step in host memory reads and writes weights, state and gradients."""
BLOCK_MAJOR_TIME = 1.05
"""Time of a block-major step beside an eager one (docs/memory.md)."""


@dataclass(frozen=True)
class Plan:
    """What one setting needs.

    Attributes:
        peak: the device at the moment of its largest total.
        host: bytes of host memory for what is offloaded.
        checkpoint, model: bytes on disk of one checkpoint and of the final model.
        flops: per optimizer step (with `local_every`, on average).
        bus: bytes into the device per optimizer step (as many leave it), and of those the ones that grow
            with the tokens (`bus_tokens`).
        turns: bytes in and FLOPs of what the device does, in order: by block, or by stage and sweep.
        stages: how many the block-major schedule has.
        host_traffic: bytes that steps in host memory read and write there.
        covered: the part of the device's time that steps in host memory can run beside.
        prefetch: bytes that come in while another block works.
    """

    setting: Setting
    peak: Bytes
    host: int
    checkpoint: int
    model: int
    flops: float
    bus: int = 0
    bus_tokens: int = 0
    turns: list[tuple[float, float]] = field(default_factory=list)
    prefetch: int = 0
    stages: int | None = None
    host_traffic: int = 0
    covered: float = 1.0

    @property
    def total(self) -> int:
        """Peak bytes on the device."""
        return self.peak.total

    def seconds(self, tflops: float, bandwidth: float) -> float:
        """Return the time of one optimizer step at `tflops` 10^12/s and `bandwidth` 10^9 bytes/s each way.

        Of what a turn needs, as much hides behind its micro-batches as may be prefetched. Steps in host
        memory run beside the device's work as far as nothing waits for them.
        """
        slower = BLOCK_MAJOR_TIME if self.setting.schedule == "block_major" else 1.0
        total = 0.0
        for bytes_in, flops in self.turns:
            works = slower * flops / (tflops * 1e12)
            hidden = min(bytes_in, self.prefetch, works * bandwidth * 1e9)
            total += works + (bytes_in - hidden) / (bandwidth * 1e9)
        return total + max(0.0, self.host_traffic / (HOST_BANDWIDTH * 1e9) - self.covered * total)

    def hidden_from(self, step_tokens: int, tflops: float, bandwidth: float) -> float:
        """Return the tokens per step from which on copies can hide behind compute; infinity if never."""
        growing = self.flops / (tflops * 1e12) - self.bus_tokens / (bandwidth * 1e9)
        fixed = (self.bus - self.bus_tokens) / (bandwidth * 1e9)
        return step_tokens * fixed / growing if growing > 0 else math.inf


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
        run, prefetch = self.run, self.run.prefetch if prefetch is None else prefetch
        sizes, cut = self._sizes(setting), self._cut(setting)
        run = replace(run, masters=cut.keeps_masters(run.masters))
        blocks, parts = sizes.blocks(cut), self._measured(setting)
        trained = [t for block in blocks for t in block.trained]
        weights, state = sum(block.nbytes for block in blocks), state_of(run, trained)
        model = sum(size_of(block.tensors) for block in blocks)
        model = size_of(trained) if setting.method == "lora" else model  # adapters are saved alone
        files = dict(checkpoint=model + sum(size_of(b.head) for b in blocks) + state, model=model)
        if not block_major:
            resident = Bytes(weights=weights + sizes.buffers, optimizer=state)
            flops = [self._flops(setting, parts, block) for block in blocks]
            peak = self._eager(setting, parts, blocks, resident)
            return Plan(setting, peak, host=0, flops=sum(flops), turns=[(0.0, f) for f in flops], **files)
        stages = sizes.stages(cut)
        forward = self._forward(setting, parts, stages)
        step = StagedStep(run, setting, parts, forward, stages, sizes.buffers, state, prefetch)
        weights_offloaded, on_host = offload == "block", setting.optimizer_device == "cpu"
        host = state * (offload != "none") + weights * weights_offloaded
        host += step.host_gradients + step.host_temporaries + step.stash * weights_offloaded
        stash_in = sum(turn.stash_in for turn in step.turns)
        return Plan(
            setting=setting,
            peak=step.peak,
            host=host,
            flops=sum(turn.flops for turn in step.turns),
            bus=round(sum(turn.bytes_in for turn in step.turns)) + stash_in,
            bus_tokens=stash_in,
            turns=[(turn.bytes_in, turn.flops) for turn in step.turns],
            prefetch=prefetch,
            stages=len(stages),
            host_traffic=2 * (state + size_of(trained)) * on_host,
            covered=self._covered(len(blocks), len(stages)),
            **files,
        )

    def _sizes(self, setting: Setting) -> Sizes:
        return self._adapted_sizes if setting.method == "lora" else self.sizes

    def _cut(self, setting: Setting) -> LoPTConfig:
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

    def _covered(self, blocks: int, stages: int) -> float:
        """Return the part of the device's time that steps in host memory can run beside.

        Earlier blocks are stepped while later ones run, and the last one while the next step's first ones do.
        One block is stepped during its backward, or from a norm on that is known when it has ended; the next
        forward needs first what is stepped last or, then, first.
        """
        if blocks > 1 and not (self.run.clips and self.run.clip == "global"):
            return 1.0
        forward = 0.25 if stages > blocks else 0.0  # of forward, recomputing and backward
        return forward if self.run.clips else 1 - forward

    def _forward(self, setting: Setting, parts: Parts, stages: list[StageSizes]) -> Segment:
        """Return the forward of a layer without a graph, which not every setting has."""
        if ("resting", "forward") not in parts.fresh:
            if all(stage.closes and stage.learns for stage in stages):
                return _NOTHING
            parts = self._measured(setting, without_graph=True)
        return parts.fresh["resting", "forward"]

    def _measured(self, setting: Setting, without_graph: bool = False) -> Parts:
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

    def _eager(self, setting: Setting, parts: Parts, blocks: list[BlockSizes], resident: Bytes) -> Bytes:
        trace = Trace(resident)
        for segments in self._micro_batches(trace, parts):
            trace.run(segments[blocks[0].place, "start"], "start")
            for block in blocks:
                trace.run_block(segments, block, casts(setting, parts, block))
        trace.step(self._temporaries(blocks))
        return trace.peak

    def _micro_batches(self, trace: Trace, parts: Parts) -> Iterator[dict[tuple[str, str], Segment]]:
        """Yield the segments of the first two micro-batches; a third is like the second."""
        waiting = (self.run.accumulation - 1) * 3 * 8 * self.run.batch * self.run.tokens  # ids, mask, labels
        for segments in (parts.fresh, parts.again)[: self.run.accumulation]:
            trace.activations = waiting
            yield segments

    def _temporaries(self, blocks: list[BlockSizes]) -> int:
        """What the step of the largest part adds to gradients and state that are all there."""
        return max((temporary_bytes(self.run, part) for b in blocks for part in parts_of(b)), default=0)

    def _flops(self, setting: Setting, parts: Parts, block: BlockSizes) -> float:
        """FLOPs per optimizer step; an earlier block that rests at times only runs forward then."""
        every = self.run.local_every if setting.method == "lopt" else 1
        trace = Trace(Bytes())
        trace.run_block(parts.fresh, block, 0)
        flops = trace.flops
        if every > 1 and block.place in ("first", "middle"):
            forward = parts.fresh[block.place, "forward"].flops * len(block.layers)
            flops = (flops + (every - 1) * forward) / every
        return flops * self.run.accumulation


_NOTHING = Segment(0, 0, 0, 0, 0.0)
_CUT = ("method", "num_blocks", *(f.name for f in fields(Residency) if f.name != "prefetch_gib"))
