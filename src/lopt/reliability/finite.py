"""Numbers that are not finite: which they are, and the weights of a model that hold some."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """A loss, gradient or weight is not a finite number; raised before the optimizer step."""


def non_finite(names: Iterable[str], values: Iterable[float]) -> str:
    """Return which values are not finite, by name, "" if all are; there may be more values than names."""
    named = zip(names, values, strict=False)
    return "; ".join(f"{name} is {value}" for name, value in named if not math.isfinite(value))


def check_weights(model: nn.Module) -> None:
    """Check the weights of a model that was just loaded, in one pass.

    Raises:
        NonFiniteError: some are not finite.
    """
    if bad := non_finite_weights(model):
        raise NonFiniteError(
            f"the model holds numbers that are not finite before any training: {bad}. Its files are "
            "damaged, or the run that wrote them had diverged: take another copy of it"
        )


@torch.no_grad()
def non_finite_weights(model: nn.Module) -> str:
    """Return the names of weights that are not finite, "" if all are. Takes one pass and no memory."""
    kinds = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    found: dict[str, Tensor] = {}
    for name, weight in model.named_parameters():
        local = getattr(weight, "to_local", lambda weight=weight: weight)()  # FSDP2: this rank's part
        if local.dtype in kinds and local.numel() and not local.is_meta:
            low, high = torch.aminmax(local)  # NaN goes through both
            found[name] = low.isfinite() & high.isfinite()
    names = [name for name, finite in found.items() if not finite]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
