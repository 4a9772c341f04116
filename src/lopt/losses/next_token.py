"""The next-token local loss: an early block's head is a lens on the LM head.

Shapes: B batch, T tokens, H hidden size, E width of the LM head; N positions that count, U different tokens
of the batch, C tokens of the softmax.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lopt.losses.reconstruction import ReconstructionHead
from lopt.losses.rows import Rows


def predicted_positions(rows: Rows) -> Tensor:
    """Return (N,), the positions in the flattened (B, T) whose next token is to be predicted."""
    assert rows.ids is not None
    real = torch.ones_like(rows.ids, dtype=torch.bool) if rows.mask is None else rows.mask.bool()
    wanted = real[:, 1:]
    if rows.labels is not None:
        wanted = wanted & (rows.labels[:, 1:] != -100)
    if rows.positions is not None and rows.positions.ndim == 2:
        wanted = wanted & (rows.positions[:, 1:] != 0)
    return pad(real[:, :-1] & wanted, (0, 1)).flatten().nonzero().squeeze(1)


class NextToken:
    """Every earlier block learns to predict the next token, with its head as a lens on the LM head.

    `ℓ_b = Σ CE(next token | E norm(h_b + g_b(h_b))) / real tokens`, summed over positions whose next token is
    in the same row and has a label. E is the LM head, and `norm` the final norm as it was at the start; both
    are constants here. The softmax is over the batch's own tokens and every s-th of the others, each of which
    stands for s of them.
    """

    new_head = ReconstructionHead
    sample = 8192
    """About how many other tokens a softmax takes; a vocabulary of less than twice as many is taken whole."""

    def __init__(self, tail: Sequence[nn.Module], lm_head: nn.Module) -> None:
        self._tail = [_constant(module) for module in tail]
        self._lm_head = lm_head

    def check(self, rows: Rows) -> None:
        """Raise a ValueError if `rows` have no token ids."""
        if rows.ids is None:
            raise ValueError(
                "`aux_loss` next_token predicts tokens and the model was given none: pass input_ids instead "
                "of inputs_embeds, or use `aux_loss` recon"
            )

    def prediction_scale(self, block_output: Tensor, block_input: Tensor) -> Tensor:
        """Return the state (B, T, H) whose channels' RMS is the unit of a head's output in the warm-up."""
        return block_output

    def loss(self, prediction: Tensor, block_output: Tensor, block_input: Tensor, rows: Rows) -> Tensor:
        """Return ℓ_b from the head's prediction and the block's output and input, all (B, T, H)."""
        assert rows.ids is not None
        places = predicted_positions(rows)
        wanted = rows.ids.roll(-1, 1).flatten()[places]
        own, matrix, bias = self.softmax_tokens(rows.ids, block_output.device)
        targets = torch.searchsorted(own, wanted)  # the batch's own tokens come first, in order
        summed = _CrossEntropy.apply(self._lens(prediction, block_output, places), matrix, bias, targets)
        real = rows.ids.numel() if rows.mask is None else rows.mask.bool().sum().clamp(min=1)
        return summed / real

    def _lens(self, prediction: Tensor, block_output: Tensor, places: Tensor) -> Tensor:
        """Return (N, E), which replaces the decoder's output at `places`."""
        lens = (block_output + prediction).flatten(0, 1)[places]
        for module in self._tail:
            weight = next(module.parameters(), lens)
            if weight.device != lens.device:
                module.to(lens.device)
            lens = module(lens.to(weight.dtype))
        return lens

    @torch.no_grad()
    def softmax_tokens(self, ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Return the batch's own tokens (U,), and for those of the softmax LM head (C, E) and bias (C,).

        Which others are taken follows from `ids` alone, so that every schedule takes the same.
        """
        weight, bias = self._lm_head.weight, getattr(self._lm_head, "bias", None)
        assert isinstance(weight, Tensor)
        own = ids.unique()
        step = max(1, len(weight) // self.sample)
        others = torch.arange(int(own.sum()) % step, len(weight), step, device=own.device)
        others = others[~torch.isin(others, own)]
        tokens = torch.cat([own, others]).to(weight.device)
        matrix = weight[tokens].to(device)
        logs = torch.zeros(len(tokens), device=device, dtype=torch.promote_types(weight.dtype, torch.float32))
        logs[len(own) :] = math.log(step)
        if isinstance(bias, Tensor):
            logs += bias[tokens].to(device)
        return own, matrix, logs


def _constant(module: nn.Module) -> nn.Module:
    """Return a copy that does not learn. Tensors are cloned, since a fake tensor cannot be deep-copied."""
    clones: dict[int, Any] = {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
    for parameter in module.parameters():
        clones[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return copy.deepcopy(module, clones)


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `lens @ matrix.T + bias`, whose forward makes the gradient of `lens` in parts.

    The logits (N, C) never exist as a whole, and none are kept for the backward.
    """

    rows = 1024

    @staticmethod
    def forward(ctx: Any, lens: Tensor, matrix: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
        gradient = torch.empty_like(lens)
        total = bias.new_zeros(())
        for start in range(0, len(lens), _CrossEntropy.rows):
            part = slice(start, start + _CrossEntropy.rows)
            logs = (lens[part].to(matrix.dtype) @ matrix.T + bias).log_softmax(-1)
            target = targets[part, None]
            total -= logs.gather(1, target).sum()
            error = logs.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=logs.dtype))
            gradient[part] = error.to(matrix.dtype) @ matrix
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outer * gradient).to(gradient.dtype), None, None, None
