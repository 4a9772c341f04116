"""The local objectives: a head, and what its block learns from it (`AUX_LOSSES`).

Shapes: B batch, T tokens, H hidden size, V vocabulary; N positions that count, C tokens of a softmax.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad


class ReconstructionHead(nn.Module):
    """`Linear(H/4→H) ∘ GELU ∘ Linear(H→H/4) ∘ LayerNorm(H)`; training only, never saved with the model.

    Xavier-uniform weights with gain 0.1 and zero biases (after arXiv 2605.04913).
    """

    def __init__(
        self, hidden_size: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        bottleneck = max(1, hidden_size // 4)
        self.norm = nn.LayerNorm(hidden_size, device=device, dtype=dtype)
        self.down = nn.Linear(hidden_size, bottleneck, device=device, dtype=dtype)
        self.up = nn.Linear(bottleneck, hidden_size, device=device, dtype=dtype)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight, gain=0.1)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Predict a block's input from its output, (B, T, H) → (B, T, H), in the head's dtype."""
        return self.up(gelu(self.down(self.norm(hidden.to(self.norm.weight.dtype)))))

    @torch.no_grad()
    def scale_output(self, factor: Tensor) -> None:
        """Multiply what the head predicts by `factor` (H,), channel by channel, for good."""
        self.up.weight.mul_(factor[:, None])
        self.up.bias.mul_(factor)


def channel_rms(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """(H,) root mean square over real tokens of `hidden` (B, T, H), in float32 or better."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    rows = wide.flatten(0, 1) if mask is None else wide[mask.bool()]
    return rows.square().mean(0).sqrt().clamp(min=torch.finfo(wide.dtype).tiny)


def reconstruction_loss(prediction: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens and channels of the squared error, in float32 or better.

    Args:
        prediction, target: (B, T, H); the target is a constant.
        mask: (B, T), true or 1 at real tokens; None if every token is real.
    """
    wide = torch.promote_types(prediction.dtype, torch.float32)
    error = prediction.to(wide) - target.to(wide)
    if mask is None:
        return error.square().mean()
    # `where`, not a product: whatever a padded position holds, even NaN, must not count.
    error = torch.where(mask.bool()[..., None], error, error.new_zeros(()))
    return error.square().sum() / (mask.bool().sum().clamp(min=1) * error.shape[-1])


@torch.no_grad()
def token_variance(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Variance over real tokens of `hidden` (B, T, H), mean of the channels, in float32.

    It is the reconstruction loss of the best constant, so that loss / variance is the unexplained share.
    """
    count = _count(hidden, mask)
    mean = torch.stack([row.sum(0) for row, _ in _row_by_row(hidden, mask)]).sum(0) / count
    errors = [
        torch.where(keep, row - mean, row.new_zeros(())).square().sum()
        for row, keep in _row_by_row(hidden, mask)
    ]
    return torch.stack(errors).sum() / (count * hidden.shape[-1])


@torch.no_grad()
def token_spread(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """`1 − ‖mean of h/‖h‖‖²` over real tokens of `hidden` (B, T, H), in float32.

    0 if all tokens point the same way, near 1 if they point everywhere; sizes do not matter, so a few tokens
    with huge states weigh no more than others.
    """
    tiny = torch.finfo(torch.float32).tiny
    units = [
        (row / row.norm(dim=-1, keepdim=True).clamp(min=tiny)).sum(0) for row, _ in _row_by_row(hidden, mask)
    ]
    return 1 - (torch.stack(units).sum(0) / _count(hidden, mask)).square().sum()


def _count(hidden: Tensor, mask: Tensor | None) -> Tensor | int:
    return hidden.shape[0] * hidden.shape[1] if mask is None else mask.bool().sum().clamp(min=1)


def _row_by_row(hidden: Tensor, mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Each row (T, H) in float32, zero where padded, and where it is real (T, 1): little memory at a time."""
    for index, row in enumerate(hidden):
        real = torch.ones_like(row[:, :1], dtype=torch.bool) if mask is None else mask[index, :, None].bool()
        yield torch.where(real, row.float(), 0.0), real


@dataclass(frozen=True)
class Rows:
    """What a forward is given, as far as local losses need it.

    Attributes:
        mask: (B, T), true or 1 at real tokens; None if every token is real.
        ids: (B, T) token ids; None if the model is given embeddings.
        positions: (B or 1, T) position ids, which begin anew where packed rows do; None if not given.
        labels: (B, T), -100 where a token is not trained on; None if the model is not given any.
    """

    mask: Tensor | None
    ids: Tensor | None = None
    positions: Tensor | None = None
    labels: Tensor | None = None

    @classmethod
    def given(cls, args: tuple, kwargs: Mapping[str, Any], labels: Tensor | None) -> Rows:
        """From the arguments of a decoder.

        Raises:
            ValueError: the attention mask does not say which tokens are real.
        """
        ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
        inputs = kwargs.get("inputs_embeds") if ids is None else ids
        if mask is not None and inputs is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ValueError(
                    "local losses need the 2-D attention mask (batch, tokens) that says which tokens are "
                    "real: pass that one to the model"
                )
            mask = mask[:, -inputs.shape[1] :]
        return cls(None if inputs is None else mask, ids, kwargs.get("position_ids"), labels)

    def followed(self) -> Tensor:
        """(N,), places in the flattened (B, T) where the next token of the same row is one to predict."""
        assert self.ids is not None
        counts = torch.ones_like(self.ids, dtype=torch.bool)
        if self.mask is not None:
            counts = self.mask.bool()
        ahead = counts[:, 1:]
        if self.labels is not None:
            ahead = ahead & (self.labels[:, 1:] != -100)
        if self.positions is not None and self.positions.ndim == 2:
            ahead = ahead & (self.positions[:, 1:] != 0)
        return pad(counts[:, :-1] & ahead, (0, 1)).flatten().nonzero().squeeze(1)


class Reconstruction:
    """Every earlier block learns to reconstruct its own input: `mean (g_b(h_b) − sg(h_{b−1}))²`.

    The published local objective. Others have the same methods.

    Attributes:
        reads_tokens: whether it needs `Rows.ids`.
    """

    reads_tokens = False

    def __init__(self, tail: Sequence[nn.Module], lm_head: nn.Module) -> None:
        """`tail` is what the decoder puts its last hidden state through, before `lm_head`."""

    def check(self, rows: Rows) -> None:
        """Whether `rows` have what the loss needs.

        Raises:
            ValueError: they do not.
        """
        if self.reads_tokens and rows.ids is None:
            raise ValueError(
                "--aux_loss next_token predicts tokens and the model was given none: pass input_ids instead "
                "of inputs_embeds, or use --aux_loss recon"
            )

    def units_of(self, hidden: Tensor, own: Tensor) -> Tensor:
        """The hidden state (B, T, H) in whose channels' units a head begins its warm-up."""
        return own

    def loss(self, guess: Tensor, hidden: Tensor, own: Tensor, rows: Rows) -> Tensor:
        """ℓ_b from the head's output, the block's output and the block's input, all (B, T, H)."""
        return reconstruction_loss(guess, own, rows.mask)


class NextToken(Reconstruction):
    """Every earlier block learns to predict the next token, with its head as a lens on the LM head.

    `ℓ_b = Σ CE(next token | E norm(h_b + g_b(h_b))) / real tokens`, the sum over tokens whose next one has a
    label. E is the LM head and `norm` the final norm as it was at the start; both are constants here.

    The softmax is over the batch's own tokens and every s-th of the others, which stands for s of them.
    """

    reads_tokens = True
    sample = 8192
    """About how many tokens a softmax draws; a vocabulary of less than twice as many is taken whole."""

    def __init__(self, tail: Sequence[nn.Module], lm_head: nn.Module) -> None:
        self._tail = [_constant(module) for module in tail]
        self._lm_head = lm_head

    def units_of(self, hidden: Tensor, own: Tensor) -> Tensor:
        return hidden

    def loss(self, guess: Tensor, hidden: Tensor, own: Tensor, rows: Rows) -> Tensor:
        assert rows.ids is not None
        where = rows.followed()
        wanted = rows.ids.roll(-1, 1).flatten()[where]
        tokens, matrix, bias = self._columns(rows.ids, hidden.device)
        # The batch's own tokens come first, in order.
        columns = torch.searchsorted(tokens, wanted)
        summed = _CrossEntropy.apply(self._lens(guess, hidden, where), matrix, bias, columns)
        real = rows.ids.numel() if rows.mask is None else rows.mask.bool().sum().clamp(min=1)
        return summed / real

    def _lens(self, guess: Tensor, hidden: Tensor, where: Tensor) -> Tensor:
        """(N, E), what takes the place of the decoder's output where a token counts."""
        lens = (hidden + guess).flatten(0, 1)[where]
        for module in self._tail:
            weight = next(module.parameters(), lens)
            if weight.device != lens.device:
                module.to(lens.device)
            lens = module(lens.to(weight.dtype))
        return lens

    @torch.no_grad()
    def _columns(self, ids: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """The batch's own tokens (U,), then for C tokens of the softmax their LM head (C, E) and bias (C,).

        Which ones are drawn follows from the batch, so that every schedule draws the same.
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
    """A copy that does not learn; its tensors are cloned, since a fake tensor cannot be deep-copied."""
    clones: dict[int, Any] = {id(buffer): buffer.detach().clone() for buffer in module.buffers()}
    for parameter in module.parameters():
        clones[id(parameter)] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    return copy.deepcopy(module, clones)


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of `lens @ matrix.T + bias`, with the gradient of `lens` taken part by part.

    The logits (N, C) never exist as a whole, and none are kept for the backward.
    """

    rows = 1024

    @staticmethod
    def forward(ctx: Any, lens: Tensor, matrix: Tensor, bias: Tensor, wanted: Tensor) -> Tensor:
        gradient = torch.empty_like(lens)
        total = bias.new_zeros(())
        for start in range(0, len(lens), _CrossEntropy.rows):
            part = slice(start, start + _CrossEntropy.rows)
            logs = (lens[part].to(matrix.dtype) @ matrix.T + bias).log_softmax(-1)
            target = wanted[part, None]
            total -= logs.gather(1, target).sum()
            error = logs.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=logs.dtype))
            gradient[part] = error.to(matrix.dtype) @ matrix
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (outer * gradient).to(gradient.dtype), None, None, None


AUX_LOSSES: dict[str, type[Reconstruction]] = {"recon": Reconstruction, "next_token": NextToken}
"""What `--aux_loss` offers."""
