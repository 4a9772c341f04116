"""The published local loss: a block learns to reconstruct its input.

Shapes: B batch, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from lopt.losses.rows import Rows


class ReconstructionHead(nn.Module):
    """`Linear(H/4→H) ∘ GELU ∘ Linear(H→H/4) ∘ LayerNorm(H)`; training only, never saved with the model.

    Xavier-uniform weights with gain 0.1 and zero biases (arXiv 2605.04913), drawn on the CPU, so that they
    are the same wherever the model is.
    """

    def __init__(
        self, hidden_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        bottleneck = max(1, hidden_size // 4)
        drawn: dict[str, Any] = dict(device=torch.device("cpu"), dtype=dtype)
        self.norm = nn.LayerNorm(hidden_size, **drawn)
        self.down = nn.Linear(hidden_size, bottleneck, **drawn)
        self.up = nn.Linear(bottleneck, hidden_size, **drawn)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight, gain=0.1)
            nn.init.zeros_(linear.bias)
        for module in self.children():  # one by one: `to` cannot move fake tensors, which planning has
            for name, parameter in module.named_parameters():
                setattr(module, name, nn.Parameter(parameter.detach().to(device)))

    def forward(self, hidden: Tensor, rows: Rows | None = None) -> Tensor:
        """Predict a block's input from its output, (B, T, H) → (B, T, H), in the head's dtype."""
        return self.up(gelu(self.down(self.norm(hidden.to(self.norm.weight.dtype)))))

    @property
    def has_learned(self) -> bool:
        """Whether the head was trained; the biases of a new one are zero."""
        return bool(self.up.bias.any())

    @torch.no_grad()
    def scale_output(self, factor: Tensor) -> None:
        """Multiply the head's prediction by `factor` (H,), channel by channel, from now on."""
        self.up.weight.mul_(factor[:, None])
        self.up.bias.mul_(factor)


def reconstruction_loss(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean over real tokens and channels of the squared error, in float32 or better.

    Args:
        prediction: (B, T, H).
        target: (B, T, H), a constant.
        mask: (B, T), true or 1 at real tokens; None if every token is real.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    error = prediction.to(wide) - target.to(wide)
    if mask is None:
        return error.square().mean()
    # `where`, not a product: whatever a padded position holds, even NaN, must not count.
    error = torch.where(mask.bool()[..., None], error, error.new_zeros(()))
    return error.square().sum() / (mask.bool().sum().clamp(min=1) * error.shape[-1])


class Reconstruction:
    """The published local loss: a block learns to reconstruct its input, `mean (g_b(h_b) − sg(h_{b−1}))²`.

    `sg` stops the gradient. The other losses of heads that learn have the same methods.

    Attributes:
        new_head: Makes the head g_b of a block of hidden size H, on a device, in a dtype.
    """

    new_head = ReconstructionHead

    def __init__(self, tail: Sequence[nn.Module], lm_head: nn.Module) -> None:
        """Make the loss for a model whose decoder ends in the modules `tail`, before `lm_head`.

        Other losses need these; this one does not.
        """

    def check(self, rows: Rows) -> None:
        """Raise a ValueError if `rows` lack what the loss needs."""

    def prediction_scale(self, block_output: Tensor, block_input: Tensor) -> Tensor:
        """Return the state (B, T, H) whose channels' RMS is the unit of a head's output in the warm-up."""
        return block_input

    def loss(self, prediction: Tensor, block_output: Tensor, block_input: Tensor, rows: Rows) -> Tensor:
        """Return ℓ_b from the head's prediction and the block's output and input, all (B, T, H)."""
        return reconstruction_loss(prediction, block_input, rows.mask)
