"""Read rows from local files: JSON, JSONL, Parquet or CSV, distinguished by their suffix.

What a file says is what a row holds. JSON and CSV are read here, row by row, into columns that guess no type
(`lopt.data.cells`); Parquet has types of its own, and `datasets` reads it.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, IterableDataset, NamedSplit, ReadInstruction
from datasets.exceptions import DatasetGenerationError, DatasetsError

from lopt.data.cells import JsonCell, feature_of
from lopt.data.csv_file import csv_rows
from lopt.data.hub import drop_media
from lopt.data.json_file import BrokenFileError, json_rows
from lopt.data.parquet_file import parquet_columns, parquet_rows
from lopt.messages import error_text

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

Choose = Callable[[list[str]], list[str]]
"""From the columns that there are to those that are read. It may name others, which a stream may come to."""

KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Accepted suffix -> kind of file."""

READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {"json": json_rows, "csv": csv_rows}
"""Kind of a text file -> what yields its rows."""

LOOK_AHEAD = 1_000
"""Rows at the start of a stream that tell which columns there are."""

_ACCEPTED = ", ".join(KINDS)
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
    kind = KINDS[paths[0].suffix.lower()]
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


def _table(paths: list[Path], kind: str, choose: Choose | None) -> Dataset:
    """Return the rows of text files; what was read before, and has not changed, comes from the cache."""
    stamps = tuple((str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
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


def _columns(paths: list[Path], kind: str, stamps: Any) -> dict[str, bool]:
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


def _one_row(paths: list[Path], kind: str, key: Any) -> Iterator[dict[str, Any]]:
    columns: dict[str, bool] = {}
    for path in paths:
        for row in _named_rows(path, kind):
            for name, value in row.items():
                columns[name] = columns.get(name, True) and (value is None or isinstance(value, str))
    yield {"columns": columns}


def _stream(paths: list[Path], kind: str, choose: Choose | None) -> IterableDataset:
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


def _rows(paths: list[Path], kind: str, names: tuple[str, ...], key: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of files with the columns `names`; `key` says what else they depend on."""
    for path in paths:
        for row in _named_rows(path, kind):
            yield {name: row.get(name) for name in names}


def _named_rows(path: Path, kind: str) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of a file; what is wrong with it is said with its name."""
    try:
        yield from READERS[kind](path)
    except BrokenFileError as error:
        raise ValueError(f"`train_file`: {path} {error}") from error
    except OSError as error:
        raise ValueError(
            f"`train_file`: cannot read {path} ({error.strerror}): check its permissions"
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


def _parquet(paths: list[Path], streaming: bool, choose: Choose | None) -> Dataset | IterableDataset:
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


def _check_paths(train_file: Paths) -> list[Path]:
    """Return the paths, each of a file of one accepted type that can be opened and is not empty."""
    given = [train_file] if isinstance(train_file, str | os.PathLike) else list(train_file)
    if not given:
        raise ValueError("`train_file` names no file: give at least one path")
    paths = [Path(path).expanduser() for path in given]
    for path in paths:
        if problem := _path_problem(path):
            raise ValueError(f"`train_file`: {problem}")
    if len({KINDS[path.suffix.lower()] for path in paths}) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"`train_file` mixes file types ({names}): give files of one type")
    return paths


def _path_problem(path: Path) -> str | None:
    """Return why the file cannot be read, or None."""
    if path.is_dir():
        # A folder often holds test files too, so reading all of it could train on the test set.
        usable = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in KINDS)
        inside = f"it holds {', '.join(usable[:5])}" if usable else f"it holds no {_ACCEPTED} file"
        return f"{path} is a folder: name the files to read ({inside})"
    if not path.exists():
        return f"{path} does not exist: check the path"
    if not path.is_file():  # a pipe would be waited for, and is gone once read
        return f"{path} is no regular file: write the rows to a file first"
    if path.suffix.lower() not in KINDS:
        return f"{path.name} is of an unknown type: give {_ACCEPTED}"
    try:
        with path.open("rb") as handle:
            return None if handle.read(1) else f"{path} is empty: give a file with at least one row"
    except OSError as error:
        return f"cannot read {path} ({error.strerror}): check its permissions"
