"""What a run will need, from the model's config alone: device memory by part, host, disk, FLOPs, bus.

`lopt.planning.measure` has the cost of every part of a micro-batch; here they are strung together for a
method, k, a schedule and what is offloaded, and the live bytes are followed to their peak. A steady state is
meant: the optimizer's state exists, gradients are None when an optimizer step begins.

Not counted: CUDA's context, allocator rounding and fragmentation (`RESERVE` allows for them).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from lopt.planning.measure import Parts, Segment, measure
from lopt.planning.optimizer_step import OPTIMIZERS, follow_offload, parts_of, state_bytes, temporary_bytes
from lopt.planning.run import Bytes, Run, Setting
from lopt.planning.sizes import BlockSizes, Method, Sizes
from lopt.validation import check, check_choice

RESERVE = 2**30
"""Bytes of a GPU that are left for CUDA's context and fragmentation."""
TFLOPS, BANDWIDTH = 100.0, 25.0
"""Defaults of what a GPU reaches in training, and of GB/s from host to GPU and as much back."""
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
        turns: bytes in and FLOPs by block.
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

    @property
    def total(self) -> int:
        """Peak bytes on the device."""
        return self.peak.total

    def seconds(self, tflops: float, bandwidth: float) -> float:
        """Return the time of one optimizer step at `tflops` 10^12/s and `bandwidth` 10^9 bytes/s each way.

        Of what a block needs, as much hides behind its micro-batches as may be prefetched.
        """
        slower = BLOCK_MAJOR_TIME if self.setting.schedule == "block_major" else 1.0
        total = 0.0
        for bytes_in, flops in self.turns:
            works = slower * flops / (tflops * 1e12)
            hidden = min(self.prefetch, works * bandwidth * 1e9)
            total += works + max(0.0, bytes_in - hidden) / (bandwidth * 1e9)
        return total

    def hidden_from(self, step_tokens: int, tflops: float, bandwidth: float) -> float:
        """Return the tokens per step from which on copies can hide behind compute; infinity if never."""
        growing = self.flops / (tflops * 1e12) - self.bus_tokens / (bandwidth * 1e9)
        fixed = (self.bus - self.bus_tokens) / (bandwidth * 1e9)
        return step_tokens * fixed / growing if growing > 0 else math.inf


@dataclass
class _Trace:
    """Follows live bytes through segments; `peak` is their largest sum, by part."""

    base: Bytes
    stash: int = 0
    gradients: int = 0
    activations: int = 0
    flops: float = 0.0
    peak: Bytes = field(init=False)

    def __post_init__(self) -> None:
        self.peak = self.base

    def run(self, segment: Segment, what: str, freed: int = 0) -> None:
        """Run a segment, at whose end `freed` bytes go beside what was measured."""
        top = what in ("head", "loss")
        self._see(
            gradients=self.gradients + segment.rise_gradients,
            activations=self.activations + (0 if top else segment.rise),
            head_and_loss=segment.rise if top else 0,
        )
        self.activations += segment.activations - freed
        self.gradients += segment.gradients
        self.flops += segment.flops

    def run_block(self, segments: dict[tuple[str, str], Segment], block: BlockSizes, casts: int) -> None:
        """Run one micro-batch through one block, forward and backward.

        Args:
            casts: bytes of autocast's copies of weights that go when the block is done, beside those that
                were measured.
        """
        count = len(block.layers)
        order = ["forward0", *["forward"] * (count - 1), "head", "loss"]
        order += [*["backward"] * (count - 1), "backward0", "embedding", "end"]
        end = "end" if block.place in ("first", "middle") else "head"
        for what in order:
            segment = segments.get((block.place, what))
            if segment is not None:
                self.run(segment, what, freed=casts if what == end else 0)

    def step(self, temporaries: int) -> None:
        """Run the optimizer's step, when all gradients are there, with so many bytes of its own."""
        self._see(gradients=self.gradients, optimizer=self.base.optimizer + temporaries)

    def _see(self, **parts: int) -> None:
        self.peak = max(self.peak, replace(self.base, stash=self.stash, **parts), key=_total)


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
        return Sizes.of(self.run.config, self.run.dtype)

    def plan(self, setting: Setting, prefetch: int | None = None) -> Plan:
        """Return bytes, FLOPs and bus traffic of the run in `setting`; `prefetch` in place of the run's.

        Raises:
            ValueError: k is more than the layers; a combination that does not exist.
        """
        block_major, offload = setting.schedule == "block_major", setting.offload
        check(offload == "none" or block_major, "offload", offload, "none unless `schedule` is block_major")
        cut = setting.method == "lopt" and setting.num_blocks > 1
        check(
            cut or not block_major,
            "schedule",
            setting.schedule,
            "eager unless `method` is lopt and `num_blocks` >= 2",
        )
        run, prefetch = self.run, self.run.prefetch if prefetch is None else prefetch
        blocks = self.sizes.blocks(setting.method, setting.num_blocks, run.frozen_blocks if cut else 0)
        parts = self._measured(setting)
        heads, trained = sum(b.head_weights for b in blocks), sum(b.weights for b in blocks if b.learns)
        state = state_bytes(run, trained, heads)
        model = sum(b.weights for b in blocks) * run.dtype.itemsize
        weights_offloaded = offload == "block"
        stash = run.accumulation * parts.boundary * weights_offloaded
        flops = [self._flops(setting, parts, block) for block in blocks]
        bytes_in = [self._bytes_in(setting, block) for block in blocks]
        resident = Bytes(weights=model + 4 * heads + self.sizes.buffers, optimizer=state)
        if offload != "none":
            peak = self._offloaded(setting, parts, blocks, prefetch)
        elif block_major:
            traces = [self._block_trace(setting, parts, block, resident) for block in blocks]
            for trace, block in zip(traces, blocks, strict=True):
                trace.step(self._temporaries([block]))
            peak = max((trace.peak for trace in traces), key=_total)
        else:
            peak = self._eager(setting, parts, blocks, resident)
        return Plan(
            setting=setting,
            peak=peak,
            host=state * (offload != "none") + (model + 4 * heads) * weights_offloaded + stash,
            checkpoint=model + 4 * heads + state,
            model=model,
            flops=sum(flops),
            bus=round(sum(bytes_in)) + (len(blocks) - 1) * stash,
            bus_tokens=(len(blocks) - 1) * stash,
            turns=list(zip(bytes_in, flops, strict=True)),
            prefetch=prefetch,
        )

    def _measured(self, setting: Setting) -> Parts:
        run = self.run
        method: Method = "e2e" if setting.num_blocks == 1 else setting.method
        key: tuple[Any, ...] = (method, setting.checkpointing, run.batch, run.tokens, run.dtype, run.autocast)
        key += (run.device, *((run.frozen_blocks > 0, run.aux_loss) if method == "lopt" else ()))
        if key not in self._parts:
            self._parts[key] = measure(run, method, setting.checkpointing)
        return self._parts[key]

    # -- micro-batches ---------------------------------------------------------------------------

    def _eager(self, setting: Setting, parts: Parts, blocks: list[BlockSizes], resident: Bytes) -> Bytes:
        trace = _Trace(resident)
        for segments in self._micro_batches(trace, parts):
            trace.run(segments[blocks[0].place, "start"], "start")
            for block in blocks:
                trace.run_block(segments, block, _casts(setting, parts, block))
        trace.step(self._temporaries(blocks))
        return trace.peak

    def _block_trace(self, setting: Setting, parts: Parts, block: BlockSizes, base: Bytes) -> _Trace:
        """Trace one block of the block-major schedule: all micro-batches, and its gradients alone."""
        stashed = self.run.accumulation - (block.place == "first")
        trace = _Trace(base, stash=stashed * parts.boundary)
        for segments in self._micro_batches(trace, parts):
            trace.run(segments["first", "start"], "start")
            trace.run_block(segments, block, _casts(setting, parts, block))
        return trace

    def _micro_batches(self, trace: _Trace, parts: Parts) -> Iterator[dict[tuple[str, str], Segment]]:
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
        trace = _Trace(Bytes())
        trace.run_block(parts.fresh, block, 0)
        flops = trace.flops
        if every > 1 and block.place in ("first", "middle"):
            forward = parts.fresh[block.place, "forward"].flops * len(block.layers)
            flops = (flops + (every - 1) * forward) / every
        return flops * self.run.accumulation

    # -- offloading ------------------------------------------------------------------------------

    def _offloaded(self, setting: Setting, parts: Parts, blocks: list[BlockSizes], prefetch: int) -> Bytes:
        """The peak where the device holds one block (all weights if only the optimizer is offloaded), what
        is on its way, and in the optimizer's turn the state of one part after the other."""
        run, weights_offloaded = self.run, setting.offload == "block"
        turns = follow_offload(run, blocks, prefetch, weights_offloaded)
        best = Bytes()
        for block, (transfers, steps) in zip(blocks, turns, strict=True):
            held = [block] if weights_offloaded else blocks
            weights = sum(b.weights * run.dtype.itemsize + 4 * b.head_weights for b in held)
            base = Bytes(weights=weights + self.sizes.buffers)
            trace = self._block_trace(setting, parts, block, base)
            stash = parts.boundary * (block.place != "first") if weights_offloaded else trace.stash
            moments = [replace(trace.peak, stash=stash, transfers=transfers)]
            for step in steps:
                moments.append(replace(step, weights=base.weights, stash=stash * (not weights_offloaded)))
            best = max(best, *moments, key=_total)
        return best

    def _bytes_in(self, setting: Setting, block: BlockSizes) -> float:
        """What comes to the device for a block per optimizer step; on average, if it rests at times."""
        if setting.offload == "none":
            return 0.0
        learning = 1 / self.run.local_every if block.place in ("first", "middle") else 1.0
        state = state_bytes(self.run, block.weights, block.head_weights) if block.learns else 0
        weights = block.weights * self.run.dtype.itemsize + 4 * block.head_weights
        return learning * state + weights * (setting.offload == "block")


def _casts(setting: Setting, parts: Parts, block: BlockSizes) -> int:
    """Bytes of autocast's copies of weights, beside those measured, that go when the block is done.

    They live until a local backward or the whole forward ends. A last block's are also held by its graph,
    unless it is recomputed.
    """
    local = block.place in ("first", "middle")
    if not block.learns or not (local or setting.checkpointing):
        return 0
    return (len(block.layers) - parts.layers.get(block.place, 1)) * parts.casts


def _total(parts: Bytes) -> int:
    return parts.total
