"""Download presets while there is a connection: into the cache, or into Parquet files to carry along."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from lopt.data.presets import PRESETS, Preset, show_licence
from lopt.validation import check_choice


def choose_presets(names: Sequence[str]) -> list[Preset]:
    """Return the presets of these names, each once; `all` stands for every one.

    Raises:
        ValueError: no name, or one that is unknown.
    """
    if not names:
        raise ValueError(f"`dataset` is missing: give all or some of {', '.join(PRESETS)}")
    for name in names:
        check_choice("dataset", name, ["all", *PRESETS])
    return [PRESETS[name] for name in (PRESETS if "all" in names else dict.fromkeys(names))]


def download(preset: Preset, path: Path | None = None, *, revision: str | None = None) -> int:
    """Download the split of a preset, print its licence the first time, and return the number of rows.

    Args:
        path: Parquet file to write, with all columns; replaced if it exists. None fills the cache only.
        revision: Branch, tag or commit of the data set.

    Raises:
        ValueError: the data set cannot be loaded.
        OSError: the file cannot be written; nothing is left of it.
    """
    from lopt.data.hub import load_hub

    show_licence(preset)
    rows = load_hub(preset.hub_id, preset.config, preset.split, revision, source=f"`dataset` {preset.name}")
    if path is not None:
        # Written beside its place and renamed when complete, so that the file is always whole.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".downloading-") as scratch:
            part = Path(scratch) / path.name
            rows.to_parquet(part)
            part.replace(path)
    return len(rows)
