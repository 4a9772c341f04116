"""Embeddings that are shared with the LM head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import batch_of, tiny
from lopt.tied_embeddings import retie_embeddings, shares_embeddings, untie_embeddings


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "llama-tied"])
def test_untie_and_retie(name: str, tmp_path: Path) -> None:
    model, batch = tiny(name), batch_of([5, 3])
    logits = model(**batch).logits
    assert shares_embeddings(model)
    untie_embeddings(model)
    assert not shares_embeddings(model) and torch.equal(model(**batch).logits, logits)
    assert retie_embeddings(model) and shares_embeddings(model) and model.config.tie_word_embeddings
    untie_embeddings(model)
    model.get_output_embeddings().weight.data[0] += 1
    assert not retie_embeddings(model)  # they have gone different ways
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not shares_embeddings(again) and torch.equal(again(**batch).logits, model.eval()(**batch).logits)
