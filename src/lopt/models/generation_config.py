"""A model's generation_config.json: readable before a run, and one that can be saved after it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from lopt.files import read_json

logger = logging.getLogger(__name__)

_FILE = "generation_config.json"
_OF_SAMPLING = (
    "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
)  # fmt: skip


def check_generation_file(folder: Path, name: str) -> None:
    """Refuse a file that is no mapping in JSON, which transformers passes over without a word.

    Args:
        folder: of the model.
        name: of the model, for messages.
    """
    if not (folder / _FILE).is_file():
        return
    try:
        found = read_json(folder / _FILE)
    except (ValueError, OSError) as error:
        found = error
    if not isinstance(found, dict):
        raise ValueError(
            f"`model_name_or_path` {name}: {_FILE} is no JSON object: get it again, or remove it"
        )


def make_saveable(model: Any) -> None:
    """Take out of a model's generation config what has no effect and would keep it from being saved.

    A trainer gives the config the tokenizer's special tokens, and a config that was changed is saved only if
    it is valid: that would fail at the end of a run.

    Raises:
        ValueError: it is not valid for another reason.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _fault(config) is None:
        return
    idle = (
        [] if config.do_sample else [name for name in _OF_SAMPLING if getattr(config, name, None) is not None]
    )
    for name in idle:
        setattr(config, name, None)
    if fault := _fault(config):
        raise ValueError(
            f"the model's {_FILE} is not valid and could not be saved: {fault}. Correct that file, or "
            "remove it"
        )
    logger.warning(
        "the model's %s has %s, without effect where do_sample is not true: they are not saved",
        _FILE, ", ".join(idle),
    )  # fmt: skip


def _fault(config: Any) -> str | None:
    """Return why a config cannot be saved; None if it can."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split()).removeprefix("GenerationConfig is invalid: ")[:300]
    return None
