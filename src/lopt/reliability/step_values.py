"""What the micro-batches of an optimizer step measure, kept on the device until all of it is looked at.

A look waits for the device. Once per optimizer step it costs nothing that shows; once per micro-batch the
device would run dry before each.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Key = tuple[str, int]
"""What was measured, and the index of the block (from 0) where it was."""


@dataclass
class MicroBatch:
    """A micro-batch and what was measured in it.

    Attributes:
        number: From 1, in its optimizer step.
        share: The part of the optimizer step that it counts for; of all ranks once it was looked at.
        own: This rank's values, each (), on the device.
        inputs: The micro-batch, for messages.
        values: Their means over ranks by shares, once they were looked at.
    """

    number: int
    share: float
    own: dict[Key, Tensor]
    inputs: Any
    values: dict[Key, float] = field(default_factory=dict)

    def is_finite_here(self, key: Key) -> bool:
        """Return whether this rank's own value is finite."""
        return bool(self.own[key].isfinite())


class StepValues:
    """The micro-batches that were not looked at yet."""

    def __init__(self) -> None:
        self._kept: list[MicroBatch] = []

    def add(self, micro_batch: MicroBatch) -> None:
        """Keep what was measured in a micro-batch; nothing is looked at."""
        self._kept.append(micro_batch)

    def take(self, accelerator: Any) -> list[MicroBatch]:
        """Look at everything that was kept, in one copy and one reduction; all ranks must call this together.

        Args:
            accelerator: Reduces over ranks.
        """
        kept, self._kept = self._kept, []
        own = [torch.stack([value.float() for value in batch.own.values()]) for batch in kept]
        if not own:
            return []
        ranks, shares = accelerator.num_processes, [batch.share for batch in kept]
        if ranks > 1:
            weighted = [values * share for values, share in zip(own, shares, strict=True)]
            parts = accelerator.reduce(torch.cat([*weighted, own[0].new_tensor(shares)]), "sum").tolist()
            numbers, shares = parts[: -len(kept)], parts[-len(kept) :]
        else:
            numbers = torch.cat(own).tolist()
        for batch, share in zip(kept, shares, strict=True):
            mine, numbers = numbers[: len(batch.own)], numbers[len(batch.own) :]
            batch.share = share
            batch.values = {
                key: x / share if ranks > 1 else x for key, x in zip(batch.own, mine, strict=True)
            }
        return kept
