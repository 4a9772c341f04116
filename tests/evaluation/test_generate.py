"""Completions in a batch against completions one by one."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from lopt.evaluation import complete


def test_completions_do_not_depend_on_the_batch(tiny_folder: Path) -> None:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_folder),
        AutoTokenizer.from_pretrained(tiny_folder),
    )
    prompts = ["What is", "A much longer prompt than", "x"]
    together = complete(model, tokenizer, prompts, max_new_tokens=6, batch_size=3, progress="test")
    alone = [complete(model, tokenizer, [p], max_new_tokens=6)[0] for p in prompts]
    assert together == alone and tokenizer.padding_side == "right" and not model.training
