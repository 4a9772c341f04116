"""The next-token local loss against plain cross-entropy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from conftest import batch_of
from lopt.losses.next_token import NextToken, _CrossEntropy
from lopt.losses.rows import Rows


def lens(vocabulary: int = 97) -> tuple[NextToken, nn.Module, nn.Linear]:
    torch.manual_seed(0)
    norm, lm_head = nn.LayerNorm(8).double(), nn.Linear(8, vocabulary).double()
    nn.init.normal_(norm.weight)
    return NextToken([norm], lm_head), norm, lm_head


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labelled", [False, True])
def test_next_token_loss_is_plain_cross_entropy(
    side: str, labelled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a small vocabulary, in parts of 4 tokens; a constant LM head, padding and packed rows."""
    monkeypatch.setattr(_CrossEntropy, "rows", 4)
    objective, norm, lm_head = lens()
    batch = batch_of([9, 5, 2], side)
    mask, labels = batch["attention_mask"], batch["labels"].clone()
    labels[:, :4] = -100
    positions = torch.arange(9)[None].repeat(3, 1)
    positions[0, 6:] -= 6  # another row begins
    rows = Rows(mask, batch["input_ids"], positions, labels if labelled else None)
    guess, hidden = torch.randn(2, 3, 9, 8, dtype=torch.float64, requires_grad=True).unbind()

    logits = lm_head(norm(hidden + guess))
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(3):
        for here in range(8):
            both = mask[row, here] and mask[row, here + 1] and positions[row, here + 1] != 0
            if both and (not labelled or labels[row, here + 1] != -100):
                expected = expected + cross_entropy(logits[row, here], batch["input_ids"][row, here + 1])
    expected = expected / mask.sum()
    actual = objective.loss(guess, hidden, hidden, rows)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    wanted = torch.autograd.grad(3 * expected, (guess, hidden), retain_graph=True)
    found = torch.autograd.grad(3 * actual, (guess, hidden))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)


def test_next_token_loss_without_a_token_to_predict_is_zero() -> None:
    objective, *_ = lens()
    hidden = torch.randn(2, 1, 8, dtype=torch.float64, requires_grad=True)
    loss = objective.loss(hidden, hidden, hidden, Rows(None, torch.tensor([[3], [4]])))
    loss.backward()
    assert loss.item() == 0.0 and not hidden.grad.any()


def test_a_large_vocabulary_is_sampled_evenly() -> None:
    """Over all batches each token stands for itself: its own rows once, the others once in `step` draws."""
    objective, _, lm_head = lens(vocabulary=40)
    objective.sample = 8
    seen = torch.zeros(40, dtype=torch.float64)
    for first in range(5):
        own, matrix, bias = objective.softmax_tokens(torch.tensor([[30, first, 30]]), torch.device("cpu"))
        assert own.tolist() == [first, 30]
        torch.testing.assert_close(matrix[:2], lm_head.weight[own])
        found = [int((lm_head.weight == row).all(1).nonzero()) for row in matrix]
        assert len(set(found)) == len(found) <= 10
        for token, weight in zip(found, (bias - lm_head.bias[found]).exp().tolist(), strict=True):
            seen[token] += weight
    assert torch.allclose(seen[5:], torch.full((35,), 5.0, dtype=torch.float64))
