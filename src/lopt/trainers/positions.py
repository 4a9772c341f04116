"""Rows that are longer than a model's table of positions are found before training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset

from lopt.architectures import check_positions, position_limit

FIX = "set `max_length` to {limit} or less, or leave such rows out"


def check_rows(trainer: Any) -> None:
    """Refuse rows, of training and evaluation, for which the model has no positions.

    Raises:
        ValueError: one is longer than the model's table, or could be where that is not known before.
    """
    if position_limit(trainer.model) is None:
        return
    most = getattr(trainer.args, "max_length", None)
    evaluation = trainer.eval_dataset
    for rows in (
        trainer.train_dataset,
        *(evaluation.values() if isinstance(evaluation, dict) else [evaluation]),
    ):
        new = getattr(trainer.args, "max_completion_length", None)
        if new is not None:
            longest = max((trainer.prompt_tokens(row) for row in _some(rows)), default=0) + new
            fix = (
                "lower `max_completion_length`, or leave out long prompts: together they have {limit} at most"
            )
            check_positions(trainer.model, longest, fix)
        elif isinstance(rows, Dataset):
            longest = max(map(_longest, rows.with_format("arrow").iter(1000)), default=0)
            check_positions(trainer.model, longest if most is None else min(longest, most), FIX)
        elif rows is not None and most is not None:  # a stream, whose rows are cut at `max_length`
            check_positions(trainer.model, most, FIX)


def _some(rows: Any) -> Iterator[dict[str, Any]]:
    """Yield rows: all, or of a stream the first."""
    return iter(rows.take(1000) if isinstance(rows, IterableDataset) else rows or [])


def _longest(table: pa.Table) -> int:
    """Return the tokens of the longest row of a table, in the columns that TRL makes."""

    def lengths(column: str) -> Any:
        return pc.list_value_length(table[column])

    if "seq_lengths" in table.column_names:
        made = pc.list_flatten(table["seq_lengths"])
    elif "input_ids" in table.column_names:
        made = lengths("input_ids")
    elif "prompt_ids" in table.column_names:
        made = pc.add(
            lengths("prompt_ids"), pc.max_element_wise(lengths("chosen_ids"), lengths("rejected_ids"))
        )
    else:
        return 0
    return pc.max(made).as_py() or 0
