"""What a model that takes pictures as well has beside its tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoModelForImageTextToText
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME, VIDEO_PROCESSOR_NAME

from lopt.models.load import auto_class
from lopt.models.names import resolve_model

FILES = (PROCESSOR_NAME, IMAGE_PROCESSOR_NAME, VIDEO_PROCESSOR_NAME)
"""Settings of a processor, which is not needed for training on text."""


def copy_processor(name: str, config: Any, folder: Path, revision: str | None = None) -> None:
    """Copy the processor's settings of the model `name` beside the model that was made of it.

    Nothing is copied for a model that takes text only.

    Args:
        name: As given to `lopt.models.load.load_model`.
        config: The model's config.
        folder: Holds the model that was made.
    """
    if auto_class(config) is not AutoModelForImageTextToText:
        return
    source = resolve_model(name)
    if not Path(source).is_dir():
        source = snapshot_download(source, revision=revision, allow_patterns=list(FILES))
    for file in FILES:
        if (Path(source) / file).is_file():
            shutil.copyfile(Path(source) / file, folder / file)
