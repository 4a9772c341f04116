"""Read rows from local files: JSON, JSONL, Parquet or CSV, distinguished by their suffix.

`datasets` reads them. The checks here are for what it does not notice (another encoding, nesting that crashes
Arrow's parser) or reports without the line.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from lopt.data.hub import drop_media
from lopt.messages import error_text

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Accepted suffix -> name of the `datasets` builder that reads it."""

_ACCEPTED = ", ".join(BUILDERS)
_TOO_DEEP = "is nested too deeply"
_NO_ROWS = "has no rows: give at least one row"
_MANY_BRACKETS = 500  # opening brackets in a line from which on its nesting is checked


def load_files(train_file: Paths, split: str, streaming: bool) -> Dataset | IterableDataset:
    """Load the rows of one or more files of one type, in that order.

    Args:
        split: `train`, or a slice of it such as `train[:10%]`.
        streaming: Return a stream, and do not read the files in search of faults.

    Raises:
        ValueError: a file is missing, unreadable, broken, empty or of an unknown type.
    """
    paths = _check_paths(train_file, streaming)
    if not re.fullmatch(r"train(\[[^\[\]]*\])?", split):
        raise ValueError(
            f"`dataset_split` must be train, or a slice such as train[:10%], with `train_file` (got {split})"
        )
    names = ", ".join(map(str, paths))
    builder = BUILDERS[paths[0].suffix.lower()]
    # `datasets` takes each name for a pattern, in which [1] and * have a meaning.
    files = {"train": [glob.escape(str(path)) for path in paths]}
    try:
        options = _csv_as_text(paths[0]) if builder == "csv" else {}
        options |= {"streaming": True} if streaming else {}
        rows = drop_media(load_dataset(builder, data_files=files, split=split, **options))
        empty = streaming and next(iter(rows), None) is None
    except (DatasetsError, ValueError, StopIteration, RecursionError) as error:
        # A file that is streamed may be too large to be read in search of the fault.
        problem = f"cannot read {names}: {error_text(error)}" if streaming else _diagnose(paths, split, error)
        raise ValueError(f"`train_file`: {problem}") from error
    if empty:
        raise ValueError(f"`train_file`: {names} {_NO_ROWS}")
    return rows


def _check_paths(train_file: Paths, streaming: bool) -> list[Path]:
    """Return the paths, each of a file of one accepted type that can be opened and is not empty."""
    given = [train_file] if isinstance(train_file, str | os.PathLike) else list(train_file)
    if not given:
        raise ValueError("`train_file` names no file: give at least one path")
    paths = [Path(path).expanduser() for path in given]
    for path in paths:
        if problem := _path_problem(path, streaming):
            raise ValueError(f"`train_file`: {problem}")
    if len({BUILDERS[path.suffix.lower()] for path in paths}) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"`train_file` mixes file types ({names}): give files of one type")
    return paths


def _path_problem(path: Path, streaming: bool) -> str | None:
    """Return why the file cannot be read, or None."""
    if path.is_dir():
        # A folder often holds test files too, so reading all of it could train on the test set.
        usable = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in BUILDERS)
        inside = f"it holds {', '.join(usable[:5])}" if usable else f"it holds no {_ACCEPTED} file"
        return f"{path} is a folder: name the files to read ({inside})"
    if not path.exists():
        return f"{path} does not exist: check the path"
    if not path.is_file():  # a pipe would be waited for, and is gone once read
        return f"{path} is no regular file: write the rows to a file first"
    if path.suffix.lower() not in BUILDERS:
        return f"{path.name} is of an unknown type: give {_ACCEPTED}"
    try:
        problem = _content_problem(path, streaming)
    except OSError as error:
        return f"cannot read {path} ({error.strerror}): check its permissions"
    return f"{path} {problem}" if problem else None


def _content_problem(path: Path, streaming: bool) -> str | None:
    """Return why the content cannot be read, or None. A file to be streamed is not read to its end."""
    with path.open("rb") as handle:
        if not handle.peek(1):
            return "is empty: give a file with at least one row"
        if streaming or path.suffix.lower() == ".parquet":
            return None
        # Checked here because the JSON reader does not: rows would load and fail when first used.
        for number, line in enumerate(handle, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"is not UTF-8 (line {number}): convert it to UTF-8"
            if b"\0" in line:
                return f"has a NUL byte (line {number}), as UTF-16 does: write it anew as UTF-8"
            # What is too deep for Python's parser crashes the process in Arrow's.
            suspect = line.count(b"[") + line.count(b"{") > _MANY_BRACKETS
            if suspect and _json_problem(line.decode("utf-8-sig")) == _TOO_DEEP:
                return f"is broken: line {number} {_TOO_DEEP}"
    return None


def _csv_as_text(path: Path) -> dict[str, object]:
    """Return options that keep CSV cells unchanged: guessed types would turn the answer 007 into 7.0."""
    with path.open(encoding="utf-8-sig", newline="") as handle:
        try:
            header = next(csv.reader(handle), [])
        except csv.Error as error:
            raise ValueError(f"its first line is no CSV header ({error})") from error
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ValueError(f"two columns are called {twice[0]!r}: rename one")
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise ValueError(f"its header is {header[0]!r}: separate columns by commas")
    return {
        "features": Features({name: Value("string") for name in header}),
        "keep_default_na": False,
    }


def _diagnose(paths: list[Path], split: str, error: Exception) -> str:
    """Return why loading failed: the first fault found in JSON files, else the library's message."""
    for path in paths:
        problem = _json_file_problem(path) if BUILDERS[path.suffix.lower()] == "json" else None
        if problem:
            return f"{path} {problem}"
    names = ", ".join(map(str, paths))
    if "no data" in str(error):
        part = "" if split == "train" else f" in `dataset_split` {split}"
        return f"{names} has no rows{part}: give at least one row"
    return f"cannot load {names}: {error_text(error.__cause__ or error)}"


def _json_file_problem(path: Path) -> str | None:
    """Return the first fault of a JSON or JSONL file with its line number (from 1), or None."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return _NO_ROWS
    if text.lstrip().startswith("["):
        try:
            return None if _parse_json(text) else _NO_ROWS
        except json.JSONDecodeError as error:
            return f"is broken: line {error.lineno} is not valid JSON ({error.msg})"
        except RecursionError:
            return f"is broken: it {_TOO_DEEP}"
    for number, line in enumerate(text.split("\n"), start=1):
        problem = _json_problem(line) if line.strip() else None
        if problem:
            return f"is broken: line {number} {problem}"
    return None


def _json_problem(line: str) -> str | None:
    """Return why a line is not one row of JSON, or None."""
    try:
        row = _parse_json(line)
    except json.JSONDecodeError as error:
        return f"is not valid JSON ({error.msg})"
    except RecursionError:
        return _TOO_DEEP
    return None if isinstance(row, dict) else "is not a JSON object such as {'prompt': ...}"


def _parse_json(text: str) -> object:
    # Integers stay text: `int` refuses those of more than 4,300 digits, which are valid JSON.
    return json.loads(text, parse_int=str)
