"""Low-rank adapters by PEFT, which is installed with `lopt[peft]`."""

from __future__ import annotations

from typing import Any


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
