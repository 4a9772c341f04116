"""Gradient clipping over all blocks together or block by block."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lopt.core.attach import LoPT


def clip_gradients(lopt: LoPT, max_norm: float = math.inf) -> Tensor:
    """Clip the accumulated gradients to `max_norm`, all together or per block (`config.clip`).

    All together, as published, one block's large gradient shrinks every other block's step; the
    norms returned here show it. Gradients that are sharded (FSDP2) count whole.

    Returns:
        (k,) the gradient norm of every block, its head included, before clipping.
    """
    blocks = [_by_kind(lopt.block_parameters(block.index)) for block in lopt.blocks]
    norms = torch.stack([_norm(kinds, lopt.device) for kinds in blocks])
    total = torch.linalg.vector_norm(norms)
    for kinds, norm in zip(blocks, norms, strict=True):
        _scale(kinds, max_norm, norm if lopt.config.clip == "block" else total)
    return norms


def total_norm(norms: list[Tensor], device: torch.device) -> Tensor:
    """Return the norm () of all gradients whose own norms are given; 0 if there are none."""
    if not norms:
        return torch.zeros((), device=device)
    return torch.linalg.vector_norm(torch.stack(norms)).float()


@torch.no_grad()
def scale(gradients: Iterable[Tensor], max_norm: float, norm: Tensor) -> None:
    """Multiply gradients by what brings `norm` down to `max_norm`, as `clip_grads_with_norm_` does."""
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)


def _by_kind(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters with a gradient: whole ones, then those of each mesh; one operation takes one of these."""
    kinds: dict[Any, list[nn.Parameter]] = {None: []}
    for p in parameters:
        if p.grad is not None:
            mesh = p.grad.device_mesh if isinstance(p.grad, DTensor) else None
            kinds.setdefault(mesh, []).append(p)
    return [kind for kind in kinds.values() if kind]


def _norm(kinds: list[list[nn.Parameter]], device: torch.device) -> Tensor:
    norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return total_norm(whole, device)


def _scale(kinds: list[list[nn.Parameter]], max_norm: float, norm: Tensor) -> None:
    if math.isfinite(max_norm):
        for parameters in kinds:
            clip_grads_with_norm_(parameters, max_norm, norm)
