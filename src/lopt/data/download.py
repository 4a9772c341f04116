"""Fetch presets while there is a connection: into the cache, or into Parquet files to carry along."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from lopt.data.hub import load_hub, one_line
from lopt.data.presets import PRESETS, Preset, find_preset, show_licence


def choose(names: Iterable[str]) -> list[Preset]:
    """The presets of these names, each once; `all` stands for every one.

    Raises:
        ValueError: no name, or one that is none of theirs.
    """
    names = list(dict.fromkeys(names))
    if not names:
        raise ValueError(f"--dataset is missing: give all or some of {', '.join(PRESETS)}")
    if "all" in names:
        return list(PRESETS.values())
    unknown = [name for name in names if name not in PRESETS]
    if unknown:
        raise ValueError(f"--dataset {unknown[0]} is unknown: use all or some of {', '.join(PRESETS)}")
    return [find_preset(name) for name in names]


def download(
    presets: Iterable[Preset],
    folder: str | os.PathLike[str] | None = None,
    *,
    revision: str | None = None,
    overwrite: bool = False,
) -> None:
    """Download every preset and say how to use it; go on where one fails.

    Args:
        presets: What to download.
        folder: Where `NAME.parquet` goes, with all columns and rows of the preset's split. None
            fills the cache of `datasets` only.
        revision: Branch, tag or commit of the data set.
        overwrite: Replace files. Without it, a preset whose file is there is left alone.

    Raises:
        ValueError: after all were tried, with the names of those that failed, each of which has printed
            why; `folder` is not a folder that can be written to.
    """
    folder = _made(Path(folder)) if folder is not None else None
    failed = []
    for preset in presets:
        path = folder / f"{preset.name}.parquet" if folder is not None else None
        if path is not None and path.exists() and not overwrite:
            print(f"{preset.name}: {path} is there already and left alone (--overwrite replaces it)")
            continue
        try:
            _download_one(preset, path, revision)
        except (ValueError, OSError) as error:
            failed.append(preset.name)
            print(f"{preset.name}: failed. {one_line(error, limit=1000)}")
    if failed:
        raise ValueError(f"not downloaded: {', '.join(failed)} (the reasons are above); try these again")


def _made(folder: Path) -> Path:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: choose a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder} cannot be made ({error.strerror}): choose another"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be written to: choose another folder")
    return folder


def _download_one(preset: Preset, path: Path | None, revision: str | None) -> None:
    show_licence(preset)
    rows = load_hub(preset.hub_id, preset.config, preset.split, revision, flag=f"--dataset {preset.name}")
    if path is None:
        print(f"{preset.name}: {len(rows):,} rows are in the cache. Train with {_flags(preset)}")
        return
    # Written beside its place and renamed when whole: what is there is always a complete file.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".downloading-") as scratch:
        part = Path(scratch) / path.name
        rows.to_parquet(part)
        part.replace(path)
    print(f"{preset.name}: {len(rows):,} rows. Train with {_flags(preset)} --train_file {path}")


def _flags(preset: Preset) -> str:
    sft = f"--dataset_preset {preset.name}"
    return sft if preset.use == "sft" else f"--task {preset.name} (lopt grpo) or {sft} (lopt sft)"
