"""TRL's fused LM head without a float32 copy of its matrix's whole gradient.

TRL's trainers score tokens by a function that never holds the logits as a whole. Its backward goes over the
tokens, and over the vocabulary inside that: the gradient of the matrix grows everywhere until the last token,
in float32, and is converted then. Here the vocabulary is outside. Some rows of the matrix are done with all
tokens and written in the matrix's own number format, so that only these rows exist in float32. It is the same
sums in the same order. The tiles are still TRL's: its Triton kernels on a GPU, plain PyTorch elsewhere, where
their elementwise part takes a few tokens at a time.

Shapes: N tokens, H hidden size, V vocabulary; n tokens and C columns of a tile.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lopt import compat

logger = logging.getLogger(__name__)

TOKENS_ON_CPU = 256
"""Tokens at a time of what is elementwise in a tile on a CPU, where each step of it makes a float32 copy."""

ROWS_ON_CPU = 2048
"""Rows at a time of a product on a CPU, which copies bfloat16 factors to float32."""


@contextmanager
def lean_fused_head(device: torch.device) -> Iterator[None]:
    """Let TRL's fused LM head, in forwards inside, need no float32 copy of its matrix's whole gradient.

    Values and gradients are those of TRL's. The backward may be outside.

    Args:
        device: Where the head is.
    """
    _say_once(device.type)
    with compat.fused_head_by(_function(), _forward_tile if device.type == "cpu" else None):
        yield


@functools.cache
def _say_once(device: str) -> None:
    tiles = "Triton kernels" if compat.fused_head_has_kernels(torch.device(device)) else "plain PyTorch"
    logger.info("LM head: TRL's fused head by %s, the gradient of its matrix by rows", tiles)


def _forward_tile(original: Any, tile: Tensor, stride: int, *tensors_and_more: Any, **options: Any) -> None:
    """Run TRL's `_forward_tile` on a few tokens at a time.

    Args:
        tile: (n, C); the eight tensors that follow `stride` are (n,) each.
    """
    tensors, more = tensors_and_more[:8], tensors_and_more[8:]
    for rows in _slices(len(tile), TOKENS_ON_CPU):
        original(tile[rows], stride, *(tensor[rows] for tensor in tensors), *more, **options)


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@functools.cache
def _function() -> type[torch.autograd.Function]:
    """Return TRL's autograd function with another backward; made late, since its import takes seconds."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    class LeanHead(ChunkedLogProbFunction):
        @staticmethod
        def backward(ctx: Any, grad_log_probs: Any, grad_entropy: Any, *_: Any) -> tuple:
            hidden, weight, bias, *saved = ctx.saved_tensors
            outer = [None if g is None else g.float().contiguous() for g in (grad_log_probs, grad_entropy)]
            with maybe_gather_lm_head_ctx(weight, bias):
                gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
                for columns in _slices(len(weight), ctx.chunk_size):
                    gradients.add(columns, (*saved, *outer), ctx.compute_dtype, ctx.kernel_args)
            return (*gradients.final(), *[None] * 6)

    return LeanHead


class _Gradients:
    """Gradients of the head's input (N, H), matrix (V, H) and bias (V,), as far as each is needed."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needed: tuple[bool, ...]) -> None:
        self._inputs = hidden, weight, bias
        self._hidden = torch.zeros_like(hidden, dtype=torch.float32) if needed[0] else None
        self._weight = torch.empty_like(weight) if needed[1] else None
        self._bias = torch.empty_like(bias) if bias is not None and needed[2] else None

    def final(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return them in the number formats of what they belong to."""
        hidden = None if self._hidden is None else self._hidden.to(self._inputs[0].dtype)
        return hidden, self._weight, self._bias

    def add(
        self, columns: slice, values: tuple[Any, ...], dtype: torch.dtype, options: dict[str, Any]
    ) -> None:
        """Add what one part of the vocabulary gives, with all tokens.

        Args:
            columns: The part, of C tokens.
            values: Targets, log Z, entropy, gradients of log-probabilities and entropy, (N,) or None each.
            dtype: Of the logits.
            options: How logits follow from the projection, as TRL passes it to its tiles.
        """
        hidden, weight, bias = self._inputs
        matrix = weight[columns].to(dtype)
        total, bias_total = _float32_zeros(self._weight, columns), _float32_zeros(self._bias, columns)
        from trl.kernels.chunked_logprob import TOKEN_CHUNK_SIZE

        buffer = matrix.new_empty(min(len(hidden), TOKEN_CHUNK_SIZE), len(matrix))
        for tokens in _slices(len(hidden), TOKEN_CHUNK_SIZE):
            inputs = hidden[tokens].to(dtype)
            tile = torch.mm(inputs, matrix.t(), out=buffer[: len(inputs)])
            if bias is not None:
                tile.add_(bias[columns].to(dtype))
            size = TOKENS_ON_CPU if tile.device.type == "cpu" else len(tile)
            for rows in _slices(len(tile), size):
                part = [None if value is None else value[tokens][rows] for value in values]
                compat.logits_gradient(tile[rows], part, columns.start, options)
            if self._hidden is not None:
                _add_product(self._hidden[tokens], tile, matrix)
            if total is not None:
                _add_product(total, tile.t(), inputs)
            if bias_total is not None:
                bias_total += tile.sum(dim=0, dtype=torch.float32)
        for whole, done in ((self._weight, total), (self._bias, bias_total)):
            if whole is not None and done is not None and whole.dtype != torch.float32:
                whole[columns] = done


def _float32_zeros(gradient: Tensor | None, rows: slice) -> Tensor | None:
    """Return float32 zeros for some rows of a gradient: these rows themselves, if they are float32."""
    if gradient is None:
        return None
    own = gradient[rows]
    return own.zero_() if own.dtype == torch.float32 else torch.zeros_like(own, dtype=torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to a float32 sum."""
    size = ROWS_ON_CPU if total.device.type == "cpu" and a.dtype != torch.float32 else len(total)
    for rows in _slices(len(total), size):
        compat.add_product(total[rows], a[rows], b)
