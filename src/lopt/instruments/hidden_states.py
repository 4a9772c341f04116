"""Statistics of hidden states over real tokens, taken row by row so that they need little memory.

Shapes: B batch, T tokens, H hidden size. `mask` is (B, T), true or 1 at real tokens, or None if all are real.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


@torch.no_grad()
def token_variance(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return the variance over real tokens of `hidden` (B, T, H), averaged over channels, in float32.

    It is the reconstruction loss of the best constant, so that loss / variance is the unexplained share.
    """
    count = _count(hidden, mask)
    mean = torch.stack([row.sum(0) for row, _ in _float_rows(hidden, mask)]).sum(0) / count
    errors = [
        torch.where(real, row - mean, row.new_zeros(())).square().sum()
        for row, real in _float_rows(hidden, mask)
    ]
    return torch.stack(errors).sum() / (count * hidden.shape[-1])


@torch.no_grad()
def token_spread(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Return `1 − ‖mean of h/‖h‖‖²` over real tokens of `hidden` (B, T, H), in float32.

    It is 0 if all tokens point in one direction and near 1 if their directions differ. Norms do not matter:
    a few tokens with very large states count no more than others.
    """
    tiny = torch.finfo(torch.float32).tiny
    sums = [
        (row / row.norm(dim=-1, keepdim=True).clamp(min=tiny)).sum(0) for row, _ in _float_rows(hidden, mask)
    ]
    return 1 - (torch.stack(sums).sum(0) / _count(hidden, mask)).square().sum()


def _count(hidden: Tensor, mask: Tensor | None) -> Tensor | int:
    return hidden.shape[0] * hidden.shape[1] if mask is None else mask.bool().sum().clamp(min=1)


def _float_rows(hidden: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each row (T, H) in float32, zero where it is padded, and (T, 1) where it is real."""
    for index, row in enumerate(hidden):
        real = torch.ones_like(row[:, :1], dtype=torch.bool) if mask is None else mask[index, :, None].bool()
        yield torch.where(real, row.float(), 0.0), real
