"""Retention in a run: measured when it should be, without a trace in the training, stopped by its budget."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import fixed_rollouts, save_tiny
from lopt import LoPTConfig, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.cli.main import main
from lopt.evaluation import text_loss
from lopt.evaluation.retention_callback import RetentionCallback
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig

TEXTS = {"fox": "The quick brown fox jumps over the lazy dog. " * 3, "rain": "It rains in Spain. " * 4}
ROWS = [{"prompt": f"Question {i} ", "completion": "answer " * (i % 4 + 1)} for i in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"), "llama-tied", attention_dropout=0.2)


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Callable[..., LoPTSFTTrainer]:
    def build(config: LoPTConfig | None = None, name: str = "run", **changes: Any) -> LoPTSFTTrainer:
        settings: dict[str, Any] = dict(
            output_dir=str(tmp_path / name), max_steps=6, logging_steps=2, learning_rate=5e-3,
            save_strategy="no", report_to="none", per_device_train_batch_size=2, use_cpu=True,
            disable_tqdm=True,
        )  # fmt: skip
        return LoPTSFTTrainer(
            AutoModelForCausalLM.from_pretrained(folder),
            args=LoPTSFTConfig(**settings | changes),
            lopt_config=config or LoPTConfig(head_warmup_steps=2),
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:4]),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )

    return build


def watched(trainer: Any, **settings: Any) -> RetentionCallback:
    callback = RetentionCallback(trainer, TEXTS, tokens=64, **settings)
    trainer.add_callback(callback)
    return callback


def curve(trainer: Any) -> dict[int, dict[str, float]]:
    return {r["step"]: r for r in trainer.state.log_history if "retention/change" in r}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    heads = {f"head.{n}": p.detach() for n, p in trainer.lopt.heads.named_parameters()}
    return {n: p.detach() for n, p in trainer.model.named_parameters()} | heads


CONFIGS = {
    "lopt": LoPTConfig(head_warmup_steps=2),
    "e2e": LoPTConfig(method="e2e"),
    "travelling": LoPTConfig(num_blocks=4, head_warmup_steps=2, schedule="block_major", offload="block"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_training_does_not_know(make, name: str) -> None:
    """With and without: the same weights, losses and random numbers, dropout included."""
    trainers, ends = [], []
    for every in (None, 1):
        trainer = make(CONFIGS[name])  # seeds everything
        if every is not None:
            watched(trainer, every=every)
        trainer.train()
        trainers.append(trainer)
        ends.append((torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()))
    alone, beside = trainers
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1:] == ends[1][1:]
    for key, value in weights(alone).items():
        assert torch.equal(value, weights(beside)[key]), key
    keys = ("loss", "mean_token_accuracy", "num_tokens", "step")
    logs = [[{k: r[k] for k in keys} for r in t.state.log_history if "loss" in r] for t in (alone, beside)]
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert list(curve(beside)) == list(range(7)) and beside.model.training == alone.model.training


def test_when_and_what(make, folder: Path) -> None:
    """At the start, every so many steps and at the end; the values are those of the model then."""
    expected = {4: [0, 4, 6], None: [0, 1, 2, 3, 4, 5, 6]}
    for every, steps in expected.items():
        trainer = make()
        watched(trainer, every=every)
        trainer.train()
        assert list(curve(trainer)) == steps
    tokenizer = trainer.processing_class
    before = AutoModelForCausalLM.from_pretrained(folder)
    rise = []
    for name, text in TEXTS.items():
        first, last = (text_loss(m, tokenizer, text, tokens=64) for m in (before, trainer.model))
        assert curve(trainer)[0][f"retention/{name}_loss"] == pytest.approx(first, rel=1e-6)
        assert curve(trainer)[6][f"retention/{name}_loss"] == pytest.approx(last, rel=1e-6)
        rise.append(last - first)
    assert curve(trainer)[0]["retention/change"] == 0
    assert curve(trainer)[6]["retention/change"] == pytest.approx(sum(rise) / 2, abs=1e-6)
    with_evaluation = make(eval_strategy="steps", eval_steps=2)
    watched(with_evaluation)
    with_evaluation.train()
    assert list(curve(with_evaluation)) == [0, 2, 4, 6]


def test_the_budget_ends_the_run_with_a_checkpoint(make, tmp_path: Path, capsys) -> None:
    trainer = make(save_strategy="steps", save_steps=5, learning_rate=0.1)
    callback = watched(trainer, every=2, max_forgetting=0.01)
    trainer.train()
    changes = {step: row["retention/change"] for step, row in curve(trainer).items()}
    assert list(changes) == [0, 2] and changes[2] > 0.01 and trainer.state.global_step == 2
    assert callback.stopped is not None and callback.stopped in capsys.readouterr().out
    assert "Stopped at step 2 of 6" in callback.stopped and "max_forgetting = 0.01" in callback.stopped
    again = make(save_strategy="steps", save_steps=5, learning_rate=0.1)
    watched(again, every=2, max_forgetting=0.01)
    with pytest.raises(ValueError, match=r"nats per token at step 2, above `max_forgetting` 0\.01: raise it"):
        again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    free = make()
    callback = watched(free, every=2, max_forgetting=100.0)
    free.train()
    assert callback.stopped is None and free.state.global_step == 6


def test_a_resumed_run_keeps_its_start(make, tmp_path: Path) -> None:
    curves = []
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-3")):
        trainer = make(save_strategy="steps", save_steps=3)
        watched(trainer, every=2)
        trainer.train(resume_from_checkpoint=checkpoint)
        curves.append(curve(trainer))
    assert curves[1] == curves[0] and list(curves[0]) == [0, 2, 4, 6]
    late, plain = make(), make(save_strategy="steps", save_steps=3, name="plain")
    plain.train()
    watched(late, every=2)  # the checkpoint knows no start
    late.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-3"))
    assert list(curve(late)) == [3, 4, 6] and curve(late)[3]["retention/change"] == 0


def test_benchmarks(make, shared_data: Path) -> None:
    """Scores are logged beside the texts and touch nothing, and spend no budget."""
    pytest.importorskip("lm_eval")
    alone = make()
    alone.train()
    beside = make()
    settings = dict(tasks=["arc_challenge"], data_dir=shared_data, limit=3, every=3)
    callback = watched(beside, max_forgetting=100.0, **settings)
    beside.train()
    for key, value in weights(alone).items():
        assert torch.equal(value, weights(beside)[key]), key
    scores = [row["retention/arc_challenge_acc_norm"] for row in curve(beside).values()]
    assert len(scores) == 3 and all(score * 3 == pytest.approx(round(score * 3)) for score in scores)
    assert curve(beside)[6]["retention/tasks_change"] == pytest.approx(scores[-1] - scores[0])
    assert callback.stopped is None
    travelling = make(CONFIGS["travelling"])
    with pytest.raises(ValueError, match="`offload` block rules out: use `texts`"):
        RetentionCallback(travelling, **settings)


def test_grpo(folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = LoPTGRPOTrainer(
        AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completions, **_: [float(len(c) % 5) for c in completions],
        rollout_func=fixed_rollouts(tokenizer, lambda i, prompt: "yes" * (i % 4 + 1)),
        args=LoPTGRPOConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=4,
            max_completion_length=6, disable_tqdm=True, save_strategy="no", report_to="none", use_cpu=True,
        ),
        lopt_config=LoPTConfig(head_warmup_steps=2),
        train_dataset=Dataset.from_list([{"prompt": f"Question {i}: "} for i in range(12)]),
        processing_class=tokenizer,
    )  # fmt: skip
    watched(trainer)
    trainer.train()
    assert list(curve(trainer)) == [0, 1, 2]


def test_command(folder: Path, sums_file: Path, tmp_path: Path, capsys) -> None:
    """Stopped early from the command line: exit code 0, a model, a page, a line; and it is in the logs."""
    text = tmp_path / "text.txt"
    text.write_text(TEXTS["fox"])
    out = tmp_path / "out"
    flags = {
        "--model_name_or_path": folder, "--train_file": sums_file, "--output_dir": out, "--max_steps": 6,
        "--learning_rate": 0.1, "--head_warmup_steps": 2, "--retention_text": text, "--retention_every": 2,
        "--max_forgetting": 0.01, "--report_to": "tensorboard", "--save_steps": 5,
    }  # fmt: skip
    assert main(["sft", *(str(x) for pair in flags.items() for x in pair)]) == 0
    said = capsys.readouterr().out
    assert said.count("Stopped at step 2 of 6") == 2 and f"The curve is {out / 'retention.html'}" in said
    assert "Stopped at step 2 of 6" in (out / "report.html").read_text()
    assert (out / "model.safetensors").is_file() and (out / "checkpoint-2").is_dir()
    assert list(out.rglob("events.out.tfevents*"))
    page = (out / "retention.html").read_text()
    assert "Stopped at step 2" in page and "<svg" in page
    assert (out / "retention.svg").read_text().startswith("<svg")
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "retention/text_loss" in row] == [0, 2]
