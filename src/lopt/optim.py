"""Clipping by block."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lopt.attach import LoPT


def clip_gradients(lopt: LoPT, max_norm: float = math.inf) -> Tensor:
    """Clip the accumulated gradients to `max_norm`, all together or per block (`config.clip`).

    All together, as published, one block's large gradient shrinks every other block's step; the
    norms returned here show it.

    Returns:
        (k,) the gradient norm of every block, its head included, before clipping.
    """
    blocks = [lopt.block_parameters(b.index) for b in lopt.blocks]
    norms = torch.stack([_norm(parameters) for parameters in blocks])
    if math.isfinite(max_norm):
        total = torch.linalg.vector_norm(norms)
        for parameters, norm in zip(blocks, norms, strict=True):
            clip_grads_with_norm_(parameters, max_norm, norm if lopt.config.clip == "block" else total)
    return norms


def _norm(parameters: list[torch.nn.Parameter]) -> Tensor:
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros((), device=parameters[0].device if parameters else None)
    return get_total_norm(gradients).float()
