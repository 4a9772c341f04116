"""Data sets on the Hugging Face Hub, and what to do where they cannot be had."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError

from lopt.data.presets import PRESETS

logger = logging.getLogger(__name__)


def load_hub(
    name: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    *,
    streaming: bool = False,
    flag: str = "--dataset_name",
) -> Dataset | IterableDataset:
    """Load one split of a data set on the Hub; what was loaded before comes from the local cache.

    Args:
        name: Name on the Hub.
        config: Its configuration, where it has several.
        split: Its split.
        revision: Branch, tag or commit.
        streaming: Read rows when they are needed rather than all of them now.
        flag: The flag that the user named the data set with, for messages.

    Raises:
        ValueError: One line that begins with `flag`: no connection, no access, no such data set,
            configuration, split or revision, no rows.
    """
    options = {"streaming": True} if streaming else {}
    try:
        _check_files(name, config, revision)
        rows = without_media(load_dataset(name, config, split=split, revision=revision, **options))
        empty = next(iter(rows), None) is None  # a stream fails here rather than when it is opened
    except ConnectionError as error:
        raise ValueError(_offline(name, error, flag)) from error
    # RuntimeError is what `datasets` raises for a repository that needs a loading script.
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        if "gated" in str(error).lower():
            raise ValueError(
                f"{flag}: {name} is gated: accept its terms at https://huggingface.co/datasets/{name}, "
                "then log in with `hf auth login`"
            ) from error
        if "scripts are no longer supported" in str(error):
            raise ValueError(
                f"{flag}: {name} is made by a Python script, which is not run: use a revision with data "
                "files (often refs/convert/parquet), or --train_file with a local copy"
            ) from error
        raise ValueError(f"{flag}: cannot load {name}, --dataset_split {split}: {one_line(error)}") from error
    if empty:
        raise ValueError(f"{flag}: {name}, --dataset_split {split}, has no rows: name another")
    return rows


def _check_files(name: str, config: str | None, revision: str | None) -> None:
    """Refuse a data set whose card names files outside it, which may be any file of its reader's.

    Raises:
        ValueError: with the first of them.
    """
    found = load_dataset_builder(name, config, revision=revision).config.data_files or {}
    home = Path(name).resolve() if Path(name).is_dir() else None
    for file in (str(file) for files in found.values() for file in files):
        place = file.rsplit("::", 1)[-1]  # "zip://rows.csv::hf://datasets/..." is in an archive there
        inside = home is not None and Path(place).resolve().is_relative_to(home)
        if not (place.startswith("hf://datasets/") if home is None else inside):
            raise ValueError(f"its card names {file}, which is no file of the data set")


def without_media(rows: Dataset | IterableDataset) -> Any:
    """Rows without columns of pictures, sound and the like, which nothing here learns from.

    Such a column may hold a path or an address in place of the content, and reading a row would open it: a
    data set could so name any file of its reader's.
    """
    names = [name for name, feature in (rows.features or {}).items() if any(_media(feature))]
    if names:
        logger.warning("left out the columns %s: pictures, sound and the like are not read", ", ".join(names))
        if isinstance(rows, IterableDataset):
            rows = rows.decode(False)  # a stream reads its rows before it removes columns
        rows = rows.remove_columns(names)
    return rows


def _media(feature: Any) -> Iterator[bool]:
    """Of a column's type and the types in it, whether it takes what it holds from elsewhere."""
    if isinstance(feature, dict):
        for part in feature.values():
            yield from _media(part)
    elif isinstance(feature, list):
        for part in feature:
            yield from _media(part)
    else:
        yield hasattr(feature, "embed_storage")
        inner = getattr(feature, "feature", None)
        if inner is not None:
            yield from _media(inner)


def one_line(error: BaseException, limit: int = 300) -> str:
    """What an exception says, in one line of at most `limit` characters and three dots."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + "..."


def _offline(name: str, error: ConnectionError, flag: str) -> str:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return (
            f"{flag}: HF_HUB_OFFLINE is set and {name} is not in the cache: unset it to download, "
            "or use --train_file with a local copy"
        )
    preset = next((preset for preset in PRESETS.values() if preset.hub_id == name), None)
    fetch = (
        f"`lopt data download --dataset {preset.name} --write_parquet`" if preset else "`load_dataset` there"
    )
    return (
        f"{flag}: cannot reach the Hub for {name} ({one_line(error)}): connect, or use --train_file with a "
        f"local copy: run {fetch} on a machine with a connection and bring the file, or its HF_HOME folder "
        "and set HF_HUB_OFFLINE=1"
    )
