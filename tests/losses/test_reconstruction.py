"""The head's shape and start, and the local losses against plain references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lopt.losses.reconstruction import ReconstructionHead, reconstruction_loss


def test_head_is_the_papers() -> None:
    head = ReconstructionHead(64)
    assert [tuple(p.shape) for p in head.parameters()] == [(64,), (64,), (16, 64), (16,), (64, 16), (64,)]
    bound = 0.1 * (6 / (64 + 16)) ** 0.5
    for linear in (head.down, head.up):
        assert linear.weight.abs().max() <= bound and linear.weight.std() > bound / 3
        assert not linear.bias.any()
    assert head(torch.randn(2, 3, 64, dtype=torch.bfloat16)).dtype == torch.float32


def test_loss_is_the_mean_over_real_tokens_and_channels() -> None:
    prediction, target = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    squared = (prediction - target).numpy() ** 2
    expected = squared[np.asarray(mask, bool)].mean()
    target[0, 2] = torch.nan  # a padded position may hold anything
    assert reconstruction_loss(prediction, target, mask).item() == pytest.approx(expected, rel=1e-6)
    assert reconstruction_loss(prediction, prediction, None).item() == 0.0
    assert reconstruction_loss(prediction, prediction + 2, None).item() == pytest.approx(4.0)
    half = reconstruction_loss(prediction.bfloat16(), prediction.bfloat16() + 1, mask)
    assert half.dtype == torch.float32
    assert reconstruction_loss(prediction.double(), prediction.double(), mask).dtype == torch.float64
    assert reconstruction_loss(prediction, target, torch.zeros(2, 3)).item() == 0.0
