"""Speed and peak memory of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lopt.instruments.memory import MemoryPeak, MemoryTracker

COUNTED_STEPS = 2  # in the second one the optimizer's state is there


class Throughput:
    """Time, tokens and peak memory of optimizer steps.

    Evaluation, checkpoints and data loading between steps do not count as time. On a GPU the
    allocator is asked for the peak. On a CPU the live bytes of tensors are counted, which costs
    time, so only in the first two optimizer steps, there only in two micro-batches, and in any micro-batch
    that is larger than all before it.

    Args:
        device: where the model is trained.
        in_stages: micro-batches of an optimizer step leave hidden states and weights on their way to each
            other, so all of them are counted together.

    Attributes:
        peak: the largest peak of the run, by category (None on a GPU).
    """

    def __init__(self, device: torch.device, in_stages: bool = False) -> None:
        self.peak: MemoryPeak | None = None
        self._on_gpu = device.type == "cuda"
        self._started = 0.0
        self._in_stages = in_stages
        self._tracker: MemoryTracker | None = None  # of this optimizer step
        self._step, self._passed, self._largest = 0, 0, 0
        self._reset()

    def _reset(self) -> None:
        self._tokens, self._seconds, self._steps = 0, 0.0, 0

    def begin_step(self) -> None:
        """Begin to time an optimizer step, before its first micro-batch."""
        self._started = time.perf_counter()
        self._step, self._passed, self._tracker = self._step + 1, 0, None

    def end_step(self) -> None:
        """End an optimizer step."""
        if self._started:  # a resumed run may repeat what comes after a step, without the step
            self._seconds += time.perf_counter() - self._started
            self._steps += 1

    def count(self, tokens: int) -> None:
        """Add `tokens` real tokens that are trained on."""
        self._tokens += tokens

    @contextmanager
    def micro_batch(self, size: int, model: nn.Module, optimizer: Any) -> Iterator[None]:
        """Measure forward and backward inside, of `size` tokens with their padding (0 if not known)."""
        self._passed += 1
        first = self._step <= COUNTED_STEPS and (self._passed <= 2 or self._in_stages)
        if self._on_gpu or not (first or size > self._largest):
            yield
            return
        self._largest = max(self._largest, size)
        if self._tracker is None:
            self._tracker = MemoryTracker(model, optimizer=optimizer, goes_on=self._in_stages)
        with self._tracker as tracker:
            yield
        if self.peak is None or tracker.peak.total > self.peak.total:
            self.peak = tracker.peak

    def report(self) -> dict[str, float]:
        """Return the speed of the optimizer steps since the last report, and the run's peak so far."""
        seconds, steps = max(self._seconds, 1e-9), max(self._steps, 1)
        peak = torch.cuda.max_memory_allocated() if self.peak is None else self.peak.total
        figures = {
            "tokens_per_second": self._tokens / seconds,
            "seconds_per_step": seconds / steps,
            "peak_memory_gib": peak / 2**30,
        }
        self._reset()
        return figures
