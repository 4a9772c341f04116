"""What a batch is made of: its tokens, its width, the rows that it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor

IGNORED = -100
"""The label of a token that is not trained on."""

_SHOWN = 60  # characters of a row's text in a message


def count_tokens(batches: Iterable[Any], device: torch.device) -> Tensor | None:
    """Return the real tokens of each batch, (M,) on `device`, of rows that have a label. Waits for nothing.

    None if there is no batch, or one without token rows.
    """
    counts = [_real_tokens(batch) for batch in batches]
    known = [torch.as_tensor(count, device=device) for count in counts if count is not None]
    return torch.stack(known) if known and len(known) == len(counts) else None


def _real_tokens(batch: Any) -> Tensor | int | None:
    if not isinstance(batch, Mapping):
        return None
    if "attention_mask" in batch:
        mask, labels = batch["attention_mask"], batch.get("labels")
        counted = mask if labels is None else mask * (labels != IGNORED).any(-1, keepdim=True)
        return counted.sum()
    return batch["input_ids"].numel() if "input_ids" in batch else None


def padded_tokens(batch: Any) -> int:
    """Return the number of tokens of a micro-batch with its padding; 0 if it has no token rows."""
    return batch["input_ids"].numel() if isinstance(batch, Mapping) and "input_ids" in batch else 0


def width(batch: Any) -> int | None:
    """Return the number of tokens of a batch's rows with their padding; None if it has no token rows."""
    if not isinstance(batch, Mapping):
        return None
    names = ("input_ids",) if "input_ids" in batch else ("prompt_ids", "completion_ids")
    return sum(batch[name].shape[1] for name in names if name in batch) or None


def token_shape(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Return (B, T) of a batch, of prompts with their completions where it has those."""
    rows = batch["input_ids" if "input_ids" in batch else "prompt_ids"].shape[0]
    tokens = width(batch)
    assert tokens is not None, "it has one of these"
    return rows, tokens


def describe_rows(dataset: Any, tokenizer: Any, batches: Iterable[Any]) -> str:
    """Return where the rows of `batches` are in `dataset`, if it is indexed, and how the first one begins."""
    rows = [ids for batch in batches for ids in _token_rows(batch)]
    if not rows:
        return ""
    numbers = row_numbers(dataset, rows)
    text = tokenizer.decode(rows[0], skip_special_tokens=True)[:_SHOWN]
    if not numbers:
        return f"the first row starts with {text!r}"
    listed = ", ".join(map(str, numbers[:16])) + (" and more" if len(numbers) > 16 else "")
    return f"rows {listed} of the {len(dataset):,} that were prepared, from 0; the first starts with {text!r}"


def row_numbers(dataset: Any, rows: Iterable[list[int]]) -> list[int]:
    """Return where `rows` are in a tokenized data set, from 0; empty for a stream and for packed rows."""
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return []
    wanted = {tuple(row) for row in rows}
    lengths = {len(row) for row in wanted}
    found, start = [], 0
    for table in dataset.with_format("arrow").iter(1000):
        column = table["input_ids"]
        for place, length in enumerate(pc.list_value_length(column).to_pylist()):
            if length in lengths and tuple(column[place].as_py()) in wanted:
                found.append(start + place)
        start += len(column)
    return found


def _token_rows(batch: Any) -> list[list[int]]:
    """Return the rows of a batch without their padding."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        return []
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    if mask is None or mask.shape != ids.shape:
        return ids.tolist()
    return [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
