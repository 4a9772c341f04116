"""A part of a model: the weights of its blocks, as the files have them, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lopt.models.part
from conftest import tiny
from lopt import LoPTConfig, attach
from lopt.compat import replaced
from lopt.models.load import load_model
from lopt.models.part import load_part
from tiny_models import small_model_of

HALVES = LoPTConfig(num_blocks=2)


@pytest.mark.parametrize("architecture", ["llama-tied", "gemma3", "gpt2", "lfm2", "phi3"])
def test_blocks_have_their_weights_and_all_buffers_are_there(architecture: str, tmp_path: Path) -> None:
    whole = tiny(architecture)
    whole.save_pretrained(tmp_path)
    weights, buffers = dict(whole.named_parameters()), dict(whole.named_buffers())
    found: set[str] = set()
    for block in (0, 1):
        part = load_part(str(tmp_path), HALVES, [block])
        assert (
            not part.training and part.generation_config.eos_token_id == whole.generation_config.eos_token_id
        )
        real = {name: value for name, value in part.named_parameters() if not value.is_meta}
        assert all(torch.equal(value, weights[name]) for name, value in real.items())
        assert all(torch.equal(value, buffers[name]) for name, value in part.named_buffers())
        handle = attach(part, HALVES)
        assert not any(p.is_meta for p in handle.block_parameters(block))
        assert len(real) < len(weights)
        found |= real.keys()
    assert found == weights.keys()


@pytest.mark.parametrize("name", ["gptj", "llama"])
def test_attention_is_that_of_a_whole_model(name: str, tmp_path: Path) -> None:
    small_model_of(name).save_pretrained(tmp_path)
    part, whole = load_part(str(tmp_path), HALVES, [1]), load_model(str(tmp_path))
    assert part.config._attn_implementation == whole.config._attn_implementation


def test_only_files_with_its_weights_are_opened(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    opened: list[str] = []
    original = lopt.models.part.safe_open

    def spy(path: str, **options: Any) -> Any:
        opened.append(Path(path).name)
        return original(path, **options)

    with replaced(lopt.models.part, safe_open=spy):
        load_part(str(tmp_path), HALVES, [1])
    last = ("model.layers.2", "model.layers.3", "model.norm", "lm_head")
    assert set(opened) == {file for key, file in index.items() if key.startswith(last)} < set(index.values())


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    norm = weights.pop("model.norm.weight")
    save_file(weights | {"norm.weight": norm}, file)
    load_part(str(tmp_path), HALVES, [0])
    with pytest.raises(ValueError, match=r"its files have no model.norm.weight.* save it again"):
        load_part(str(tmp_path), HALVES, [1])
    save_file(weights | {"model.norm.weight": norm[1:].clone()}, file)
    with pytest.raises(ValueError, match=r"model.norm.weight is .* get both from one place"):
        load_part(str(tmp_path), HALVES, [1])
