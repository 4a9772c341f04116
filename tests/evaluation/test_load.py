"""Adapters are put into their base; what cannot fit is said before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lopt.evaluation import load, text_loss
from lopt.evaluation.load import Loading


def test_an_adapter_is_evaluated_in_its_base(tiny_folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder)
    plain.name_or_path = str(tiny_folder)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(plain, config)
    adapted.peft_config["default"].base_model_name_or_path = str(tiny_folder)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = Loading().model(str(tmp_path / "adapter"))
    tokenizer = Loading().tokenizer(str(tmp_path / "adapter"))
    words, base = "the quick brown fox", AutoModelForCausalLM.from_pretrained(tiny_folder)
    assert text_loss(loaded, tokenizer, words) == text_loss(adapted, tokenizer, words)
    assert text_loss(loaded, tokenizer, words) != text_loss(base, tokenizer, words)


def test_a_model_that_does_not_fit(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count = AutoModelForCausalLM.from_pretrained(tiny_folder).num_parameters()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(load, "free_memory", lambda device: 3 * count)
    with pytest.raises(
        ValueError, match=r"float32 and .* are free: `param_dtype` bfloat16 needs \d+\.\d KiB"
    ):
        Loading().model(str(tiny_folder))
    assert Loading("bfloat16").model(str(tiny_folder)).dtype == torch.bfloat16
    monkeypatch.setattr(load, "free_memory", lambda device: count)
    with pytest.raises(ValueError, match="use a smaller model"):
        Loading("bfloat16").model(str(tiny_folder))
