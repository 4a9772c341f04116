"""Read rows from files: JSON, JSONL, Parquet or CSV, distinguished by their suffix.

What a file says is what a row holds. JSON and CSV are read here, row by row, into columns that guess no type
(`lopt.data.cells`); Parquet has types of its own, and `datasets` reads it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, IterableDataset, NamedSplit, ReadInstruction
from datasets.exceptions import DatasetGenerationError, DatasetsError

from lopt.data.cells import JsonCell, feature_of
from lopt.data.csv_file import csv_rows
from lopt.data.hub import drop_media
from lopt.data.json_file import json_rows
from lopt.data.parquet_file import parquet_columns, parquet_rows
from lopt.data.places import BrokenFileError, Place, file_name, kind_of, place_of, problem, stamp
from lopt.messages import error_text

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

Choose = Callable[[list[str]], list[str]]
"""From the columns that there are to those that are read. It may name others, which a stream may come to."""

READERS: dict[str, Callable[[Place], Iterator[dict[str, Any]]]] = {"json": json_rows, "csv": csv_rows}
"""Kind of a text file -> what yields its rows."""

LOOK_AHEAD = 1_000
"""Rows at the start of a stream that tell which columns there are."""

_NO_ROWS = "has no rows: give at least one row"
_READING = 1  # part of a cache's key: another way to read asks for another number


def load_files(
    train_file: Paths, split: str, streaming: bool, choose: Choose | None = None
) -> Dataset | IterableDataset:
    """Load the rows of one or more files of one type, in that order.

    Args:
        split: `train`, or a slice of it such as `train[:10%]`.
        streaming: Return a stream, and do not read the files in search of faults.
        choose: Says which columns are needed; all by default.

    Raises:
        ValueError: a file is missing, unreadable, broken, empty or of an unknown type.
    """
    paths = _check_paths(train_file)
    if not re.fullmatch(r"train(\[[^\[\]]*\])?", split):
        raise ValueError(
            f"`dataset_split` must be train, or a slice such as train[:10%], with `train_file` (got {split})"
        )
    kind = str(kind_of(paths[0]))
    if kind == "parquet":
        rows = _parquet(paths, streaming, choose)
    else:
        rows = _stream(paths, kind, choose) if streaming else _table(paths, kind, choose)
    names = ", ".join(map(str, paths))
    if isinstance(rows, IterableDataset):
        if next(iter(rows), None) is None:
            raise ValueError(f"`train_file`: {names} {_NO_ROWS}")
        return rows
    part = _slice(rows, split)
    if not len(part):
        where = "" if split == "train" else f" in `dataset_split` {split}"
        raise ValueError(f"`train_file`: {names} has no rows{where}: give at least one row")
    return part


def _table(paths: list[Place], kind: str, choose: Choose | None) -> Dataset:
    """Return the rows of text files; what was read before, and has not changed, comes from the cache."""
    stamps = tuple(map(stamp, paths))
    columns = _columns(paths, kind, stamps)
    chosen = choose(list(columns)) if choose is not None and columns else list(columns)
    wanted = [name for name in chosen if name in columns]
    features = Features({name: feature_of(columns[name]) for name in wanted})
    try:
        if not wanted:
            return Dataset.from_dict({})
        made = Dataset.from_generator(
            _rows,
            features=features,
            gen_kwargs={"paths": paths, "kind": kind, "names": tuple(wanted), "key": (_READING, stamps)},
        )
    except (DatasetsError, RecursionError) as error:
        names = ", ".join(map(str, paths))
        raise ValueError(
            f"`train_file`: cannot read {names}: {error_text(error.__cause__ or error)}: simplify its rows"
        ) from error
    assert isinstance(made, Dataset)
    return made


def _columns(paths: list[Place], kind: str, stamps: Any) -> dict[str, bool]:
    """Return the columns of all rows, and whether each holds nothing but text; cached as the rows are."""
    kwargs = {"paths": paths, "kind": kind, "key": (_READING, stamps)}
    try:
        features, split = Features({"columns": JsonCell()}), NamedSplit("columns")
        found: Any = Dataset.from_generator(_one_row, features, gen_kwargs=kwargs, split=split)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, ValueError):  # ours
            raise error.__cause__ from error
        raise
    return found[0]["columns"]


def _one_row(paths: list[Place], kind: str, key: Any) -> Iterator[dict[str, Any]]:
    columns: dict[str, bool] = {}
    for path in paths:
        for row in _named_rows(path, kind):
            for name, value in row.items():
                columns[name] = columns.get(name, True) and (value is None or isinstance(value, str))
    yield {"columns": columns}


def _stream(paths: list[Place], kind: str, choose: Choose | None) -> IterableDataset:
    """Return a stream of the rows of text files; its columns are those of the first rows of each file."""
    found: dict[str, None] = {}
    for path in paths:
        for row in itertools.islice(_named_rows(path, kind), LOOK_AHEAD):
            found |= dict.fromkeys(row)
    wanted = choose(list(found)) if choose is not None and found else list(found)
    # `datasets` takes the list for the shards of the stream.
    return IterableDataset.from_generator(
        _rows, gen_kwargs={"paths": paths, "kind": kind, "names": tuple(wanted), "key": ()}
    )


def _rows(paths: list[Place], kind: str, names: tuple[str, ...], key: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of files with the columns `names`; `key` says what else they depend on."""
    for path in paths:
        for row in _named_rows(path, kind):
            yield {name: row.get(name) for name in names}


def _named_rows(path: Place, kind: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file; what is wrong with it is said with its name."""
    try:
        yield from READERS[kind](path)
    except BrokenFileError as error:
        raise ValueError(f"`train_file`: {path} {error}") from error
    except OSError as error:
        raise ValueError(
            f"`train_file`: cannot read {path} ({error.strerror or error_text(error)}): check its permissions"
        ) from error


def _slice(rows: Dataset, split: str) -> Dataset:
    """Return the part of the rows that `split` names."""
    if split == "train":
        return rows
    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": len(rows)})
    except (ValueError, AssertionError) as error:
        raise ValueError(f"`dataset_split` {split}: {error_text(error)}") from error
    return rows.select(range(parts[0].from_, parts[0].to))


def _parquet(paths: list[Place], streaming: bool, choose: Choose | None) -> Dataset | IterableDataset:
    try:
        found = parquet_columns(paths)
        if not found:
            return Dataset.from_dict({})
        return drop_media(parquet_rows(paths, choose(found) if choose is not None else found, streaming))
    except BrokenFileError as error:
        raise ValueError(f"`train_file`: {error}") from error
    except (DatasetsError, ValueError) as error:
        names = ", ".join(map(str, paths))
        raise ValueError(
            f"`train_file`: cannot load {names}: {error_text(error.__cause__ or error)}"
        ) from error


def _check_paths(train_file: Paths) -> list[Place]:
    """Return the paths, each of a file of one accepted type that can be opened and is not empty."""
    given = [train_file] if isinstance(train_file, str | os.PathLike) else list(train_file)
    if not given:
        raise ValueError("`train_file` names no file: give at least one path")
    paths = [place_of(path) for path in given]
    for path in paths:
        if found := problem(path):
            raise ValueError(f"`train_file`: {found}")
    if len(set(map(kind_of, paths))) > 1:
        names = ", ".join(map(file_name, paths))
        raise ValueError(
            f"`train_file` mixes file types ({names}): give files of one type, or these in `data_mix`"
        )
    return paths
