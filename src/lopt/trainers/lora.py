"""Low-rank adapters by PEFT, which is installed with `lopt[peft]`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers.trainer_utils import align_special_tokens

from lopt.messages import error_text
from lopt.models.generation_config import make_saveable


def lora_config(r: int, lora_alpha: int, target_modules: Any = None) -> Any:
    """Return the `peft.LoraConfig` of a causal language model.

    Args:
        r: rank of the adapters.
        lora_alpha: their scale is `lora_alpha` / `r`.
        target_modules: names of the modules that get one; None or all-linear for all linear layers.
    """
    from peft import LoraConfig

    if not target_modules or "all-linear" in target_modules:
        target_modules = "all-linear"  # a word of its own to peft, which takes a list for names of modules
    return LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules, task_type="CAUSAL_LM")


def merged(model: Any, folder: Path, tokenizer: Any) -> Any:
    """Return the model with the adapter in `folder` added to its weights, in their dtype.

    Args:
        tokenizer: of the adapter's run; its special tokens become those of the model, as in training.

    Raises:
        ValueError: the adapter is damaged, belongs to another model, or is not finite.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".*missing adapter keys")
            adapted: Any = PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
        plain = adapted.merge_and_unload(safe_merge=True)
    # PEFT raises the last two for weights of other sizes and for modules that the model does not have.
    except (SafetensorError, OSError, UserWarning, RuntimeError, ValueError) as error:
        raise ValueError(
            f"the adapter {folder} cannot be merged into its base ({error_text(error)}): get both again, "
            "from one place"
        ) from error
    align_special_tokens(plain, tokenizer)
    make_saveable(plain)
    return plain
