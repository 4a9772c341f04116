"""`--optim`: any class of torch.optim, what transformers knows, and enough host memory for its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer

from conftest import tiny
from lopt import LoPTConfig, LoPTSFTTrainer
from lopt.engine.optimizer import MASTER
from lopt.trainers import optimizer as module
from lopt.trainers.config import LoPTSFTConfig

ROWS = [{"prompt": f"Question {i} ", "completion": "answer"} for i in range(8)]

SETTINGS: dict[str, Any] = dict(max_steps=2, disable_tqdm=True, report_to="none", save_strategy="no")


@pytest.fixture
def trainer(tiny_folder: Path, tmp_path: Path):
    def make(
        config: LoPTConfig | None = None, peft: Any = None, dtype: Any = torch.float32, **flags: Any
    ) -> LoPTSFTTrainer:
        return LoPTSFTTrainer(
            tiny("llama", dtype, vocab_size=260),
            args=LoPTSFTConfig(
                output_dir=str(tmp_path), max_steps=2, disable_tqdm=True, report_to="none", **flags
            ),
            lopt_config=config or LoPTConfig(head_warmup_steps=1),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
            peft_config=peft,
        )

    return make


@pytest.mark.parametrize(
    ("flags", "kind", "expected"),
    [
        (dict(optim="NAdam", adam_beta1=0.8), torch.optim.NAdam, dict(betas=(0.8, 0.999))),
        (dict(optim="SGD", optim_args="momentum=0.5, nesterov=True"), torch.optim.SGD,
         dict(momentum=0.5, nesterov=True, fused=True)),
        (dict(optim="adamw_torch_fused"), torch.optim.AdamW, dict(fused=True)),
        (dict(optim="rmsprop"), torch.optim.RMSprop, {}),
    ],
)  # fmt: skip
def test_names(trainer, flags: dict, kind: type, expected: dict) -> None:
    made = trainer(**flags, learning_rate=3e-3)
    assert made.args.optim == flags["optim"]
    made.train()
    inner = made.bare_optimizer().optimizer
    assert type(inner) is kind
    for group in inner.param_groups:
        assert expected.items() <= group.items()
    assert made.state.log_history[-1]["train_loss"] > 0


@pytest.mark.parametrize("method", ["e2e", "frozen", "lopt"])
def test_small_steps_move_bfloat16_weights_by_every_method(trainer, method: str) -> None:
    """AdamW's first steps are as large as the learning rate, here a fiftieth of a bfloat16's last place."""
    made = trainer(LoPTConfig(method=method, head_warmup_steps=1, lr_k1=1e-5), learning_rate=1e-5)
    made.model.bfloat16()
    before = {name: p.detach().clone() for name, p in made.model.named_parameters()}
    made.train()
    for name, parameter in made.model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            share = (parameter != before[name]).float().mean().item()
            assert (share == 0) if not parameter.requires_grad else 0.001 < share < 0.3, (name, share)


def test_adapters_keep_the_precision_that_was_asked_for(trainer) -> None:
    adapters = LoraConfig(target_modules="all-linear")
    made = trainer(LoPTConfig(method="lora"), adapters, master_weights=True, state_dtype="bfloat16")
    for parameter in made.model.parameters():
        if parameter.requires_grad:  # as QLoRA's are in TRL
            parameter.data = parameter.data.bfloat16()
    made.train()
    for state in made.bare_optimizer().state.values():
        assert state["exp_avg"].dtype == torch.bfloat16 and state[MASTER].dtype == torch.float32


@pytest.mark.parametrize(
    ("place", "asked", "expected"), [("cpu", None, True), ("cpu", False, False), ("auto", None, False)]
)
def test_a_host_optimizer_keeps_masters_unless_told_not_to(trainer, place, asked, expected) -> None:
    config = LoPTConfig(schedule="block_major", offload="block", optimizer_device=place, head_warmup_steps=1)
    made = trainer(config, dtype=torch.bfloat16, master_weights=asked)
    made.train()
    assert any(MASTER in state for state in made.bare_optimizer().state.values()) == expected


def test_too_little_host_memory_is_said_before_the_first_step(trainer, monkeypatch) -> None:
    monkeypatch.setattr(module, "free_memory", lambda device: 100_000)
    config = LoPTConfig(schedule="block_major", offload="optimizer", head_warmup_steps=1)
    with pytest.raises(ValueError, match=r"`offload` keeps .* KiB of optimizer state .* 97.7 KiB are free"):
        trainer(config).train()
    trainer(config, optim="SGD").train()  # has no state


def test_every_process_of_the_machine_needs_host_memory(trainer, monkeypatch) -> None:
    config = LoPTConfig(schedule="block_major", offload="optimizer", head_warmup_steps=1)
    made = trainer(config, optim="AdamW")
    parameters = sum(p.numel() for p in [*made.model.parameters(), *made.lopt.heads.parameters()])
    monkeypatch.setattr(module, "free_memory", lambda device: 8 * parameters)  # Adam's, of one process
    made.create_optimizer()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"\(3 processes keep .* KiB each\), of which .* fewer processes on"):
        module.block_optimizer(made)
