"""The predicted gradient: an early block learns along a linear prediction of the task's gradient at its end.

After "Decoupled Neural Interfaces using Synthetic Gradients" (arXiv 1608.05343), with a map in closed form
that is fitted to exact gradients of a few rows from time to time.

Shapes: B batch, T tokens, H hidden size, N positions with a label, F = 2H + 1 features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lopt.losses.next_token import predicted_positions
from lopt.losses.rows import Rows, channel_rms

RIDGE = 1.0
"""Strength of the regression, in units of the mean square of a feature over all positions."""
DECAY = 0.8
"""How much the statistics of earlier fits count at a later one."""


class GradientMap(nn.Module):
    """Ridge regression from what a block knows in its own forward to the task's gradient at its output.

    At a position whose next token is the label y, the output of the block is h. The features are
    `φ = (h, E_y, 1)`: h in units of each channel's root mean square, and E_y, the label's row of the LM head,
    in its own units. With `Φ` (N, F) and the exact gradients `G` (N, H) of the summed task loss,
    `W = (Φᵀ Φ + λ I)⁻¹ Φᵀ G`.

    There is no parameter. What a fit needs is kept with the map in checkpoints of heads.

    Attributes:
        weight: (F, H), W, on the device.
        units: (2, H), by which h and E_y are divided; those of the first rows.
        statistics: (F, F + H), `Φᵀ Φ` and `Φᵀ G`, in host memory.
    """

    weight: Tensor
    units: Tensor

    def __init__(self, hidden_size: int, lm_head: nn.Module, device: torch.device | None = None) -> None:
        super().__init__()
        self._lm_head = (lm_head,)  # not a part of this module
        features = 2 * hidden_size + 1
        self.register_buffer("weight", torch.zeros(features, hidden_size, device=device))
        self.register_buffer("units", torch.ones(2, hidden_size, device=device))
        self.statistics = torch.zeros(features, features + hidden_size)
        self.is_fitted = False

    def forward(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Return the predicted gradient (B, T, H) of the mean loss over labels; 0 where there is none.

        Raises:
            ValueError: The map was never fitted, or the rows have no labels.
        """
        if not self.is_fitted:
            raise ValueError(
                "`aux_loss` predicted_gradient: nothing was fitted yet: train with LoPTSFTTrainer, which "
                "does that, or use `aux_loss` recon"
            )
        return self.predict(hidden, rows)

    @torch.no_grad()
    def predict(self, hidden: Tensor, rows: Rows) -> Tensor:
        """Return what `forward` returns, 0 before the first fit."""
        places, labels = labelled(rows)
        gradient = torch.zeros_like(hidden)
        predicted = self._features(hidden, places, labels) @ self.weight / max(1, len(places))
        gradient.view(-1, hidden.shape[-1])[places] = predicted.to(hidden.dtype)
        return gradient

    @torch.no_grad()
    def add(self, hidden: Tensor, gradient: Tensor, rows: Rows) -> None:
        """Add rows to the statistics.

        Args:
            hidden: (B, T, H) output of the block.
            gradient: (B, T, H) exact gradient of the mean loss over the labels.
        """
        places, labels = labelled(rows)
        if not len(places):
            return
        if not self.statistics.any():  # the first rows
            for unit, values in zip(self.units, self._known(hidden, places, labels), strict=True):
                unit.copy_(channel_rms(values[None], None))
        features = self._features(hidden, places, labels)
        exact = gradient.flatten(0, 1)[places].to(features) * len(places)
        self.statistics += (features.T @ torch.cat([features, exact], 1)).to(self.statistics.device)

    @torch.no_grad()
    def fit(self) -> None:
        """Fit the map to the statistics, which count less at the next fit."""
        gram, cross = self.statistics.to(self.weight.device, copy=True).split(
            [len(self.weight), self.weight.shape[1]], 1
        )
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        self.weight.copy_(torch.cholesky_solve(cross, torch.linalg.cholesky(gram)))
        self.statistics *= DECAY
        self.is_fitted = True

    def get_extra_state(self) -> Tensor:
        """Return the statistics."""
        return self.statistics

    def set_extra_state(self, state: Tensor) -> None:
        """Take the statistics of a checkpoint, whose map was fitted."""
        self.statistics.copy_(state)
        self.is_fitted = True

    def reset(self) -> None:
        """Forget all rows."""
        self.statistics.zero_()
        self.is_fitted = False

    def _features(self, hidden: Tensor, places: Tensor, labels: Tensor) -> Tensor:
        """Return (N, F)."""
        known = [
            values / unit
            for values, unit in zip(self._known(hidden, places, labels), self.units, strict=True)
        ]
        return torch.cat([*known, known[0].new_ones(len(places), 1)], 1)

    def _known(self, hidden: Tensor, places: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return (N, H) outputs of the block and (N, H) rows of the LM head for the labels."""
        matrix: Any = self._lm_head[0].weight
        return hidden.flatten(0, 1)[places].float(), matrix[labels.to(matrix.device)].to(
            hidden.device
        ).float()


def labelled(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return (N,) positions in the flattened (B, T) whose next token has a label, and (N,) those labels.

    Raises:
        ValueError: The rows have no token ids or no labels.
    """
    if rows.ids is None or rows.labels is None:
        raise ValueError(
            "`aux_loss` predicted_gradient needs tokens and labels and the model was not given both: pass "
            "input_ids and labels, or use `aux_loss` recon"
        )
    places = predicted_positions(rows)
    return places, rows.ids.roll(-1, 1).flatten()[places]


class PredictedGradient:
    """A block's output learns along its predicted gradient, as if that had come from the blocks behind it."""

    def __init__(self, tail: Sequence[nn.Module], lm_head: nn.Module) -> None:
        self._lm_head = lm_head

    def new_head(self, hidden_size: int, device: torch.device | None, dtype: torch.dtype) -> GradientMap:
        """Return the map of a block, whose statistics are float32."""
        return GradientMap(hidden_size, self._lm_head, device)

    def check(self, rows: Rows) -> None:
        """Do nothing: `labelled` raises when a block learns."""

    def loss(self, prediction: Tensor, block_output: Tensor, block_input: Tensor, rows: Rows) -> Tensor:
        """Return the norm of the predicted gradient (B, T, H), as a loss whose gradient is the prediction."""
        return _Along.apply(block_output, prediction)


class _Along(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return gradient.float().norm()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return (outer * gradient).to(gradient.dtype), None
