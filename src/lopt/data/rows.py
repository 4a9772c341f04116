"""Rows to examples: what a row's columns may hold, and the conversion of a whole data set.

Everything a row must not hold is a ValueError that names the row and the column. Functions on the value of
one column name the column; `convert_rows` adds the row.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset, LargeList, List

from lopt.data.cells import JsonFloat, encoded

SOURCE = "`train_file`/`dataset_name`"
"""Arguments that name rows, for messages."""

TIMES = date | time | timedelta
"""Types of Parquet for which the model sees text; a datetime is a date."""

Example = dict[str, Any]
Convert = Callable[[dict[str, Any]], Example | None]
"""From a row to an example, or None to drop the row."""


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Return the names of the columns; those of the first row if a stream does not state them."""
    return list(rows.column_names or next(iter(rows), {}))


def convert_rows(
    rows: Dataset | IterableDataset,
    columns: list[str],
    convert: Convert,
    features: Features,
    description: str,
    named: Collection[str] = (),
) -> Dataset | IterableDataset:
    """Return the examples that `convert` makes of the `columns` of `rows`, with the columns `features`.

    A stream is converted when its rows are needed.

    Args:
        columns: Those that `convert` is given, where there are such.
        named: Columns of which it gets what was meant where Arrow has something else: a class by its name, a
            nested value without the None that stands for a key that another row has.

    Raises:
        ValueError: from `convert`, with the row's number (from 0). The number is a row's place in the data
            set, or in the order of the stream; since that is not the order of the file, the message then
            quotes the beginning of the row.
    """
    streamed = isinstance(rows, IterableDataset)
    columns = [name for name in columns if name in column_names(rows)]
    found = rows.features or {}
    classes = {name: found[name] for name in named if isinstance(found.get(name), ClassLabel)}
    merged = [name for name in named if isinstance(found.get(name), dict | list | List | LargeList)]
    options: dict[str, Any] = dict(
        batched=True,
        with_indices=True,
        fn_kwargs=dict(convert=convert, features=features, classes=classes, merged=merged, streamed=streamed),
        remove_columns=columns,
        features=features,  # not inferred: a batch with every row dropped would give columns of type null
    )
    if not streamed:
        # The cache is keyed by the function's name, so it would outlive a change of templates.
        options |= {"load_from_cache_file": False, "desc": description}
    return rows.select_columns(columns).map(_convert_batch, **options)


def _convert_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    *,
    convert: Convert,
    features: Features,
    classes: Mapping[str, ClassLabel],
    merged: Collection[str],
    streamed: bool,
) -> dict[str, list[Any]]:
    made: dict[str, list[Any]] = {name: [] for name in features}
    for position, index in enumerate(indices):
        row = {name: values[position] for name, values in batch.items()}
        row |= {name: without_none(row[name]) for name in merged}
        row |= {name: kind.int2str(row[name]) for name, kind in classes.items() if row[name] is not None}
        try:
            example = convert(row)
        except ValueError as error:
            quoted = f"; in the order of the stream, it starts with {repr(row)[:100]}" if streamed else ""
            raise ValueError(f"{SOURCE}: row {index} (from 0), {error}{quoted}") from error
        if example is not None:
            # The rows of a stream stay as they are.
            written = example if streamed else encoded(example, features)
            for name, values in made.items():
                values.append(written[name])
    return made


def without_none(value: Any) -> Any:
    """Return a nested value of lists and dicts without keys whose value is None."""
    if isinstance(value, Mapping):
        return {name: without_none(inner) for name, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


def prompt_text(value: Any, column: str) -> str:
    """Return `value`, which must be text that is not blank, or a time."""
    if isinstance(value, TIMES):
        return str(value)
    if not isinstance(value, str):
        raise column_error(column, f"must be text, not {_kind(value)}")
    if not value.strip():
        raise column_error(column, "is empty: fill it or remove the row")
    return value


def answer_text(value: Any, column: str) -> str:
    """Return `value` as text: what a JSON file has, None as "", times as in 2024-05-01 10:00:00.

    A float of Arrow is written without a decimal point if it is whole, since Arrow may store 2 as 2.0.

    Raises:
        ValueError: `value` is none of these.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, JsonFloat):
        return value.text
    if not isinstance(value, int | float | Decimal | TIMES):
        raise column_error(column, f"must be text or a number, not {_kind(value)}")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def _kind(value: Any) -> str:
    return "float" if isinstance(value, float) else type(value).__name__


def column_error(column: str, problem: str) -> ValueError:
    """Return the error to raise for a row whose `column` is not as it should be."""
    return ValueError(f"column `{column}`, {problem}")
