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
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = tokenizer(text, add_special_tokens=False, truncation=True, max_length=tokens)["input_ids"]
    if len(ids) < 2:
        raise ValueError("the text is too short to measure a loss on: give at least two tokens")
    rows = []
    for at in range(0, len(ids), window):
        row = start + ids[at : at + window]
        rows.append((row, [False] + [True] * (len(row) - 1)))
    return _mean_loss(model, rows, batch_size)


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, rows: list[tuple[list[int], list[bool]]], batch_size: int) -> float:
    """`rows`: token ids, and which of them count. The model's mode is kept."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
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
        targets = ids[:, 1:][:, positions][chosen]
        total += cross_entropy(logits[chosen].float(), targets, reduction="sum").item()
        count += targets.numel()
    model.train(training)
    return total / count
