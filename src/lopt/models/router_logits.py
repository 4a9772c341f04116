"""Mixtures of experts that generate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lopt.architectures import base_model


@contextmanager
def without_router_logits(model: PreTrainedModel) -> Iterator[None]:
    """Let a mixture of experts return no router logits inside, as generation needs it.

    With them transformers weighs the routers of one new token by the attention mask of the whole row, and
    fails where a prompt is padded. A config asks for them after SFT, for which TRL turns them on.
    """
    config: Any = base_model(model).config.get_text_config()
    asked = getattr(config, "output_router_logits", None)
    if not asked:
        yield
        return
    config.output_router_logits = False
    try:
        yield
    finally:
        config.output_router_logits = asked
