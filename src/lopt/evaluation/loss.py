"""Mean next-token loss of completions and of plain text, with logits only where a token counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lopt.architectures import check_positions, compute_device
from lopt.core.boundaries import BoundaryReached


def completion_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 16,
) -> float:
    """Return the mean loss in nats over the tokens of all completions, each after its prompt."""
    return _mean(_completion_sums(model, tokenizer, pairs, batch_size))


def completion_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 16,
) -> list[float]:
    """Return the mean loss in nats per token of each completion after its prompt.

    With a chat template, both are text that it has rendered, which has its special tokens already.
    """
    rendered = tokenizer.chat_template is not None
    sums = _completion_sums(model, tokenizer, pairs, batch_size, add_special_tokens=not rendered)
    return [total / count for total, count in sums]


class WindowLoss(NamedTuple):
    """Mean loss in nats over the `tokens` predicted tokens of one window of a text, whose ids are `ids`."""

    loss: float
    tokens: int
    ids: list[int]


def text_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: int = 2048,
    window: int = 128,
    batch_size: int = 16,
) -> list[WindowLoss]:
    """Return losses of the first `tokens` tokens of `text` in windows of `window`; the last may be shorter.

    Every window starts with the tokenizer's first special token, if it has one; else its own first token is
    not predicted.

    Raises:
        ValueError: the text has no token to predict.
    """
    windows = text_windows(tokenizer, text, tokens, window)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [(start + ids, [False] + [True] * (len(start + ids) - 1)) for ids in windows]
    sums = _sums(model, rows, batch_size)
    return [WindowLoss(total / count, count, ids) for (total, count), ids in zip(sums, windows, strict=True)]


def text_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, tokens: int = 2048, window: int = 128
) -> list[list[int]]:
    """Return the token ids of each window that `text_losses` measures.

    Raises:
        ValueError: the text has no token to predict.
    """
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=tokens)["input_ids"]
    if len(ids) < 2:
        raise ValueError("the text is too short to measure a loss on: give at least two tokens")
    windows = [ids[at : at + window] for at in range(0, len(ids), window)]
    alone = tokenizer.bos_token_id is None and len(windows[-1]) == 1  # nothing comes before it
    return windows[:-1] if alone else windows


def text_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: int = 2048,
    window: int = 128,
    batch_size: int = 16,
) -> float:
    """Return the mean loss in nats over the first `tokens` tokens of `text`, by `text_losses`.

    Raises:
        ValueError: the text has no token to predict.
    """
    losses = text_losses(model, tokenizer, text, tokens, window, batch_size)
    return _mean([(part.loss * part.tokens, part.tokens) for part in losses])


def _completion_sums(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int,
    add_special_tokens: bool = True,
) -> list[tuple[float, int]]:
    """Return summed loss and number of tokens of each completion, in the order of `pairs`."""
    rows = []
    for prompt, completion in pairs:
        before = tokenizer(prompt, add_special_tokens=add_special_tokens)["input_ids"]
        after = tokenizer(completion, add_special_tokens=False)["input_ids"]
        rows.append((before + after, [False] * len(before) + [True] * len(after)))
    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))  # little padding in a batch
    sums = dict(zip(order, _sums(model, [rows[index] for index in order], batch_size), strict=True))
    return [sums[index] for index in range(len(rows))]


def _mean(sums: Sequence[tuple[float, int]]) -> float:
    return sum(total for total, _ in sums) / sum(count for _, count in sums)


@torch.no_grad()
def _sums(
    model: PreTrainedModel, rows: list[tuple[list[int], list[bool]]], batch_size: int
) -> list[tuple[float, int]]:
    """Return summed loss and number of counted tokens of each row (token ids, and which of them count).

    The model's mode is restored. In a pipeline the sums are NaN where another process has the last block.
    """
    check_positions(
        model, max(len(ids) for ids, _ in rows), "give shorter texts, or windows of {limit} at most"
    )
    training = model.training
    model.eval()
    device = compute_device(model)
    sums: list[tuple[float, int]] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([r + [0] * (width - len(r)) for r, _ in part], device=device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r, _ in part], device=device)
        counts = torch.tensor([c + [False] * (width - len(c)) for _, c in part], device=device)[:, 1:]
        # The head computes logits only where some row has a counted token: with a large vocabulary they
        # dominate the cost.
        positions = counts.any(0).nonzero().flatten()
        inputs = {"input_ids": ids, "attention_mask": mask, "logits_to_keep": positions, "use_cache": False}
        try:
            logits = model(**inputs).logits
        except BoundaryReached:  # in a pipeline, where another process has the last block
            sums += [(math.nan, 1)] * len(part)
            continue
        chosen = counts[:, positions]
        targets = ids[:, 1:][:, positions][chosen]
        losses = cross_entropy(logits[chosen].float(), targets, reduction="none")
        totals = losses.new_zeros(len(part)).index_add_(0, chosen.nonzero()[:, 0], losses)
        sums += zip(totals.tolist(), chosen.sum(1).tolist(), strict=True)
    model.train(training)
    return sums
