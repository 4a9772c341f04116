"""Load rows from local files, from the Hugging Face Hub or from a preset, and hold some out.

Every mistake of the user's is a ValueError of one line that names the argument and the fix.

A stream (`datasets.IterableDataset`) is read row by row, so it may be larger than memory and disk. It passes
through a buffer of rows that are drawn from at random with the seed, always in the same order.
"""

from __future__ import annotations

import re
from functools import partial

from datasets import Dataset, IterableDataset

from lopt.data.files import Choose, Paths, load_files
from lopt.data.hub import load_hub
from lopt.data.presets import PRESETS, SHUFFLE_BUFFER, Preset, check_columns, show_licence
from lopt.data.rows import column_names
from lopt.validation import check_choice, check_number, number_text


def load_rows(
    train_file: Paths | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    max_samples: int | None = None,
    seed: int = 42,
    dataset_revision: str | None = None,
    *,
    dataset_preset: str | None = None,
    streaming: bool = False,
    shuffle_buffer: int = SHUFFLE_BUFFER,
    choose: Choose | None = None,
) -> Dataset | IterableDataset:
    """Load training rows from `train_file`, from `dataset_name` or from what `dataset_preset` stands for.

    Args:
        train_file: A path or an address of fsspec, or several of one file type, read as one data set in that
            order. No type is guessed: text stays text ("007", "NA" and dates), numbers of JSON keep their
            digits.
        dataset_name: Name of a data set on the Hub.
        dataset_config: Configuration of that data set, if it has several.
        dataset_split: Split to load; a slice such as `train[:10%]` works too. Local files are `train`.
        max_samples: Keep this many rows (>= 1), drawn at random with `seed`, or all if there are fewer. Of a
            stream, the first that leave the shuffle buffer.
        seed: Seed of that draw, and of the order of a stream.
        dataset_revision: Branch, tag or commit of the data set on the Hub.
        dataset_preset: Name of one of `PRESETS`; `train_file` is then a local copy of it. Rows have the
            preset's columns and no others.
        streaming: Return a stream in an order that the seed gives rather than a `Dataset`.
        shuffle_buffer: Rows in the buffer that a stream is drawn from (>= 1).
        choose: From the columns of local files to those that are read; all by default. A preset has its own.

    Raises:
        ValueError: not exactly one source; a file that is missing, unreadable, broken, empty, of an unknown
            type or with other columns than the preset; a data set that cannot be reached; `max_samples` or
            `shuffle_buffer` below 1.
    """
    preset = _check_source(train_file, dataset_name, dataset_config, dataset_preset)
    check_number("max_samples", max_samples, minimum=1)
    check_number("shuffle_buffer", shuffle_buffer, minimum=1)
    if streaming and "[" in dataset_split:
        raise ValueError(f"`dataset_split` {dataset_split}: a stream cannot be sliced: use `max_samples`")
    if train_file is not None:
        if preset is not None:
            choose = partial(_of_preset, preset)
        rows = load_files(train_file, dataset_split, streaming, choose)
    else:
        name, config, source = str(dataset_name), dataset_config, "`dataset_name`"
        if preset is not None:
            name, config, source = preset.hub_id, preset.config, f"`dataset_preset` {preset.name}"
        if preset is not None:
            dataset_split = re.sub(r"^train(?=\[|$)", preset.split, dataset_split)
        rows = load_hub(name, config, dataset_split, dataset_revision, streaming=streaming, source=source)
    if preset is not None:
        if train_file is None:
            check_columns(preset, column_names(rows), f"{preset.hub_id} on the Hub")
        show_licence(preset)
        rows = rows.select_columns(list(preset.columns))
    return _draw(rows, max_samples, seed, shuffle_buffer)


def _of_preset(preset: Preset, found: list[str]) -> list[str]:
    check_columns(preset, found, "`train_file`")
    return list(preset.columns)


def _draw(
    rows: Dataset | IterableDataset, max_samples: int | None, seed: int, shuffle_buffer: int
) -> Dataset | IterableDataset:
    if isinstance(rows, IterableDataset):
        rows = rows.shuffle(seed=seed, buffer_size=shuffle_buffer)
        return rows if max_samples is None else rows.take(max_samples)
    if max_samples is not None and max_samples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(max_samples))
    return rows


def split_held_out(
    rows: Dataset | IterableDataset,
    held_out: float,
    seed: int = 42,
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Split `rows` at random into training rows and held-out rows.

    Args:
        rows: All rows.
        held_out: 0 holds nothing out; a fraction below 1 holds out that share (at least one row); a whole
            number from 1 up holds out that many rows. Of a stream, whose length is unknown, only a number can
            be held out: its first rows (`load_rows` has drawn them at random).
        seed: Seed of the draw.

    Returns:
        The training rows and the held-out rows, or `rows` unchanged and None where `held_out` is 0.

    Raises:
        ValueError: `held_out` is none of these, or it would leave no training row.
    """
    check_held_out(held_out, isinstance(rows, IterableDataset))
    if held_out == 0:
        return rows, None
    if isinstance(rows, IterableDataset):
        count = int(held_out)
        # The held-out rows are evaluated on again and again, so they are kept.
        held, train = Dataset.from_list(list(rows.take(count)), features=rows.features), rows.skip(count)
        if len(held) < count or next(iter(train), None) is None:
            raise _nothing_left(held_out, f"all {len(held)}")
        return train, held
    count = int(held_out) if held_out >= 1 else max(1, round(held_out * len(rows)))
    if count >= len(rows):
        raise _nothing_left(held_out, f"{count} of {len(rows)}")
    parts = rows.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _nothing_left(held_out: float, taken: str) -> ValueError:
    return ValueError(
        f"`held_out` {number_text(held_out)} takes {taken} rows and leaves none to train on: "
        "lower it or give more rows"
    )


def check_held_out(held_out: float, streaming: bool) -> None:
    """Raise a ValueError unless `held_out` is 0, a share (not of a stream) or a whole number of rows."""
    # Written so that NaN fails it too.
    if not (0 <= held_out < 1 or (held_out >= 1 and float(held_out).is_integer())):
        raise ValueError(
            f"`held_out` must be 0, a fraction below 1 or a whole number of rows (got {held_out})"
        )
    if streaming and 0 < held_out < 1:
        raise ValueError(
            f"`held_out` {held_out:g} is a share, and with `streaming` the number of rows is unknown: "
            "give a whole number of rows"
        )


def _check_source(
    train_file: Paths | None, dataset_name: str | None, dataset_config: str | None, dataset_preset: str | None
) -> Preset | None:
    """Return the preset, if one is named; raise a ValueError unless the arguments name one source."""
    if dataset_preset is None:
        if (train_file is None) == (dataset_name is None):
            given = "neither is" if train_file is None else "both are"
            raise ValueError(
                f"give exactly one of `train_file` and `dataset_name` ({given} given), or `dataset_preset`, "
                "or several by `data_mix`"
            )
        return None
    check_choice("dataset_preset", dataset_preset, PRESETS)
    preset = PRESETS[dataset_preset]
    if dataset_name is not None or dataset_config is not None:
        other = "dataset_config" if dataset_name is None else "dataset_name"
        raise ValueError(
            f"`dataset_preset` {preset.name} stands for {preset.hub_id}: leave `{other}` out, or the preset"
        )
    return preset
