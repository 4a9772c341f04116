"""Caches that cannot be used: which one an error is about, and the variable that moves it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR)


def cache_problem(error: BaseException) -> str | None:
    """Return what to do if `error`, or what it was raised from, is about a file of a cache; else None."""
    for found in _chain(error):
        if not isinstance(found, OSError) or found.errno not in _ERRORS or found.filename is None:
            continue
        path = Path(os.path.abspath(os.fsdecode(found.filename)))
        for variable, folder in _caches():
            if path.is_relative_to(folder):
                return (
                    f"the cache {folder} cannot be used ({found.strerror}: {path}): set {variable} to a "
                    "folder that you can write to"
                )
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _caches() -> Iterator[tuple[str, Path]]:
    """Yield the variable and the folder of each cache, one within another before that."""
    from huggingface_hub import constants

    from lopt.models.packaged import cache_folder

    home = Path(constants.HF_HOME)
    for variable, default in (
        ("HF_HUB_CACHE", constants.HF_HUB_CACHE),
        ("HF_XET_CACHE", home / "xet"),
        ("HF_DATASETS_CACHE", home / "datasets"),
        ("HF_MODULES_CACHE", home / "modules"),
        ("HF_HOME", home),
        ("LOPT_CACHE", cache_folder()),
    ):
        yield variable, Path(os.path.abspath(os.environ.get(variable) or default))
