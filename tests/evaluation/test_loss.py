"""Losses against the model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt.evaluation import completion_loss, text_loss, text_losses

PAIRS = [("What is 1 plus 1?", " two"), ("And this?", " a longer one"), ("", "x")]


@pytest.fixture(scope="module")
def loaded(tiny_folder: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_folder), AutoTokenizer.from_pretrained(tiny_folder)


def test_completion_loss_is_the_mean_over_completion_tokens(loaded) -> None:
    model, tokenizer = loaded
    total, count = 0.0, 0
    for prompt, completion in PAIRS[:2]:
        before, after = tokenizer(prompt)["input_ids"], tokenizer(completion)["input_ids"]
        labels = torch.tensor([[-100] * len(before) + after])
        loss = model(input_ids=torch.tensor([before + after]), labels=labels).loss.item()
        total, count = total + loss * len(after), count + len(after)
    for batch_size in (1, 8):
        assert completion_loss(model, tokenizer, PAIRS[:2], batch_size) == pytest.approx(
            total / count, rel=1e-5
        )
    assert not model.training


def test_text_loss_reads_windows(loaded) -> None:
    model, tokenizer = loaded
    text = "the quick brown fox " * 3
    ids = tokenizer(text)["input_ids"]
    rows = [[tokenizer.bos_token_id, *ids[i : i + 16]] for i in range(0, 48, 16)]
    losses = [model(input_ids=torch.tensor([r]), labels=torch.tensor([r])).loss.item() for r in rows]
    assert text_loss(model, tokenizer, text, tokens=48, window=16) == pytest.approx(sum(losses) / 3, rel=1e-5)
    with pytest.raises(ValueError, match="too short"):
        text_loss(model, tokenizer, "")


def test_text_loss_is_the_mean_of_its_windows_over_tokens(loaded) -> None:
    model, tokenizer = loaded
    text = "the quick brown fox " * 3
    windows = text_losses(model, tokenizer, text, tokens=40, window=16, batch_size=2)
    assert [window.tokens for window in windows] == [16, 16, 8]
    assert [token for window in windows for token in window.ids] == tokenizer(text)["input_ids"][:40]
    mean = sum(window.loss * window.tokens for window in windows) / 40
    assert text_loss(model, tokenizer, text, tokens=40, window=16) == pytest.approx(mean, rel=1e-5)
    alone = text_losses(model, tokenizer, text, tokens=40, window=16, batch_size=1)[2]
    ids = torch.tensor([[tokenizer.bos_token_id, *windows[2].ids]])
    assert alone.loss == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
