"""The block-major schedule is the eager one with each block stepped as soon as it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig

from conftest import fixed_rollouts, tiny
from lopt import LoPTConfig, LoPTDPOTrainer, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.trainers import NonFiniteError
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig

ROWS = [{"prompt": f"Question {i} ", "completion": "answer " * (i % 4 + 1)} for i in range(30)]
COMMON: dict[str, Any] = dict(
    max_steps=10, logging_steps=1, learning_rate=1e-2, optim="sgd", disable_tqdm=True, save_strategy="no",
    report_to="none", max_grad_norm=0.5, use_cpu=True, weight_decay=0.1,
)  # fmt: skip


@pytest.fixture
def run(tiny_folder: Path, tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def train(
        schedule: str, k: int, name: str = "llama-tied", config: dict | None = None, **changes: Any
    ) -> tuple[dict[str, torch.Tensor], list[dict], Any]:
        trainer = LoPTSFTTrainer(
            tiny(name, vocab_size=260, max_position_embeddings=256),
            args=LoPTSFTConfig(output_dir=str(tmp_path / schedule), **COMMON | changes),
            lopt_config=LoPTConfig(
                num_blocks=k, schedule=schedule, head_warmup_steps=2, lr_k1=1e-2, **config or {}
            ),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )
        trainer.train()
        return state(trainer), [r for r in trainer.state.log_history if "loss" in r], trainer

    return train


def state(trainer: Any) -> dict[str, torch.Tensor]:
    heads = {f"head.{n}": p.detach() for n, p in trainer.lopt.heads.named_parameters()}
    return {n: p.detach() for n, p in trainer.model.named_parameters()} | heads


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        error = (value - b[name]).norm() / value.norm().clamp(min=1e-12)
        assert error <= tolerance, (name, float(error))


# 30 rows by 2: accumulation 4 leaves 3 micro-batches for the last step of an epoch, 7 leaves 1.
@pytest.mark.parametrize("accumulation", [1, 4, 7])
@pytest.mark.parametrize("k", [2, 4])
def test_weights_are_those_of_the_eager_schedule(run, k: int, accumulation: int) -> None:
    flags = dict(
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=2,
        gradient_checkpointing=accumulation == 4,
    )
    eager, eager_logs, _ = run("eager", k, **flags)
    staged, logs, _ = run("block_major", k, **flags)
    same(eager, staged)
    for row, other in zip(eager_logs, logs, strict=True):
        assert other.keys() == row.keys()
        for key in row:
            if key.startswith(("loss", "local", "grad", "learning", "entropy", "mean_token")):
                assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key


@pytest.mark.parametrize("name", ["gemma3", "gpt2", "qwen3", "opt", "phi", "falcon", "mistral", "gpt_neox"])
def test_every_architecture(run, name: str) -> None:
    flags = dict(gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=3)
    eager, _, _ = run("eager", 3, name, **flags)
    staged, _, _ = run("block_major", 3, name, **flags)
    same(eager, staged)


def test_local_every(run) -> None:
    flags = dict(gradient_accumulation_steps=3, per_device_train_batch_size=2, config={"local_every": 3})
    same(run("eager", 4, **flags)[0], run("block_major", 4, **flags)[0])


def test_each_block_is_stepped_once_and_with_its_own_gradient_only(run, monkeypatch) -> None:
    stepped: list[set[int]] = []
    real = torch.optim.SGD.step

    def step(self: torch.optim.SGD, *args: Any, **kwargs: Any) -> Any:
        stepped.append({g["block"] for g in self.param_groups for p in g["params"] if p.grad is not None})
        return real(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    run("block_major", 4, gradient_accumulation_steps=3, per_device_train_batch_size=2, max_steps=2)
    assert stepped == [{0}, {1}, {2}, {3}] * 2


@pytest.mark.parametrize("generation", [1, 2, 4])
def test_grpo(tiny_folder: Path, tmp_path: Path, generation: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    fixed = fixed_rollouts(tokenizer, lambda i, prompt: "so be it " * (i % 3 + 1))
    ends = []
    for schedule in ("eager", "block_major"):
        trainer = LoPTGRPOTrainer(
            tiny("llama-tied", vocab_size=260, max_position_embeddings=256),
            reward_funcs=lambda completions, **_: [float(len(c) % 7) + i for i, c in enumerate(completions)],
            rollout_func=fixed,
            args=LoPTGRPOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=4, num_generations=4,
                gradient_accumulation_steps=2, steps_per_generation=generation, loss_type="grpo",
                num_iterations=2, beta=0.0, **COMMON | {"max_steps": 4},
            ),
            lopt_config=LoPTConfig(num_blocks=3, schedule=schedule, head_warmup_steps=2, lr_k1=1e-2),
            train_dataset=Dataset.from_list([{"prompt": f"Question {i}: "} for i in range(12)]),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        ends.append(state(trainer))
    same(*ends, tolerance=1e-5 if generation == 4 else 1e-6)


def test_dpo(tiny_folder: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Q {i}: ", "chosen": "yes " * (i % 3 + 1), "rejected": "no "} for i in range(12)]
    ends = []
    for schedule in ("eager", "block_major"):
        settings = COMMON | {"max_steps": 4, "bf16": False, "gradient_checkpointing": False}
        trainer = LoPTDPOTrainer(
            tiny("llama", vocab_size=260, max_position_embeddings=256),
            ref_model=tiny("llama", vocab_size=260, max_position_embeddings=256, seed=1),
            args=DPOConfig(
                output_dir=str(tmp_path), per_device_train_batch_size=2,
                gradient_accumulation_steps=2, **settings,
            ),
            lopt_config=LoPTConfig(num_blocks=3, schedule=schedule, head_warmup_steps=2, lr_k1=1e-2),
            train_dataset=Dataset.from_list(pairs),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        )  # fmt: skip
        trainer.train()
        ends.append(state(trainer))
    same(*ends)


def test_a_gradient_that_is_not_finite_stops_before_its_block_is_stepped(run, monkeypatch) -> None:
    from lopt.objective import ReconstructionHead

    real = ReconstructionHead.forward
    calls = []

    def spoilt(self: ReconstructionHead, hidden: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return real(self, hidden) * (float("nan") if len(calls) > 8 else 1.0)

    monkeypatch.setattr(ReconstructionHead, "forward", spoilt)
    with pytest.raises(NonFiniteError, match="the local loss of block"):
        run("block_major", 2, gradient_accumulation_steps=2, per_device_train_batch_size=2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [("mixtral", {}, "use --schedule eager"), ("llama", {"fp16": True}, "use --bf16")],
)
def test_what_cannot_work_is_refused(run, name: str, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run("block_major", 2, name, **changes)
