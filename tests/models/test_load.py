"""Loading, saving, and tied embeddings."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from conftest import batch_of, save_tiny, tiny
from lopt import load_model, save_model
from lopt.models.load import load_tokenizer
from lopt.models.names import resolve_model
from lopt.tied_embeddings import untie_embeddings


def test_save_and_load(tmp_path: Path) -> None:
    model, tokenizer = tiny("gemma3"), None
    untie_embeddings(model)
    save_model(model, tmp_path / "new", tokenizer)
    loaded = load_model(str(tmp_path / "new"))
    assert {n: p.dtype for n, p in loaded.named_parameters()}.keys() == dict(model.named_parameters()).keys()
    assert torch.equal(loaded(**batch_of([5])).logits, model.eval()(**batch_of([5])).logits)
    with pytest.raises(ValueError, match="holds a model already"):
        save_model(model, tmp_path / "new")


def test_what_cannot_be_loaded_is_named(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"`param_dtype` must be one of .* \(got int4\)"):
        load_model(str(tiny_folder), dtype="int4")
    with pytest.raises(ValueError, match="is not a folder"):
        resolve_model("./nowhere")
    assert resolve_model("qwen3-4b") == "Qwen/Qwen3-4B" and resolve_model("org/name") == "org/name"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(str(tmp_path / "empty"))
    for step in (9, 11):
        (tmp_path / "empty" / f"checkpoint-{step}").mkdir()
    for load in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=r"has not ended: name its newest .*empty/checkpoint-11, or let"):
            load(str(tmp_path / "empty"))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_model(str(tmp_path))


def test_tokenizers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token == "<eos>"
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="no end-of-text token"):
        load_tokenizer(str(folder))
