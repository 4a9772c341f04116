"""Floating point operations of what runs, operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode


class FlopCounter(TorchDispatchMode):
    """Counts floating point operations of matrix products and attention while it is entered.

    torch's own counter keeps recomputed tensors alive and does not know a CPU's attention. Real and
    fake tensors work, and so does a backward inside a forward.

    Attributes:
        total: operations so far; a product and a sum are two.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = _FLOPS.get(func.overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


def _attention_flops(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 4 * query.numel() * key.shape[-2]  # two products, as if no mask left anything out


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 10 * query.numel() * key.shape[-2]  # five products


_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_counter.flop_registry,
    torch.ops.aten.addmm_: flop_counter.flop_registry[torch.ops.aten.addmm],
    _CPU_ATTENTION: _attention_flops,
    _CPU_ATTENTION_BACKWARD: _attention_backward_flops,
}
