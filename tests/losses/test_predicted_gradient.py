"""Predicted gradients against plain references."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lopt.losses.predicted_gradient import RIDGE, GradientMap, PredictedGradient
from lopt.losses.rows import Rows

H, VOCABULARY = 6, 20
LABELS = torch.tensor([[-100, -100, 3, 7, 1], [-100, 5, -100, -100, -100]])
IDS = torch.tensor([[4, 2, 3, 7, 1], [9, 5, 8, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
ROWS = Rows(MASK, IDS, labels=LABELS)
PLACES = [(0, 1), (0, 2), (0, 3), (1, 0)]  # positions whose next token has a label


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(H, VOCABULARY, bias=False)


def test_the_map_is_a_ridge_regression_on_outputs_and_labels(head: nn.Linear) -> None:
    hidden, gradient = torch.randn(2, 5, H) * 30, torch.randn(2, 5, H)
    found = GradientMap(H, head)
    assert not found.predict(hidden, ROWS).any()
    with pytest.raises(ValueError, match="nothing was fitted yet"):
        found(hidden, ROWS)
    found.add(hidden, gradient, ROWS)
    found.fit()
    known = torch.stack([hidden[place] for place in PLACES])
    labels = head.weight[[3, 7, 1, 5]].detach()
    parts = [part / part.square().mean(0).sqrt() for part in (known, labels)]
    features = torch.cat([*parts, torch.ones(4, 1)], 1).double()
    exact = torch.stack([gradient[place] for place in PLACES]).double() * 4  # of the sum over four labels
    gram = features.T @ features
    strength = RIDGE * gram.diagonal().mean() * torch.eye(2 * H + 1)
    expected = torch.zeros(2, 5, H)
    for place, row in zip(
        PLACES, features @ torch.linalg.solve(gram + strength, features.T @ exact) / 4, strict=True
    ):
        expected[place] = row.float()
    torch.testing.assert_close(found(hidden, ROWS), expected, rtol=1e-4, atol=1e-6)


def test_an_output_learns_along_the_prediction(head: nn.Linear) -> None:
    hidden, prediction = torch.randn(2, 5, H, requires_grad=True), torch.randn(2, 5, H)
    loss = PredictedGradient([], head).loss(prediction, hidden, hidden, ROWS)
    (0.5 * loss).backward()
    assert loss.item() == pytest.approx(prediction.norm().item())
    torch.testing.assert_close(hidden.grad, 0.5 * prediction)


def test_rows_without_labels_are_refused(head: nn.Linear) -> None:
    with pytest.raises(ValueError, match="needs tokens and labels"):
        GradientMap(H, head).predict(torch.randn(2, 5, H), Rows(MASK, IDS))
