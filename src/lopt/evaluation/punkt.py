"""NLTK's sentence tokenizer data, which IFEval's scorer counts sentences with, also without the internet."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

DATA = "tokenizers/punkt_tab/english"

# A PyPI package that carries the data among its files; nothing of it is imported.
CARRIER, FOLDER = "llama-index-core", "llama_index/core/_static/nltk_cache"


def need_punkt() -> None:
    """Make NLTK find its punkt_tab: where it is installed, in `CARRIER`'s files, or by NLTK's own download.

    Without this lm-eval would find out after all answers are generated.

    Raises:
        ImportError: the harness's extra for IFEval is missing.
        ValueError: the data is nowhere to be had.
    """
    try:
        import langdetect  # noqa: F401
        import nltk
    except ImportError as error:
        raise ImportError('ifeval needs the packages of its scorer: pip install "lopt[eval]"') from error
    if _found(nltk):
        return
    try:
        carried = Path(str(importlib.metadata.distribution(CARRIER).locate_file(FOLDER)))
    except importlib.metadata.PackageNotFoundError:
        carried = None
    if carried is not None and carried.is_dir() and str(carried) not in nltk.data.path:
        nltk.data.path.append(str(carried))
    if not _found(nltk) and not nltk.download("punkt_tab", quiet=True):
        raise ValueError(
            "ifeval counts sentences with NLTK's punkt_tab data, which is not here and cannot be downloaded: "
            f"pip install --no-deps {CARRIER} (it carries the data), or name its folder in NLTK_DATA"
        )


def _found(nltk: object) -> bool:
    try:
        nltk.data.find(DATA)  # type: ignore[attr-defined]
    except LookupError:
        return False
    return True
