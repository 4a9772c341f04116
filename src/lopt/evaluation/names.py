"""Short names for files, folders and tables."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

_TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".json")


def file_name(name: str) -> str:
    """Return a task's name as part of a file name."""
    return re.sub(r"[^\w.-]+", "_", name)


def hashed_file_name(name: str) -> str:
    """Return a file name with the letters of an arm's name and a hash, so that no two arms share one."""
    letters = re.sub(r"[^a-z0-9.]+", "-", name.replace("λ", "lambda").lower()).strip("-")
    return f"{letters[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def shortest_names(paths: Sequence[Sequence[str]], name: Callable[[Sequence[str]], str]) -> list[str]:
    """Return `name` of the last parts of every path, as few parts as make the names differ.

    Names of paths that are the same do not differ.
    """
    names: list[str] = []
    for length in range(1, 1 + max(map(len, paths), default=0)):
        names = [name(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def text_names(paths: Sequence[str]) -> list[str]:
    """Return a short name for each text file, without the suffix if that is one of plain text."""

    def name(parts: Sequence[str]) -> str:
        path = Path(*parts)
        return str(path.with_suffix("") if path.suffix.lower() in _TEXT_SUFFIXES else path)

    whole = [Path(path).expanduser().absolute().parts for path in paths]
    names = shortest_names(whole, name)
    return names if len(set(names)) == len(names) else list(paths)


def model_labels(paths: Sequence[str]) -> list[str]:
    """Return a label for each model, a folder, hub id or alias, that can be the name of a folder."""

    def name(parts: Sequence[str]) -> str:
        # Of "a/.." on the hub only the letters remain.
        return file_name("-".join(parts)).lstrip(".") or "model"

    return shortest_names([path.strip("/").split("/") for path in paths], name)
