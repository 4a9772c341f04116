"""Low-rank adapters by PEFT, which is installed with `lopt[peft]`."""

from __future__ import annotations

from typing import Any


def lora_config(r: int, lora_alpha: int, target_modules: Any = None) -> Any:
    """Return the `peft.LoraConfig` of a causal language model.

    Args:
        r: rank of the adapters.
        lora_alpha: their scale is `lora_alpha` / `r`.
        target_modules: names of the modules that get one; None for all linear layers.
    """
    from peft import LoraConfig

    targets = target_modules or "all-linear"
    return LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=targets, task_type="CAUSAL_LM")
