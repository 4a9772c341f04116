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
from typing import Literal

import torch
from transformers import PreTrainedConfig

from lopt.planning.measure import Method, Parts, Segment, Work, measure
from lopt.planning.shapes import Sizes, Stage
from lopt.planning.step import OPTIMIZERS, Optimizer, travel

RESERVE = 2**30
"""Bytes of a GPU that are left for CUDA's context and fragmentation."""
TFLOPS, BANDWIDTH = 100.0, 25.0
"""What a GPU is taken to reach in training, and GB/s from host to GPU and as much back, unless told."""
PREFETCH = 2 * 2**30
"""Bytes of weights and optimizer state that are on their way to or from the device."""
BLOCK_MAJOR_TIME = 1.05
"""Time of a block-major step beside an eager one (docs/memory.md)."""


@dataclass(frozen=True)
class Setting:
    """One row of a plan: how the method runs."""

    method: Method = "lopt"
    num_blocks: int = 2
    schedule: Literal["eager", "block_major"] = "eager"
    checkpointing: bool = False
    offload: Literal["none", "optimizer", "block"] = "none"

    def __str__(self) -> str:
        words = ["e2e" if self.method == "e2e" else f"k={self.num_blocks}"]
        if self.method == "frozen":
            words.append("frozen")
        if self.schedule == "block_major":
            words.append("block-major" if self.offload == "none" else f"offload {self.offload}")
        return ", ".join(words + ["checkpointed"] * self.checkpointing)


@dataclass(frozen=True)
class Run:
    """What all rows of a plan share: model, batch and number formats.

    Attributes:
        batch, tokens: B rows of T tokens in a micro-batch.
        accumulation: micro-batches per optimizer step.
        dtype: of the weights. autocast: whether forwards run under bfloat16 autocast.
        optimizer: a name of `OPTIMIZERS`.
        state_dtype: of the optimizer's state. masters: whether bfloat16 weights have float32 masters.
        local_every: earlier blocks learn in every N-th step.
        frozen_blocks: how many blocks of lopt, from the first on, do not learn.
        aux_loss: what the other earlier blocks of lopt learn.
        prefetch: bytes that offloading may hold on the device on their way.
        device: "cuda" or "cpu".
    """

    config: PreTrainedConfig
    batch: int = 4
    tokens: int = 1024
    accumulation: int = 8
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = True
    optimizer: str = "adamw_torch_fused"
    state_dtype: torch.dtype = torch.float32
    masters: bool = False
    local_every: int = 1
    frozen_blocks: int = 0
    aux_loss: Literal["recon", "next_token"] = "recon"
    prefetch: int = PREFETCH
    device: str = "cuda"

    @property
    def step_tokens(self) -> int:
        """Tokens per optimizer step, padding included."""
        return self.batch * self.tokens * self.accumulation

    @property
    def optimizer_sizes(self) -> Optimizer:
        """Of the optimizer."""
        foreach = self.device == "cuda"
        return Optimizer(self.optimizer, self.dtype, self.state_dtype, self.masters, foreach)


@dataclass(frozen=True)
class Bytes:
    """Bytes on the device at one moment, by what they hold."""

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0  # of the layers of the block at work
    head_and_loss: int = 0
    stash: int = 0  # boundaries of all micro-batches (block-major)
    transfers: int = 0  # what is on its way to or from the device (offload)

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(vars(self).values())


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
        turns: bytes in and FLOPs by block. prefetch: bytes that come in while another block works.
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
        """Of one optimizer step at `tflops` 10^12/s and `bandwidth` 10^9 bytes/s each way.

        Of what a block needs, as much hides behind its micro-batches as may be fetched ahead.
        """
        slower = BLOCK_MAJOR_TIME if self.setting.schedule == "block_major" else 1.0
        total = 0.0
        for bytes_in, flops in self.turns:
            works = slower * flops / (tflops * 1e12)
            hidden = min(self.prefetch, works * bandwidth * 1e9)
            total += works + max(0.0, bytes_in - hidden) / (bandwidth * 1e9)
        return total

    def hidden_from(self, step_tokens: int, tflops: float, bandwidth: float) -> float:
        """Tokens per optimizer step from which on copies can hide behind compute; inf if never."""
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
        """`freed`: bytes that go at its end, beside what was measured."""
        top = what in ("head", "loss")
        moment = replace(
            self.base,
            gradients=self.gradients + segment.rise_gradients,
            activations=self.activations + (0 if top else segment.rise),
            head_and_loss=segment.rise if top else 0,
            stash=self.stash,
        )
        self.peak = max(self.peak, moment, key=_total)
        self.activations += segment.activations - freed
        self.gradients += segment.gradients
        self.flops += segment.flops

    def step(self, temporaries: int) -> None:
        """The optimizer's turn: all gradients are there, and so many bytes of its own."""
        optimizer = self.base.optimizer + temporaries
        moment = replace(self.base, gradients=self.gradients, optimizer=optimizer, stash=self.stash)
        self.peak = max(self.peak, moment, key=_total)


class Planner:
    """Plans of one run in different settings; every part is measured once.

    Raises:
        ValueError: the optimizer is not known, the model cannot be measured.
    """

    def __init__(self, run: Run, other: Planner | None = None) -> None:
        """`other`: a planner of the same model, whose measurements are shared."""
        if run.optimizer not in OPTIMIZERS:
            raise ValueError(f"--optim {run.optimizer} cannot be planned: use one of {', '.join(OPTIMIZERS)}")
        self.run = run
        self._parts: dict[tuple[Method, Work], Parts] = other._parts if other is not None else {}

    @cached_property
    def sizes(self) -> Sizes:
        """Elements of the model's weights."""
        return Sizes.of(self.run.config, self.run.dtype)

    def plan(self, setting: Setting, prefetch: int | None = None) -> Plan:
        """Bytes, FLOPs and bus traffic of the run in `setting`; `prefetch` in place of the run's.

        Raises:
            ValueError: k is more than the layers; a combination that does not exist.
        """
        staged = setting.schedule == "block_major"
        if setting.offload != "none" and not staged:
            raise ValueError(f"--offload {setting.offload} goes with --schedule block_major only")
        if staged and (setting.method != "lopt" or setting.num_blocks == 1):
            raise ValueError("--schedule block_major needs --method lopt and --num_blocks 2 or more")
        prefetch = self.run.prefetch if prefetch is None else prefetch
        local = setting.method == "lopt" and setting.num_blocks > 1
        stages = self.sizes.stages(setting.method, setting.num_blocks, self.run.frozen_blocks if local else 0)
        parts = self._measured(setting)
        if not staged:
            peak = self._eager(setting, parts, stages)
        elif setting.offload == "none":
            traces = list(self._block_major(setting, parts, stages, self._resident(stages)))
            for trace, stage in zip(traces, stages, strict=True):
                trace.step(self._temporaries([stage]))
            peak = max((trace.peak for trace in traces), key=_total)
        else:
            peak = self._streamed(setting, parts, stages, prefetch)
        weights, heads = sum(s.weights for s in stages), sum(s.head for s in stages)
        trained = sum(s.weights for s in stages if s.learns)
        state = self.run.optimizer_sizes.state(trained, heads)
        model = weights * self.run.dtype.itemsize
        host = state * (setting.offload != "none") + (model + 4 * heads) * (setting.offload == "block")
        stash = self.run.accumulation * parts.boundary * (setting.offload == "block")
        flops = self._flops(setting, parts, stages)
        bytes_in = [self._bytes_in(setting, stage) for stage in stages]
        boundaries = (len(stages) - 1) * self.run.accumulation * parts.boundary * (setting.offload == "block")
        return Plan(
            setting=setting,
            peak=peak,
            host=host + stash,
            checkpoint=model + heads * 4 + state,
            model=model,
            flops=sum(flops),
            bus=round(sum(bytes_in)) + boundaries,
            bus_tokens=boundaries,
            turns=list(zip(bytes_in, flops, strict=True)),
            prefetch=prefetch,
        )

    # -- what there is ---------------------------------------------------------------------------

    def _measured(self, setting: Setting) -> Parts:
        run = self.run
        work = Work(run.batch, run.tokens, run.dtype, run.autocast, setting.checkpointing, run.device)
        method: Method = "e2e" if setting.num_blocks == 1 else setting.method
        if method == "lopt":
            work = replace(work, resting=run.frozen_blocks > 0, aux_loss=run.aux_loss)
        if (method, work) not in self._parts:
            self._parts[method, work] = measure(run.config, work, method)
        return self._parts[method, work]

    def _resident(self, stages: list[Stage]) -> Bytes:
        """Weights and optimizer state if all of them are on the device."""
        heads = sum(s.head for s in stages)
        trained = sum(s.weights for s in stages if s.learns)
        weights = sum(s.weights for s in stages) * self.run.dtype.itemsize
        return Bytes(
            weights=weights + heads * 4 + self.sizes.buffers,
            optimizer=self.run.optimizer_sizes.state(trained, heads),
        )

    # -- one micro-batch after the other ---------------------------------------------------------

    def _inputs(self) -> int:
        """Bytes of the inputs (ids, mask, labels) of all micro-batches but the one at work."""
        return (self.run.accumulation - 1) * 3 * 8 * self.run.batch * self.run.tokens

    def _eager(self, setting: Setting, parts: Parts, stages: list[Stage]) -> Bytes:
        trace = _Trace(self._resident(stages))
        for number in range(min(self.run.accumulation, 2)):  # a third is like the second
            segments = parts.again if number else parts.fresh
            trace.activations = self._inputs()
            trace.run(segments[stages[0].where, "start"], "start")
            for stage in stages:
                _through(trace, segments, parts, stage, setting.checkpointing)
        trace.step(self._temporaries(stages))
        return trace.peak

    def _block_major(
        self, setting: Setting, parts: Parts, stages: list[Stage], base: Bytes
    ) -> Iterator[_Trace]:
        """A trace for every block: all micro-batches go through it, only its gradients exist."""
        count = self.run.accumulation
        for stage in stages:
            trace = _Trace(base, stash=(count - (stage.where == "first")) * parts.boundary)
            for number in range(min(count, 2)):
                segments = parts.again if number else parts.fresh
                trace.activations = self._inputs()
                trace.run(segments["first", "start"], "start")
                _through(trace, segments, parts, stage, setting.checkpointing)
            yield trace

    def _temporaries(self, stages: list[Stage]) -> int:
        """What the step of the largest part adds to gradients and state that are all there."""
        optimizer = self.run.optimizer_sizes
        return max((optimizer.temporaries(part) for s in stages for part in optimizer.parts(s)), default=0)

    def _flops(self, setting: Setting, parts: Parts, stages: list[Stage]) -> list[float]:
        """Of every block per optimizer step; earlier blocks that rest only run forward."""
        every = self.run.local_every if setting.method == "lopt" else 1
        found = []
        for stage in stages:
            trace = _Trace(Bytes())
            _through(trace, parts.fresh, parts, stage, setting.checkpointing)
            rest = trace.flops
            if every > 1 and stage.where in ("first", "middle"):
                forward = parts.fresh[stage.where, "forward"].flops * len(stage.layers)
                rest = (trace.flops + (every - 1) * forward) / every
            found.append(rest * self.run.accumulation)
        return found

    # -- offloading ------------------------------------------------------------------------------

    def _streamed(self, setting: Setting, parts: Parts, stages: list[Stage], prefetch: int) -> Bytes:
        """The device holds one block at work (all weights if only the optimizer is offloaded), what is on
        its way, and in the optimizer's turn the state of one part after the other."""
        run, whole = self.run, setting.offload == "block"
        moments = travel(run.optimizer_sizes, stages, prefetch, weights=whole)
        everything = sum(stage.weights for stage in stages)
        heads = sum(stage.head for stage in stages)
        best = Bytes()
        for stage, (working, steps) in zip(stages, moments, strict=True):
            own, head = (stage.weights, stage.head) if whole else (everything, heads)
            base = Bytes(weights=own * run.dtype.itemsize + head * 4 + self.sizes.buffers)
            (trace,) = self._block_major(setting, parts, [stage], base)
            stash = parts.boundary * (stage.where != "first") if whole else trace.stash
            best = max(best, replace(trace.peak, stash=stash, transfers=working.transfers), key=_total)
            for step in steps:
                moment = replace(
                    base, stash=stash * (not whole), gradients=step.gradients or 0, optimizer=step.optimizer,
                    transfers=step.transfers,
                )  # fmt: skip
                best = max(best, moment, key=_total)
        return best

    def _bytes_in(self, setting: Setting, stage: Stage) -> float:
        """What comes to the device for a block per optimizer step; on average, if it rests at times."""
        if setting.offload == "none":
            return 0.0
        learning = 1 / self.run.local_every if stage.where in ("first", "middle") else 1.0
        weights = (stage.weights * self.run.dtype.itemsize + stage.head * 4) * (setting.offload == "block")
        state = self.run.optimizer_sizes.state(stage.weights, stage.head) if stage.learns else 0
        return learning * state + weights


def _total(parts: Bytes) -> int:
    return parts.total


def _through(
    trace: _Trace,
    segments: dict[tuple[str, str], Segment],
    parts: Parts,
    stage: Stage,
    checkpointing: bool,
) -> None:
    """One micro-batch through one block, forward and backward."""
    count = len(stage.layers)
    local = stage.where in ("first", "middle")
    # Casts of weights live until a local backward or the whole forward ends. A last block's are also held
    # by its graph, unless it is recomputed.
    surplus = (count - parts.layers.get(stage.where, 1)) * parts.casts if stage.learns else 0
    order = ["forward0", *["forward"] * (count - 1), "head", "loss"]
    order += [*["backward"] * (count - 1), "backward0", "embedding", "end"]
    for what in order:
        segment = segments.get((stage.where, what))
        if segment is None:
            continue
        last = what == "end" if local else what == "head" and checkpointing
        trace.run(segment, what, freed=surplus if last else 0)
