"""Supervised fine-tuning by LoPT: TRL's SFTTrainer with boundaries."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from lopt.data.batches import IGNORED
from lopt.data.cells import kept_as_cells
from lopt.data.notes import Notes
from lopt.data.rows import column_names
from lopt.trainers.checks import check_workers
from lopt.trainers.mixin import LoPTMixin
from lopt.trainers.rows import (
    as_tokens,
    one_beginning,
    only_marked,
    say_what_is_lost,
    say_where_rows_do_not_end,
)
from lopt.trainers.turns import by_turns, check_turns, has_marks

logger = logging.getLogger(__name__)

LOOK_AHEAD = 10_000
"""Rows at the start of a stream among which one must have a label."""


@dataclass(frozen=True)
class RowCounts:
    """What happened to the rows of a data set when they were prepared for training.

    Attributes:
        rows: Rows given.
        dropped: Rows left out, since their prompt alone reaches `max_length` (with `drop_long_rows`:
            since they are longer).
        cut: Rows kept whose end lies beyond `max_length` and is not trained on.
    """

    rows: int
    dropped: int
    cut: int


class LoPTSFTTrainer(LoPTMixin, SFTTrainer):
    """`trl.SFTTrainer` with one argument more, `lopt_config`.

    Rows that `max_length` leaves without a trainable token (the prompt alone is too long) are
    counted and reported, never trained on; nothing left is a ValueError. A stream
    (`datasets.IterableDataset`) is trained on pass after pass until `max_steps`, each in the same
    order; what is lost of it is said once, without a count.

    Attributes:
        row_counts: What was reported, by name of the data set; streams have no entry.
        tokenized_rows: All of them as tokens, in the same way.
        whole_rows: Those of them that `drop_long_rows` leaves, before `max_length` cuts any.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.row_counts: dict[str, RowCounts] = {}
        self.whole_rows: dict[str, Dataset] = {}
        self.tokenized_rows: dict[str, Dataset] = {}
        config = next((value for value in (*args, *kwargs.values()) if isinstance(value, SFTConfig)), None)
        tokenizer = kwargs.get("processing_class")
        self._by_turns = False
        if config is not None and config.assistant_only_loss and getattr(tokenizer, "chat_template", None):
            check_turns(tokenizer)  # of a tokenizer without a template, TRL says what is missing
            self._by_turns = not has_marks(tokenizer)
            config.assistant_only_loss = not self._by_turns  # or TRL would ask the template for marks
        try:
            super().__init__(*args, **kwargs)
        finally:
            if config is not None:
                config.assistant_only_loss |= self._by_turns
        check_workers(self.args, isinstance(self.train_dataset, IterableDataset))
        for name, rows in self.tokenized_rows.items():
            config = getattr(self.model, "generation_config", None)
            say_where_rows_do_not_end(rows, self.processing_class, config, name)

    def drop_repeated_rows(self, batches: list[Any]) -> bool:
        """Remove rows that only fill up an epoch's last batch; a rank without any rows left trains on none.

        Rows of a packed batch are one sequence and cannot be separated: a few of them count twice.
        """
        state = self.accelerator.gradient_state
        rows = self.args.per_device_train_batch_size
        if self.args.world_size == 1 or not batches or not state.end_of_dataloader:
            return False
        # accelerate's own number (`remainder`) is missing in an epoch that a resumed run enters midway.
        sized = not isinstance(self.train_dataset, IterableDataset) and not self.args.dataloader_drop_last
        remainder = len(self.train_dataset) % (rows * self.args.world_size) if sized else 0
        if not remainder:
            return False
        last = batches[-1]
        if last["input_ids"].shape[0] != rows:
            return False
        real = min(max(remainder - self.args.process_index * rows, 0), rows)
        if real == rows:
            return True
        # One row stays, so that this rank takes part in every collective operation.
        kept = {k: v[: max(real, 1)] if isinstance(v, Tensor) else v for k, v in last.items()}
        if not real:
            kept["labels"] = torch.full_like(kept["labels"], IGNORED)
        batches[-1] = kept
        return True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """Return all micro-batches of one optimizer step.

        Raises:
            ValueError: none of them has a label, so that only decay and local losses would move weights.
        """
        batches, items = super().get_batch_samples(*args, **kwargs)
        if batches and items is not None and not int(items):
            raise ValueError(
                f"step {self.state.global_step + 1}: no token of its rows has a label, so there is nothing "
                "to learn; stopped before the optimizer step. Look at the data with `lopt data preview`"
            )
        return batches, items

    def get_train_dataloader(self) -> Any:
        """Return the loader of training rows, which repeats a stream without end.

        So a run is one epoch: at the end of a stream, Trainer would carry the gradient of an incomplete step
        over, and a resumed run would not find its place again.
        """
        rows = self.train_dataset
        if isinstance(rows, IterableDataset):
            self.train_dataset = rows.repeat(None)
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = rows

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any
    ) -> Any:
        def prepare(rows: Any, packing: bool = False, **changes: Any) -> Any:
            changed = copy.copy(args)
            vars(changed).update(changes)
            return super(LoPTSFTTrainer, self)._prepare_dataset(
                rows, processing_class, changed, packing, *rest
            )

        def tokenized(rows: Any) -> Any:
            if self._by_turns and "input_ids" not in column_names(rows):
                rows = by_turns(rows, processing_class, name)
            made = only_marked(prepare(kept_as_cells(rows), max_length=None))
            return one_beginning(as_tokens(made), processing_class, name)

        name = rest[-1] if rest else "train"
        if "input_ids" not in column_names(dataset):
            say_what_is_lost(dataset, processing_class, self.chat_template, name)
        limit = args.max_length if getattr(args, "drop_long_rows", False) else None
        if isinstance(dataset, IterableDataset):
            dataset = tokenized(dataset)
            if args.max_length is not None:
                dataset = dataset.filter(_Fitting(args.max_length, limit is not None, Notes(streamed=True)))
            if next(iter(prepare(dataset.take(LOOK_AHEAD))), None) is None:
                raise ValueError(_nothing_left(name, f"first {LOOK_AHEAD:,}", args.max_length))
            return prepare(prepare(dataset), packing=True) if packing else prepare(dataset)
        # TRL leaves out what is done. Tokens and labels first, to see what cutting takes away; packing
        # last, since it would hide rows without a label among others.
        every = tokenized(dataset)
        self.tokenized_rows[name] = every
        whole = every if limit is None else _without_longer(every, limit, name)
        if packing and args.packing_strategy != "bfd":  # rows go on in the next sequence, none is cut
            return prepare(whole, packing=True).filter(_has_label)
        made = prepare(whole)
        longer = longer_rows(whole, args.max_length) if args.max_length is not None else []
        cut = len(prepare(longer)) if len(longer) else 0  # the others of them are dropped
        _report(RowCounts(len(whole), len(whole) - len(made), cut), args.max_length, name)
        self.whole_rows[name] = whole
        self.row_counts[name] = RowCounts(len(every), len(every) - len(made), cut)
        return prepare(made, packing=True) if packing else made


@dataclass(frozen=True)
class _Fitting:
    """Whether a tokenized row of a stream is kept; says when it has found the first that is too long."""

    max_length: int
    drop: bool
    notes: Notes

    def __call__(self, row: dict[str, Any]) -> bool:
        if len(row["input_ids"]) <= self.max_length:
            return True
        what = "left out" if self.drop else "cut there, or left out if their prompt alone reaches it"
        self.notes.add(f"longer than `max_length` {self.max_length}, {what}")
        return not self.drop


def longer_rows(whole: Dataset, max_length: int) -> Dataset:
    """Return those of the tokenized rows that have more than `max_length` tokens."""
    return whole.select(_positions(whole, max_length, fitting=False))


def _without_longer(whole: Dataset, max_length: int, name: str) -> Dataset:
    """Return the tokenized rows that fit; report how many do not."""
    kept = whole.select(_positions(whole, max_length, fitting=True))
    if not len(kept):
        raise ValueError(
            f"`drop_long_rows` leaves none of the {len(whole)} {name} rows: raise `max_length` {max_length}"
        )
    _warn(len(whole) - len(kept), len(whole), name, f"left out: longer than `max_length` {max_length}")
    return kept


def _positions(whole: Dataset, max_length: int, *, fitting: bool) -> list[int]:
    """Return the positions of the tokenized rows that fit into `max_length`, or of those that do not."""
    tables = whole.with_format("arrow").iter(1000)
    lengths = (n for table in tables for n in pc.list_value_length(table["input_ids"]).to_pylist())
    return [position for position, length in enumerate(lengths) if (length <= max_length) == fitting]


def _has_label(row: dict[str, Any]) -> bool:
    return any(label != IGNORED for label in row["labels"])


def _nothing_left(name: str, rows: str, max_length: int | None) -> str:
    return (
        f"no trainable token is left in the {name} rows: the prompt of each of the {rows} rows alone "
        f"reaches `max_length` {max_length}. Raise it or shorten the prompts"
    )


def _report(counts: RowCounts, max_length: int | None, name: str) -> None:
    if counts.dropped == counts.rows:
        raise ValueError(_nothing_left(name, str(counts.rows), max_length))
    alone = f"left out: their prompt alone reaches `max_length` {max_length}"
    _warn(counts.dropped, counts.rows, name, alone)
    _warn(counts.cut, counts.rows, name, f"cut at `max_length` {max_length}, their end is not trained on")


def _warn(count: int, rows: int, name: str, what: str) -> None:
    if count:
        logger.warning("%d of %d %s rows are %s", count, rows, name, what)
