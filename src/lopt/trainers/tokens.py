"""The real tokens of an optimizer step's micro-batches, by which each counts."""

from __future__ import annotations

from typing import Any

import torch

from lopt.data.batches import count_tokens


class StepTokens:
    """Counts the real tokens of a step's micro-batches all at once: each look at the device waits for it.

    Args:
        trainer: a trainer with `LoPTMixin`.

    Attributes:
        own: of each micro-batch on this rank; empty if there are no token rows.
        total: of all of them on all ranks.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self.own: list[int] = []
        self.total = 0

    def count(self, batches: list[Any]) -> None:
        """Count `batches`, the micro-batches of an optimizer step; all ranks must call this together."""
        self.own, self.total = [], 0
        counts = count_tokens(batches, self._trainer.args.device)
        if counts is not None:
            total = self._trainer.accelerator.reduce(counts.sum()[None], "sum")
            *self.own, self.total = torch.cat([counts, total]).tolist()

    def current(self) -> int | None:
        """Return those of the trainer's current micro-batch on this rank; None if they are not known."""
        return self.own[self._trainer.micro_batch - 1] if self.own else None

    def share(self, tokens: int | None) -> float:
        """Return the share of `tokens` tokens in the step's mean, times the ranks."""
        if tokens is None or not self.total:
            return 1 / self._trainer.current_gradient_accumulation_steps
        return tokens / self.total * self._trainer.args.world_size
