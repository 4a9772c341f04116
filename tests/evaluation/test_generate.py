"""Completions in a batch against completions one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import save_tiny
from lopt.evaluation import complete


@pytest.mark.parametrize("name", ["llama", "mixtral"])  # the latter with router logits, as after SFT
def test_completions_do_not_depend_on_the_batch(tmp_path: Path, name: str) -> None:
    folder = save_tiny(tmp_path, name)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = ["What is", "A much longer prompt than", "x"]
    together = complete(model, tokenizer, prompts, max_new_tokens=6, batch_size=3, progress="test")
    alone = [complete(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert getattr(model.config, "output_router_logits", True)
    assert complete(model, tokenizer, [], max_new_tokens=6) == []
    assert together == alone and tokenizer.padding_side == "right" and not model.training
