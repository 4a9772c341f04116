"""Models with low-rank adapters, as trainers make them of a base model and a `peft.LoraConfig`."""

from __future__ import annotations

import copy
from typing import Any

from transformers import PreTrainedModel


def adapted(model: PreTrainedModel, adapters: Any, checkpointing: bool = False) -> Any:
    """Return `model` inside PEFT's, with adapters that alone are trained.

    Args:
        adapters: the `peft.LoraConfig`, which stays as it is.
        checkpointing: whether activations are recomputed, for which the embedding's output needs a gradient.
    """
    from peft import get_peft_model

    made = get_peft_model(model, copy.deepcopy(adapters))
    if checkpointing:
        made.enable_input_require_grads()
    return made
