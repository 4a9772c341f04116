"""A language model inside a multimodal class: text is trained on, the rest stays and is saved as it came."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3ForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from conftest import batch_of, byte_tokenizer
from lopt import LoPTConfig, LoPTGRPOTrainer, attach
from lopt.cli.main import main
from lopt.models.load import empty_model
from lopt.planning.measure import measure
from lopt.planning.run import Run
from lopt.planning.sizes import Sizes
from lopt.trainers.config import LoPTGRPOConfig
from tiny_models import small_config, small_model


def gemma3() -> Any:
    config = small_config(Gemma3ForConditionalGeneration.config_class)
    config.text_config.vocab_size, config.tie_word_embeddings = 260, True
    config.text_config.max_position_embeddings = 512
    return small_model(config, Gemma3ForConditionalGeneration)


def qwen2_vl() -> Any:
    text = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    text |= dict(num_key_value_heads=2, vocab_size=260, bos_token_id=1, eos_token_id=2)
    text["rope_parameters"] = dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
    pictures = dict(embed_dim=32, depth=1, num_heads=2, hidden_size=32)
    config = Qwen2VLConfig(text_config=text, vision_config=pictures, tie_word_embeddings=True)
    return Qwen2VLForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma3")
    gemma3().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    return path


@pytest.mark.parametrize("make", [gemma3, qwen2_vl])
def test_logits_stay_and_only_text_learns(make: Any) -> None:
    model, batch = make(), batch_of([9, 5, 2])
    plain = model(**batch).logits.detach()
    handle = attach(model, LoPTConfig(num_blocks=2, aux_loss="next_token"))
    out = model(**batch)
    assert torch.equal(out.logits.detach(), plain)
    out.loss.backward()
    for name, parameter in model.named_parameters():
        text = "language_model" in name or "lm_head" in name
        assert parameter.requires_grad == text and (parameter.grad is not None) == text, name
    assert len(handle.local_losses()) == 1
    handle.detach()
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("flags", ["", "--schedule block_major --offload block"])
def test_sft_saves_it_as_it_came(folder: Path, sums_file: Path, tmp_path: Path, flags: str) -> None:
    out = tmp_path / "out"
    command = ["sft", "--model_name_or_path", folder, "--train_file", sums_file, "--output_dir", out]
    command += ["--max_steps", 2, "--head_warmup_steps", 2, "--per_device_train_batch_size", 2, "--use_cpu"]
    command += flags.split()
    assert main([str(part) for part in command]) == 0
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Gemma3ForConditionalGeneration"] and config["model_type"] == "gemma3"
    name = "preprocessor_config.json"
    assert (out / name).read_text() == (folder / name).read_text()
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() <= after.keys()
    for name, value in before.items():
        is_text = "language_model" in name
        assert torch.equal(after[name], value) != is_text, name
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        assert type(auto.from_pretrained(out)) is Gemma3ForConditionalGeneration


def test_grpo(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    trainer = LoPTGRPOTrainer(
        model,
        reward_funcs=lambda completions, **_: [float(i % 2) for i, _ in enumerate(completions)],
        args=LoPTGRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, num_generations=2,
            max_completion_length=6, report_to="none", save_strategy="no", disable_tqdm=True,
            learning_rate=1e-3, use_cpu=True,
        ),
        lopt_config=LoPTConfig(num_blocks=2, head_warmup_steps=2),
        train_dataset=Dataset.from_list([{"prompt": "Say hello"}, {"prompt": "2 plus 2 is"}]),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    before = model.lm_head.weight.detach().clone()
    trainer.train()
    assert trainer.state.global_step == 1 and not torch.equal(model.lm_head.weight, before)


def test_eval_and_plan(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It rains in the mountains. " * 20)
    command = ["eval", "--model_name_or_path", folder, "--text", text, "--output_dir", tmp_path / "eval"]
    assert main([str(part) for part in command]) == 0
    config = gemma3().config
    sizes, text_only = Sizes.of(config), empty_model(config.text_config)
    assert sizes.model == sum(p.numel() for p in text_only.parameters())
    assert sizes.buffers > sum(p.nbytes for p in gemma3().model.vision_tower.parameters())
    assert measure(Run(config, batch=1, tokens=16), "lopt", False).boundary > 0
