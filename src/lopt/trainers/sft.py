"""Supervised fine-tuning by LoPT: TRL's SFTTrainer with boundaries."""

from __future__ import annotations

import logging
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer

from lopt.trainers.mixin import LoPTMixin

logger = logging.getLogger(__name__)


class LoPTSFTTrainer(LoPTMixin, SFTTrainer):
    """`trl.SFTTrainer` and one argument more, `lopt_config`.

    Rows that `max_length` leaves without a trainable token (the prompt alone is too long) are
    counted and reported, never trained on; nothing left is a ValueError.
    """

    def drop_repeated_rows(self, batches: list[Any]) -> bool:
        """Leave out what only fills up an epoch's last batch; a rank left with nothing trains on nothing.

        Rows of a packed batch lie in one line and cannot be told apart: there a few count twice.
        """
        state = self.accelerator.gradient_state
        if self.args.world_size == 1 or not batches or not state.end_of_dataloader or state.remainder <= 0:
            return False
        rows = self.args.per_device_train_batch_size
        last = batches[-1]
        if last["input_ids"].shape[0] != rows:
            return False
        real = min(max(state.remainder - self.args.process_index * rows, 0), rows)
        if real == rows:
            return True
        # One row stays, so that this rank takes part in every collective operation.
        kept = {k: v[: max(real, 1)] if isinstance(v, Tensor) else v for k, v in last.items()}
        if not real:
            kept["labels"] = torch.full_like(kept["labels"], -100)
        batches[-1] = kept
        return True

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any
    ) -> Any:
        # Without packing first: it is there that TRL drops rows without a label, and packing
        # would hide them among others.
        prepared = super()._prepare_dataset(dataset, processing_class, args, False, *rest)
        if isinstance(prepared, Dataset) and not self._skip_prepare_dataset:
            _report_dropped(len(dataset), prepared, args.max_length, rest[-1] if rest else "train")
        return (
            super()._prepare_dataset(prepared, processing_class, args, True, *rest) if packing else prepared
        )


def _report_dropped(rows: int, prepared: Dataset, max_length: int, name: str) -> None:
    dropped = rows - len(prepared)
    if not len(prepared):
        raise ValueError(
            f"no trainable token is left in the {name} rows: the prompt of each of the {rows} rows alone "
            f"reaches --max_length {max_length}. Raise it or shorten the prompts"
        )
    if dropped:
        logger.warning(
            "%d of %d %s rows are left out: their prompt alone reaches --max_length %s",
            dropped,
            rows,
            name,
            max_length,
        )
