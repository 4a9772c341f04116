"""Stochastic rounding of float32 to bfloat16, which keeps small updates on average."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROUNDED_AT_ONCE = 2**24
"""Numbers that are rounded together, which bounds the memory of the random bits."""


def round_stochastically(wide: Tensor, narrow: Tensor, noise: torch.Generator | None) -> None:
    """Write float32 `wide` into bfloat16 `narrow`, up or down with the odds that keep it on average.

    A bfloat16 is the upper half of a float32: random bits are added to the lower half, which is then
    cut off. NaN stays NaN, which the carry would turn into another number.

    Args:
        wide, narrow: of the same shape, at least one dimension.
        noise: source of the random bits; None takes PyTorch's own.
    """
    rows = max(1, ROUNDED_AT_ONCE * len(wide) // max(wide.numel(), 1))
    for some, target in zip(wide.split(rows), narrow.split(rows), strict=True):
        bits = torch.randint(0, 1 << 16, some.shape, generator=noise, dtype=torch.int32, device=some.device)
        bits.add_(some.view(torch.int32)).bitwise_and_(-(1 << 16))
        target.copy_(bits.view(torch.float32))
        mask = bits.view(-1).view(torch.bool)[: some.numel()].view(some.shape)  # in the memory of the bits
        target.masked_fill_(torch.ne(some, some, out=mask), math.nan)
