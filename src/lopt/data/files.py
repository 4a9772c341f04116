"""Rows in: one `datasets.Dataset` from local files or from the Hugging Face Hub.

Local files are JSON, JSONL, Parquet or CSV, told apart by their suffix. Every way in which a user
can get this wrong ends in a `ValueError` of one line that names the flag and the fix.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetsError

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Accepted suffix -> name of the `datasets` builder that reads it."""

_ACCEPTED = ", ".join(BUILDERS)


def load_rows(
    train_file: Paths | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    max_samples: int | None = None,
    seed: int = 42,
    revision: str | None = None,
) -> Dataset:
    """Load training rows from exactly one of `train_file` and `dataset_name`.

    Args:
        train_file: A path, or several paths of one file type, read as one data set in that order.
            CSV cells are kept as text, so "007" and "NA" stay what the file says.
        dataset_name: Name of a data set on the Hub.
        dataset_config: Configuration of that data set, where it has several.
        split: Split to load; a slice such as `train[:10%]` works too. Local files are `train`.
        max_samples: Keep this many rows (>= 1), drawn at random with `seed`; all where fewer.
        seed: Seed of that draw.
        revision: Branch, tag or commit of the data set on the Hub.

    Raises:
        ValueError: One line naming the flag at fault: both or neither source given, a file that is
            missing, unreadable, broken, empty or of an unknown type, a data set that cannot be
            reached, or a `max_samples` below 1.
    """
    if (train_file is None) == (dataset_name is None):
        given = "neither is" if train_file is None else "both are"
        raise ValueError(f"give exactly one of --train_file and --dataset_name ({given} given)")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"--max_samples must be at least 1, not {max_samples}")
    if train_file is not None:
        rows = _load_files(_as_paths(train_file), split)
    else:
        rows = _load_hub(str(dataset_name), dataset_config, split, revision)
    if max_samples is not None and max_samples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(max_samples))
    return rows


def split_held_out(
    rows: Dataset,
    held_out: float,
    seed: int = 42,
) -> tuple[Dataset, Dataset | None]:
    """Split `rows` at random into training rows and held-out rows.

    Args:
        rows: All rows.
        held_out: 0 holds nothing out; a fraction below 1 holds out that share (at least one row);
            a whole number from 1 up holds out that many rows.
        seed: Seed of the draw.

    Returns:
        The training rows and the held-out rows, or `rows` unchanged and None where `held_out` is 0.

    Raises:
        ValueError: `held_out` is neither of these, or it would leave no training row.
    """
    if held_out == 0:
        return rows, None
    # Written so that NaN fails it too.
    if not (0 < held_out < 1 or (held_out >= 1 and float(held_out).is_integer())):
        raise ValueError(
            f"--held_out must be 0, a fraction below 1 or a whole number of rows, not {held_out}"
        )
    count = int(held_out) if held_out >= 1 else max(1, round(held_out * len(rows)))
    if count >= len(rows):
        raise ValueError(
            f"--held_out {held_out} takes {count} of {len(rows)} rows and leaves none to train on: "
            "lower it or give more rows"
        )
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _as_paths(train_file: Paths) -> list[Path]:
    """The paths given, checked: files of one accepted type that can be opened and are not empty."""
    given = [train_file] if isinstance(train_file, str | os.PathLike) else list(train_file)
    if not given:
        raise ValueError("--train_file names no file: give at least one path")
    paths = [Path(path).expanduser() for path in given]
    for path in paths:
        _check_file(path)
    if len({BUILDERS[path.suffix.lower()] for path in paths}) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"--train_file mixes file types ({names}): give files of one type")
    return paths


def _check_file(path: Path) -> None:
    if path.is_dir():
        # A folder often holds test files too, so reading all of it could train on the test set.
        usable = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in BUILDERS)
        inside = f"it holds {', '.join(usable[:5])}" if usable else f"it holds no {_ACCEPTED} file"
        raise ValueError(f"--train_file: {path} is a folder: name the files to read ({inside})")
    if not path.exists():
        raise ValueError(f"--train_file: {path} does not exist: check the path")
    if path.suffix.lower() not in BUILDERS:
        raise ValueError(f"--train_file: {path.name} is of an unknown type: give {_ACCEPTED}")
    try:
        fault = _content_fault(path)
    except OSError as error:
        raise ValueError(
            f"--train_file: cannot read {path} ({error.strerror}): check its permissions"
        ) from error
    if fault:
        raise ValueError(f"--train_file: {path} {fault}")


def _content_fault(path: Path) -> str | None:
    """Whether the file is empty or text of another encoding, or None."""
    with path.open("rb") as handle:
        if not handle.peek(1):
            return "is empty: give a file with at least one row"
        if path.suffix.lower() == ".parquet":
            return None
        # Checked here because the JSON reader does not: rows would load and fail when first used.
        for number, line in enumerate(handle, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f"is not UTF-8 (line {number}): convert it to UTF-8"
    return None


def _load_files(paths: list[Path], split: str) -> Dataset:
    if not re.fullmatch(r"train(\[[^\[\]]*\])?", split):
        raise ValueError(
            f"--dataset_split must be train, or a slice such as train[:10%], with --train_file, not {split}"
        )
    builder = BUILDERS[paths[0].suffix.lower()]
    try:
        options = _csv_as_text(paths[0]) if builder == "csv" else {}
        # `datasets` takes each name for a pattern, in which [1] and * have a meaning.
        files = {"train": [glob.escape(str(path)) for path in paths]}
        return load_dataset(builder, data_files=files, split=split, **options)
    except (DatasetsError, ValueError, StopIteration) as error:
        raise ValueError(f"--train_file: {_diagnose(paths, split, error)}") from error


def _csv_as_text(path: Path) -> dict[str, object]:
    """Options that keep CSV cells as written: guessed types would turn the answer 007 into 7.0."""
    with path.open(encoding="utf-8-sig", newline="") as handle:
        header = next(csv.reader(handle), [])
    return {
        "features": Features({name: Value("string") for name in header}),
        "keep_default_na": False,
    }


def _diagnose(paths: list[Path], split: str, error: Exception) -> str:
    """One line on why loading failed: the first fault found in the files, else the library's."""
    for path in paths:
        fault = _json_fault(path) if BUILDERS[path.suffix.lower()] == "json" else None
        if fault:
            return f"{path} {fault}"
    names = ", ".join(map(str, paths))
    if "no data" in str(error):
        slice_hint = "" if split == "train" else f" in --dataset_split {split}"
        return f"{names} has no rows{slice_hint}: give at least one row"
    return f"cannot load {names}: {_one_line(error.__cause__ or error)}"


def _json_fault(path: Path) -> str | None:
    """The first fault of a JSON or JSONL file with its line number (from 1), or None."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return "has no rows: give at least one row"
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            return f"is broken: line {error.lineno} is not valid JSON ({error.msg})"
        return None if rows else "has no rows: give at least one row"
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            return f"is broken: line {number} is not valid JSON ({error.msg})"
        if not isinstance(row, dict):
            return f"is broken: line {number} is not a JSON object such as {{'prompt': ...}}"
    return None


def _load_hub(name: str, config: str | None, split: str, revision: str | None) -> Dataset:
    try:
        rows = load_dataset(name, config, split=split, revision=revision)
    except ConnectionError as error:
        raise ValueError(
            f"--dataset_name: cannot reach the Hub for {name} ({_one_line(error)}): "
            "connect, or use --train_file with a local copy"
        ) from error
    # RuntimeError is what `datasets` raises for a repository that needs a loading script.
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"--dataset_name: cannot load {name}, --dataset_split {split}: {_one_line(error)}"
        ) from error
    if len(rows) == 0:
        raise ValueError(f"--dataset_name: {name}, --dataset_split {split}, has no rows: name another")
    return rows


def _one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."
