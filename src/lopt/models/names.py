"""Names that a model can be given by."""

from __future__ import annotations

import os
from pathlib import Path

from lopt.models.packaged import PACKAGES, packaged_model

ALIASES = {
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen2.5-7b": "Qwen/Qwen2.5-7B-Instruct",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B-Instruct",
    "llama3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
}
"""Short name -> hub id."""

DTYPES = ("float32", "bfloat16", "float16", "auto")
"""Dtypes that weights can be loaded in; auto is that of the file."""


def resolve_model(name: str) -> str:
    """Return the folder or hub id that `name` stands for: an alias, a packaged model, a folder or a hub id.

    Raises:
        ValueError: `name` looks like a folder and there is none.
    """
    if name in PACKAGES:
        return str(packaged_model(name))
    if name in ALIASES:
        return ALIASES[name]
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or os.path.exists(name):
        raise ValueError(
            f"`model_name_or_path` {name} is not a folder: give one that holds config.json and weights"
        )
    return name
