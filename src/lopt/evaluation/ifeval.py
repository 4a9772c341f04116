"""Requirements of IFEval's scorer in lm-evaluation-harness: sentence data, also offline, and a fixed seed."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DATA = "tokenizers/punkt_tab/english"

# A PyPI package that carries the data among its files; nothing of it is imported.
CARRIER, FOLDER = "llama-index-core", "llama_index/core/_static/nltk_cache"


def need_punkt() -> None:
    """Make NLTK find its punkt_tab: where it is installed, in `CARRIER`'s files, or by NLTK's own download.

    Without this the harness would fail only after all answers are generated.

    Raises:
        ImportError: the packages of the harness's scorer are missing.
        ValueError: the data cannot be found or downloaded.
    """
    _, nltk = _packages()
    if _found(nltk):
        return
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        carried = Path(str(importlib.metadata.distribution(CARRIER).locate_file(FOLDER)))
        if carried.is_dir() and str(carried) not in nltk.data.path:
            nltk.data.path.append(str(carried))
    if not _found(nltk) and not nltk.download("punkt_tab", quiet=True):
        raise ValueError(
            "ifeval counts sentences with NLTK's punkt_tab data, which is not here and cannot be downloaded: "
            f"pip install --no-deps {CARRIER} (it carries the data), or name its folder in NLTK_DATA"
        )


@contextlib.contextmanager
def steady_languages() -> Iterator[None]:
    """Fix the seed of the scorer's language detector, whose verdict on a text may vary otherwise."""
    langdetect, _ = _packages()
    before = langdetect.DetectorFactory.seed
    langdetect.DetectorFactory.seed = 0
    try:
        yield
    finally:
        langdetect.DetectorFactory.seed = before


def _packages() -> tuple[Any, Any]:
    try:
        import langdetect
        import nltk
    except ImportError as error:
        raise ImportError('ifeval needs the packages of its scorer: pip install "lopt[eval]"') from error
    return langdetect, nltk


def _found(nltk: Any) -> bool:
    try:
        nltk.data.find(DATA)
    except LookupError:
        return False
    return True
