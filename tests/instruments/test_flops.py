"""Operations counted against counts by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lopt.instruments.flops import FlopCounter


def test_products_and_their_backward() -> None:
    x, weight = torch.randn(6, 8), torch.randn(8, 4, requires_grad=True)
    with FlopCounter() as counter:
        y = x @ weight
        assert counter.total == 2 * 6 * 8 * 4
        y.sum().backward()  # the gradient of the weight only: x needs none
        assert counter.total == 2 * (2 * 6 * 8 * 4)
        torch.relu(y)  # no product
    torch.randn(3, 3) @ torch.randn(3, 3)
    assert counter.total == 2 * (2 * 6 * 8 * 4)


def test_attention_is_two_products_forward_and_five_backward() -> None:
    batch, heads, queries, width = 2, 3, 16, 8
    q, k, v = (torch.randn(batch, heads, queries, width, requires_grad=True) for _ in range(3))
    product = 2 * batch * heads * queries * queries * width
    with FlopCounter() as counter:
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        assert counter.total == 2 * product
        out.sum().backward()
    assert counter.total == 7 * product


def test_a_product_in_another_dtype_as_of_the_fused_head_on_a_gpu() -> None:
    """Only a GPU has `addmm` with an `out_dtype`: its arguments, as the hook is given them."""
    left, right, out = torch.empty(6, 8), torch.empty(8, 4), torch.empty(6, 4)

    def product(*args: Any, **kwargs: Any) -> Tensor:
        return out

    product.overloadpacket = torch.ops.aten.addmm  # type: ignore[attr-defined]
    counter = FlopCounter()
    counter._dispatch(product, (), (out, left, right, torch.float32), {"out": out})
    assert counter.total == 2 * 6 * 8 * 4
