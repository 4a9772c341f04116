"""Rows in: one `datasets.Dataset` from local files or from the Hugging Face Hub, or a stream of rows.

Local files are JSON, JSONL, Parquet or CSV, told apart by their suffix. Every way in which a user
can get this wrong ends in a `ValueError` of one line that names the flag and the fix.

A stream (`datasets.IterableDataset`) is read row by row, so it may be larger than memory and disk. It
passes through a buffer of rows that are drawn from at random with the seed, always in the same order.
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

from lopt.data.hub import load_hub, one_line, without_media
from lopt.data.presets import Preset, check_columns, find_preset, show_licence

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

SHUFFLE_BUFFER = 1_000
"""Rows that a stream's order is drawn from, unless told otherwise."""

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Accepted suffix -> name of the `datasets` builder that reads it."""

_ACCEPTED = ", ".join(BUILDERS)
_DEEP = 500  # opening brackets in a line from which on it is looked at closely


def load_rows(
    train_file: Paths | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
    max_samples: int | None = None,
    seed: int = 42,
    revision: str | None = None,
    *,
    preset: str | None = None,
    streaming: bool = False,
    shuffle_buffer: int = SHUFFLE_BUFFER,
) -> Dataset | IterableDataset:
    """Load training rows from `train_file`, from `dataset_name` or from what a preset stands for.

    Args:
        train_file: A path, or several paths of one file type, read as one data set in that order.
            CSV cells are kept as text, so "007" and "NA" stay what the file says.
        dataset_name: Name of a data set on the Hub.
        dataset_config: Configuration of that data set, where it has several.
        split: Split to load; a slice such as `train[:10%]` works too. Local files are `train`.
        max_samples: Keep this many rows (>= 1), drawn at random with `seed`; all where fewer. Of a
            stream, the first that leave the shuffle buffer.
        seed: Seed of that draw, and of the order of a stream.
        revision: Branch, tag or commit of the data set on the Hub.
        preset: Name of one of `PRESETS`; `train_file` is then a local copy of it. Rows have the
            preset's columns and no others.
        streaming: Return a stream in an order that the seed gives rather than a `Dataset`.
        shuffle_buffer: Rows in the buffer that a stream is drawn from (>= 1).

    Raises:
        ValueError: One line naming the flag at fault: not exactly one source, a file that is
            missing, unreadable, broken, empty, of an unknown type or with other columns than the
            preset, a data set that cannot be reached, a `max_samples` or `shuffle_buffer` below 1.
    """
    known = find_preset(preset) if preset is not None else None
    _check_source(train_file, dataset_name, dataset_config, known)
    for flag, value in (("--max_samples", max_samples), ("--shuffle_buffer", shuffle_buffer)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} must be at least 1, not {value}")
    if streaming and "[" in split:
        raise ValueError(f"--dataset_split {split}: a stream cannot be sliced: use --max_samples instead")
    if train_file is not None:
        rows = _load_files(_as_paths(train_file, streaming), split, streaming)
    elif known is not None:
        flag = f"--dataset_preset {known.name}"
        rows = load_hub(known.hub_id, known.config, split, revision, streaming=streaming, flag=flag)
    else:
        rows = load_hub(str(dataset_name), dataset_config, split, revision, streaming=streaming)
    if known is not None:
        where = "--train_file" if train_file is not None else f"{known.hub_id} on the Hub"
        check_columns(known, column_names(rows), where)
        show_licence(known)
        rows = rows.select_columns(list(known.columns))
    return _draw(rows, max_samples, seed, shuffle_buffer)


def column_names(rows: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; those of the first row where a stream does not state them."""
    return list(rows.column_names or next(iter(rows), {}))


def split_held_out(
    rows: Dataset | IterableDataset,
    held_out: float,
    seed: int = 42,
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Split `rows` at random into training rows and held-out rows.

    Args:
        rows: All rows.
        held_out: 0 holds nothing out; a fraction below 1 holds out that share (at least one row);
            a whole number from 1 up holds out that many rows. Of a stream, whose length is unknown,
            only a number can be held out: its first rows (`load_rows` has drawn them at random).
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
    if isinstance(rows, IterableDataset):
        return _split_stream(rows, held_out)
    count = int(held_out) if held_out >= 1 else max(1, round(held_out * len(rows)))
    if count >= len(rows):
        raise ValueError(
            f"--held_out {held_out} takes {count} of {len(rows)} rows and leaves none to train on: "
            "lower it or give more rows"
        )
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _split_stream(rows: IterableDataset, held_out: float) -> tuple[IterableDataset, Dataset]:
    if held_out < 1:
        raise ValueError(
            f"--held_out {held_out} is a share, and with --streaming the number of rows is unknown: "
            "give a whole number of rows"
        )
    count = int(held_out)
    # The held-out rows are evaluated on again and again, so they are kept.
    held, train = Dataset.from_list(list(rows.take(count)), features=rows.features), rows.skip(count)
    if len(held) < count or next(iter(train), None) is None:
        raise ValueError(
            f"--held_out {count} takes all {len(held)} rows and leaves none to train on: "
            "lower it or give more rows"
        )
    return train, held


def _check_source(
    train_file: Paths | None, dataset_name: str | None, config: str | None, preset: Preset | None
) -> None:
    if preset is not None and (dataset_name is not None or config is not None):
        flag = "--dataset_config" if dataset_name is None else "--dataset_name"
        raise ValueError(
            f"--dataset_preset {preset.name} stands for {preset.hub_id}: leave {flag} out, or the preset"
        )
    if preset is None and (train_file is None) == (dataset_name is None):
        given = "neither is" if train_file is None else "both are"
        raise ValueError(
            f"give exactly one of --train_file and --dataset_name ({given} given), or --dataset_preset"
        )


def _draw(
    rows: Dataset | IterableDataset, max_samples: int | None, seed: int, shuffle_buffer: int
) -> Dataset | IterableDataset:
    """The rows that `max_samples` leaves; of a stream, in the order that the seed gives."""
    if isinstance(rows, IterableDataset):
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        return rows if max_samples is None else rows.take(max_samples)
    if max_samples is not None and max_samples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(max_samples))
    return rows


def _as_paths(train_file: Paths, streaming: bool) -> list[Path]:
    """The paths given, checked: files of one accepted type that can be opened and are not empty."""
    given = [train_file] if isinstance(train_file, str | os.PathLike) else list(train_file)
    if not given:
        raise ValueError("--train_file names no file: give at least one path")
    paths = [Path(path).expanduser() for path in given]
    for path in paths:
        _check_file(path, streaming)
    if len({BUILDERS[path.suffix.lower()] for path in paths}) > 1:
        names = ", ".join(path.name for path in paths)
        raise ValueError(f"--train_file mixes file types ({names}): give files of one type")
    return paths


def _check_file(path: Path, streaming: bool) -> None:
    if path.is_dir():
        # A folder often holds test files too, so reading all of it could train on the test set.
        usable = sorted(entry.name for entry in path.iterdir() if entry.suffix.lower() in BUILDERS)
        inside = f"it holds {', '.join(usable[:5])}" if usable else f"it holds no {_ACCEPTED} file"
        raise ValueError(f"--train_file: {path} is a folder: name the files to read ({inside})")
    if not path.exists():
        raise ValueError(f"--train_file: {path} does not exist: check the path")
    if not path.is_file():  # a pipe would be waited for, and is gone once read
        raise ValueError(f"--train_file: {path} is no regular file: write the rows to a file first")
    if path.suffix.lower() not in BUILDERS:
        raise ValueError(f"--train_file: {path.name} is of an unknown type: give {_ACCEPTED}")
    try:
        fault = _content_fault(path, streaming)
    except OSError as error:
        raise ValueError(
            f"--train_file: cannot read {path} ({error.strerror}): check its permissions"
        ) from error
    if fault:
        raise ValueError(f"--train_file: {path} {fault}")


def _content_fault(path: Path, streaming: bool) -> str | None:
    """Whether the file is empty or, unless it is to be streamed, text of another encoding, or None."""
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
            if line.count(b"[") + line.count(b"{") > _DEEP and _is_deep(line):
                return f"is broken: line {number} is nested too deeply"
    return None


def _is_deep(line: bytes) -> bool:
    """Whether it is JSON nested too deeply for Python's parser: on that, Arrow's crashes the process."""
    try:
        json.loads(line)
    except ValueError:
        return False  # told with more words later
    except RecursionError:
        return True
    return False


def _load_files(paths: list[Path], split: str, streaming: bool) -> Dataset | IterableDataset:
    if not re.fullmatch(r"train(\[[^\[\]]*\])?", split):
        raise ValueError(
            f"--dataset_split must be train, or a slice such as train[:10%], with --train_file, not {split}"
        )
    builder = BUILDERS[paths[0].suffix.lower()]
    # `datasets` takes each name for a pattern, in which [1] and * have a meaning.
    files = {"train": [glob.escape(str(path)) for path in paths]}
    try:
        options = _csv_as_text(paths[0]) if builder == "csv" else {}
        if not streaming:
            return without_media(load_dataset(builder, data_files=files, split=split, **options))
        rows = without_media(load_dataset(builder, data_files=files, split=split, streaming=True, **options))
        empty = next(iter(rows), None) is None
    except (DatasetsError, ValueError, StopIteration, RecursionError) as error:
        # A file that is streamed may be too large to be read in search of the fault.
        names = ", ".join(map(str, paths))
        what = f"cannot read {names}: {one_line(error)}" if streaming else _diagnose(paths, split, error)
        raise ValueError(f"--train_file: {what}") from error
    if empty:
        raise ValueError(f"--train_file: {', '.join(map(str, paths))} has no rows: give at least one row")
    return rows


def _csv_as_text(path: Path) -> dict[str, object]:
    """Options that keep CSV cells as written: guessed types would turn the answer 007 into 7.0."""
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
    """One line on why loading failed: the first fault found in the files, else the library's."""
    for path in paths:
        fault = _json_fault(path) if BUILDERS[path.suffix.lower()] == "json" else None
        if fault:
            return f"{path} {fault}"
    names = ", ".join(map(str, paths))
    if "no data" in str(error):
        slice_hint = "" if split == "train" else f" in --dataset_split {split}"
        return f"{names} has no rows{slice_hint}: give at least one row"
    return f"cannot load {names}: {one_line(error.__cause__ or error)}"


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
        except RecursionError:
            return f"is broken: line {number} is nested too deeply"
        if not isinstance(row, dict):
            return f"is broken: line {number} is not a JSON object such as {{'prompt': ...}}"
    return None
