"""Data sets on the Hugging Face Hub, and what to do if one cannot be loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from datasets.features.features import require_storage_embed

from lopt.data.presets import PRESETS
from lopt.messages import error_text

logger = logging.getLogger(__name__)


def load_hub(
    name: str,
    config: str | None = None,
    split: str = "train",
    revision: str | None = None,
    *,
    streaming: bool = False,
    source: str = "`dataset_name`",
) -> Dataset | IterableDataset:
    """Load one split of a data set on the Hub; what was loaded before comes from the local cache.

    Args:
        name: Name on the Hub.
        config: Its configuration, if it has several.
        split: Its split.
        revision: Branch, tag or commit.
        streaming: Read rows when they are needed rather than all of them now.
        source: The argument that the user named the data set with, for messages.

    Raises:
        ValueError: no connection, no access, no such data set, configuration, split or revision, no rows,
            or a data set that needs files or code from elsewhere.
    """
    options = {"streaming": True} if streaming else {}
    try:
        _check_files(name, config, revision)
        rows = drop_media(load_dataset(name, config, split=split, revision=revision, **options))
        empty = next(iter(rows), None) is None  # a stream fails here rather than when it is opened
    except ConnectionError as error:
        raise ValueError(f"{source}: {_offline(name, error)}") from error
    # RuntimeError is what `datasets` raises for a repository that needs a loading script.
    except (DatasetsError, ValueError, OSError, RuntimeError) as error:
        if "gated" in str(error).lower():
            problem = (
                f"{name} is gated: accept its terms at https://huggingface.co/datasets/{name}, "
                "then log in with `hf auth login`"
            )
        elif "scripts are no longer supported" in str(error):
            problem = (
                f"{name} is made by a Python script, which is not run: use a revision with data files (often "
                "refs/convert/parquet), or `train_file` with a local copy"
            )
        else:
            problem = f"cannot load {name}, `dataset_split` {split}: {error_text(error)}"
        raise ValueError(f"{source}: {problem}") from error
    if empty:
        raise ValueError(f"{source}: {name}, `dataset_split` {split}, has no rows: name another")
    return rows


def drop_media(rows: Dataset | IterableDataset) -> Any:
    """Return rows without columns of pictures, sound and the like, which nothing here learns from.

    Such a column may hold a path or an address in place of the content, and reading a row would open it: a
    data set could name any file of the user's in this way.
    """
    features = (rows.features or {}).items()
    names = [name for name, feature in features if require_storage_embed(feature)]
    if names:
        logger.warning("left out the columns %s: pictures, sound and the like are not read", ", ".join(names))
        if isinstance(rows, IterableDataset):
            rows = rows.decode(False)  # a stream reads its rows before it removes columns
        rows = rows.remove_columns(names)
    return rows


def _check_files(name: str, config: str | None, revision: str | None) -> None:
    """Raise a ValueError if the data set's card names files outside it, which may be any of the user's."""
    found = load_dataset_builder(name, config, revision=revision).config.data_files or {}
    home = Path(name).resolve() if Path(name).is_dir() else None
    for file in (str(file) for files in found.values() for file in files):
        place = file.rsplit("::", 1)[-1]  # "zip://rows.csv::hf://datasets/..." is in an archive there
        inside = home is not None and Path(place).resolve().is_relative_to(home)
        if not (place.startswith("hf://datasets/") if home is None else inside):
            raise ValueError(f"its card names {file}, which is no file of the data set")


def _offline(name: str, error: ConnectionError) -> str:
    """Return what to do if the Hub cannot be reached."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return (
            f"HF_HUB_OFFLINE is set and {name} is not in the cache: unset it to download, "
            "or use `train_file` with a local copy"
        )
    preset = next((preset for preset in PRESETS.values() if preset.hub_id == name), None)
    command = (
        f"`lopt data download --dataset {preset.name} --write_parquet`" if preset else "`load_dataset` there"
    )
    return (
        f"cannot reach the Hub for {name} ({error_text(error)}): connect, or use `train_file` with a local "
        f"copy: run {command} on a machine with a connection and bring the file, or its HF_HOME folder "
        "and set HF_HUB_OFFLINE=1"
    )
