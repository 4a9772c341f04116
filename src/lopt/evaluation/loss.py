"""Mean next-token loss of completions and of plain text, with logits only where a token counts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def completion_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = 16,
) -> float:
    """Mean loss in nats over the tokens of all completions, each after its prompt."""
    rows = []
    for prompt, completion in pairs:
        before = tokenizer(prompt)["input_ids"]
        after = tokenizer(completion, add_special_tokens=False)["input_ids"]
        rows.append((before + after, [False] * len(before) + [True] * len(after)))
    return _mean_loss(model, rows, batch_size)


def text_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: int = 2048,
    window: int = 128,
    batch_size: int = 16,
) -> list[float]:
    """Mean loss in nats per token of each window; see `text_loss`."""
    sums, counts = _window_losses(model, tokenizer, text, tokens, window, batch_size)
    return [total / count for total, count in zip(sums, counts, strict=True)]


def text_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: int = 2048,
    window: int = 128,
    batch_size: int = 16,
) -> float:
    """Mean loss in nats over the first `tokens` tokens of `text`, in windows of `window` tokens.

    Every window starts with the tokenizer's first special token, if it has one.

    Raises:
        ValueError: the text has no token to predict.
    """
    sums, counts = _window_losses(model, tokenizer, text, tokens, window, batch_size)
    return sum(sums) / sum(counts)


def _window_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    tokens: int,
    window: int,
    batch_size: int,
) -> tuple[list[float], list[int]]:
    """Summed loss and predicted tokens of each window that has any."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=tokens)["input_ids"]
    if len(ids) < 2:
        raise ValueError("the text is too short to measure a loss on: give at least two tokens")
    rows = []
    for at in range(0, len(ids), window):
        row = start + ids[at : at + window]
        rows.append((row, [False] + [True] * (len(row) - 1)))
    return _losses(model, [row for row in rows if len(row[0]) > 1], batch_size)


def _mean_loss(model: PreTrainedModel, rows: list[tuple[list[int], list[bool]]], batch_size: int) -> float:
    sums, counts = _losses(model, rows, batch_size)
    return sum(sums) / sum(counts)


@torch.no_grad()
def _losses(
    model: PreTrainedModel, rows: list[tuple[list[int], list[bool]]], batch_size: int
) -> tuple[list[float], list[int]]:
    """Summed loss and number of the tokens that count, row by row. The model's mode is kept.

    Args:
        rows: token ids, and which of them count.
    """
    training = model.training
    model.eval()
    sums: list[float] = []
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        width = max(len(ids) for ids, _ in part)
        ids = torch.tensor([r + [0] * (width - len(r)) for r, _ in part], device=model.device)
        mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r, _ in part], device=model.device)
        counts = torch.tensor([c + [False] * (width - len(c)) for _, c in part], device=model.device)[:, 1:]
        # Positions that predict nothing of interest never meet the head: a large vocabulary's
        # logits would dominate the cost.
        positions = counts.any(0).nonzero().flatten()
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=positions, use_cache=False).logits
        chosen = counts[:, positions]
        losses = torch.zeros(chosen.shape, device=model.device)
        targets = ids[:, 1:][:, positions][chosen]
        losses[chosen] = cross_entropy(logits[chosen].float(), targets, reduction="none")
        sums += losses.double().sum(1).tolist()
    model.train(training)
    return sums, [sum(counts) for _, counts in rows]
