"""A stop in any phase leaves a whole checkpoint, and the resumed run ends bit for bit where it would have."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback

from conftest import tiny
from lopt import LoPTConfig, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.reliability.checkpoint import checkpoints, damage
from lopt.reliability.saving import NOTE
from lopt.reliability.stop import EXIT_STOPPED, Stopped, obeying
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig

ROWS = [{"prompt": f"Question {i} ", "completion": "answer " * (i % 4 + 1)} for i in range(12)]
COMMON: dict[str, Any] = dict(
    max_steps=4, save_strategy="no", learning_rate=1e-2, per_device_train_batch_size=2, logging_steps=1,
    gradient_accumulation_steps=2, disable_tqdm=True, report_to="none", use_cpu=True,
)  # fmt: skip


class Signal(TrainerCallback):
    """Sends SIGTERM to this process once, at the event `when` after so many steps."""

    def __init__(self, when: str, step: int) -> None:
        self.step = step
        setattr(self, when, self.send)

    def send(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def build(folder: str, grpo: bool = False, config: dict[str, Any] | None = None, **changes: Any) -> Any:
        kinds = (LoPTGRPOTrainer, LoPTGRPOConfig) if grpo else (LoPTSFTTrainer, LoPTSFTConfig)
        more: dict[str, Any] = dict(eval_dataset=Dataset.from_list(ROWS[:4]))
        if grpo:
            more = dict(reward_funcs=lambda completions, **_: [float(len(c) % 7) for c in completions])
            rollouts = dict(
                num_generations=2, max_completion_length=5, steps_per_generation=2, num_iterations=2
            )
            changes = rollouts | changes
        trainer, settings = kinds
        model = tiny("llama", vocab_size=260, max_position_embeddings=256, attention_dropout=0.2)
        return trainer(
            model,
            args=settings(output_dir=str(tmp_path / folder), **COMMON | changes),
            lopt_config=LoPTConfig(num_blocks=2, **dict(head_warmup_steps=2) | (config or {})),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            **more,
        )

    return build


BEST = dict(
    eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=1, save_strategy="steps", save_steps=1,
    load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
)  # fmt: skip
BY_EPOCH = dict(eval_strategy="epoch", max_steps=6, per_device_eval_batch_size=1)
BLOCK_MAJOR = dict(config=dict(schedule="block_major", offload="block"))
# Event, step, changes, the step of the checkpoint, what it leaves to do.
PHASES: dict[str, tuple[str, int, dict[str, Any], int, str | None]] = {
    "accumulation": ("on_substep_end", 2, {}, 2, None),
    "before the optimizer step": ("on_pre_optimizer_step", 2, {}, 3, None),
    "evaluation": ("on_prediction_step", 1, BEST, 1, "step"),
    "evaluation of an epoch": ("on_prediction_step", 3, BY_EPOCH, 3, "epoch"),
    "block-major": ("on_step_begin", 2, BLOCK_MAJOR, 2, None),
    "block-major, a block is stepped": ("on_pre_optimizer_step", 2, BLOCK_MAJOR, 3, None),
    "rollouts": ("on_step_begin", 3, dict(grpo=True), 3, None),
}


@pytest.mark.parametrize("phase", PHASES)
def test_stopped_and_resumed_is_the_whole_run(make: Callable[..., Any], tmp_path: Path, phase: str) -> None:
    event, at, changes, step, left = PHASES[phase]
    whole = make("whole", **changes)
    whole.train()
    stopped = make("stopped", **changes)
    stopped.add_callback(Signal(event, at))
    with (
        obeying(),
        pytest.raises(Stopped, match=rf"stopped by SIGTERM after step {step} of .* is whole") as stop,
    ):
        stopped.train()
    assert stop.value.code == EXIT_STOPPED
    newest = checkpoints(tmp_path / "stopped")[-1]
    assert newest.name == f"checkpoint-{step}" and damage(newest) is None
    assert json.loads((newest / NOTE).read_text())["left_to_do"] == left
    resumed = make("stopped", **changes)
    resumed.train(resume_from_checkpoint=True)
    ends = [
        dict(t.model.named_parameters()) | dict(t.lopt.heads.named_parameters()) for t in (whole, resumed)
    ]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name
    logs = [[row["step"] for row in t.state.log_history if "eval_loss" in row] for t in (whole, resumed)]
    assert logs[0] == logs[1]


def test_nothing_is_saved_before_the_first_step(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make("out", config=dict(head_warmup_steps=50))
    batches = trainer.head_warm_up_batches

    def signalled() -> Any:
        for number, batch in enumerate(batches()):
            if number == 1:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    trainer.head_warm_up_batches = signalled
    with (
        obeying(),
        pytest.raises(Stopped, match="by SIGINT before the first step was done: nothing"),
    ):
        trainer.train()
    assert not list((tmp_path / "out").glob("*"))


def test_a_time_limit(make: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make("out", max_steps=10_000)
    with pytest.raises(Stopped, match=r"stopped by `max_time` \(3 s\)"), obeying(3):
        trainer.train()
    assert all(damage(path) is None for path in checkpoints(tmp_path / "out"))
