"""Files of a checkpoint that each process of a pipeline writes for its own blocks."""

from __future__ import annotations

from pathlib import Path

from lopt.engine.grid import Grid


def file_of(name: str, grid: Grid | None) -> str:
    """Return the name of this process's part of a file, for example optimizer-00001-of-00004.pt."""
    if grid is None:
        return name
    path = Path(name)
    return f"{path.stem}-{grid.position + 1:05d}-of-{grid.size:05d}{path.suffix}"


def files_of(name: str, folder: Path) -> list[Path]:
    """Return the file, or its parts as any number of processes has written them; none if it is missing."""
    path = Path(name)
    parts = sorted(folder.glob(f"{path.stem}-*-of-*{path.suffix}"))
    return [folder / name] if (folder / name).is_file() else parts
