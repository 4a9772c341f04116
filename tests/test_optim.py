"""Clipping: one block alone, and all together as published."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import batch_of, tiny
from lopt import LoPTConfig, attach
from lopt.optim import clip_gradients


@pytest.mark.parametrize("clip", ["global", "block"])
def test_clip(clip: str) -> None:
    model = tiny("llama")
    handle = attach(model, LoPTConfig(num_blocks=3, clip=clip, lambda_aux=1000.0))
    model(**batch_of([9, 4])).loss.backward()
    parameters = [handle.block_parameters(b.index) for b in handle.blocks]
    before = [[copy.deepcopy(p.grad) for p in block] for block in parameters]
    expected = torch.stack([torch.cat([g.flatten() for g in grads]).norm() for grads in before])
    norms = clip_gradients(handle, max_norm=0.5)
    torch.testing.assert_close(norms, expected)
    total = norms.norm()
    for block, grads, norm in zip(parameters, before, norms, strict=True):
        factor = min(1.0, 0.5 / (norm if clip == "block" else total).item())
        for parameter, gradient in zip(block, grads, strict=True):
            torch.testing.assert_close(parameter.grad, gradient * factor, rtol=1e-4, atol=1e-8)
    assert torch.equal(clip_gradients(handle), clip_gradients(handle))  # no limit, no change
