"""Floating point operations of what runs, counted operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import flop_counter

from lopt import compat


class FlopCounter:
    """Context manager that counts the floating point operations of matrix products and attention.

    torch's own counter keeps recomputed tensors alive and does not know a CPU's attention. Real and
    fake tensors work, and so does a backward inside a forward.

    Attributes:
        total: operations so far; a product and a sum are two.
    """

    def __init__(self) -> None:
        self.total = 0
        self._hook = compat.operator_hook(self._dispatch)

    def __enter__(self) -> Self:
        self._hook.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hook.__exit__(*error)

    def _dispatch(self, operator: Any, types: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        result = operator(*args, **kwargs)
        count = _FLOPS.get(getattr(operator, "overloadpacket", None))
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


def _attention_flops(query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 4 * query.numel() * key.shape[-2]  # two products, as if no mask left anything out


def _attention_backward_flops(gradient: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> int:
    return 10 * query.numel() * key.shape[-2]  # five products


def _addmm_flops(_: Tensor, left: Tensor, right: Tensor, *__: Any, **___: Any) -> int:
    # Also of the overload that TRL's fused LM head calls on a GPU: its result's dtype comes third, where
    # PyTorch's own formula has a shape.
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]


_CPU_ATTENTION, _CPU_ATTENTION_BACKWARD = compat.cpu_attention_operators()
_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_counter.flop_registry,
    torch.ops.aten.addmm: _addmm_flops,
    torch.ops.aten.addmm_: _addmm_flops,
    _CPU_ATTENTION: _attention_flops,
    _CPU_ATTENTION_BACKWARD: _attention_backward_flops,
}
