"""Rows longer than a table of positions: one line before training, evaluation or planning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from trl import DPOConfig

from conftest import byte_tokenizer, tiny
from lopt import LoPTConfig, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.evaluation.generate import complete
from lopt.evaluation.loss import completion_loss, text_loss
from lopt.planning.measure import measure
from lopt.planning.run import Run
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig
from lopt.trainers.dpo import LoPTDPOTrainer

LONG, SHORT = "what is this " * 6, "what"
CONFIGS = {LoPTSFTTrainer: LoPTSFTConfig, LoPTDPOTrainer: DPOConfig, LoPTGRPOTrainer: LoPTGRPOConfig}


def model(name: str) -> Any:
    return tiny(name, vocab_size=260)  # of 64 positions


def train(folder: Path, kind: Any, name: str, rows: list[dict[str, str]], **changes: Any) -> None:
    settings = dict(output_dir=str(folder), max_steps=1, use_cpu=True, disable_tqdm=True, report_to="none")
    settings |= dict(per_device_train_batch_size=2, save_strategy="no") | changes
    more = (
        dict(reward_funcs=lambda completions, **_: [0.0] * len(completions))
        if kind is LoPTGRPOTrainer
        else {}
    )
    made = model(name)
    made.save_pretrained(folder / "model")  # where DPO loads its reference from
    kind(
        type(made).from_pretrained(folder / "model"),
        args=CONFIGS[kind](**settings),
        lopt_config=LoPTConfig(num_blocks=2, head_warmup_steps=0),
        train_dataset=Dataset.from_list(rows),
        processing_class=byte_tokenizer(),
        **more,
    ).train()


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_sft(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": SHORT, "completion": LONG}, {"prompt": SHORT, "completion": "short"}]
    with pytest.raises(
        ValueError, match=r"^a row of \d+ tokens .* table of 64 positions: set `max_length` to 64"
    ):
        train(tmp_path, LoPTSFTTrainer, name, rows)
    train(tmp_path, LoPTSFTTrainer, name, rows, max_length=64)


def test_dpo(tmp_path: Path) -> None:
    rows = [{"prompt": SHORT, "chosen": "yes", "rejected": LONG}] * 2
    with pytest.raises(ValueError, match="set `max_length` to 64"):
        train(tmp_path, LoPTDPOTrainer, "gpt2", rows)
    train(tmp_path, LoPTDPOTrainer, "gpt2", rows, max_length=64)


def test_grpo(tmp_path: Path) -> None:
    rows = [{"prompt": SHORT}, {"prompt": SHORT * 3}]
    settings = dict(num_generations=2, max_completion_length=60)
    with pytest.raises(ValueError, match="lower `max_completion_length`"):
        train(tmp_path, LoPTGRPOTrainer, "gpt2", rows, **settings)
    train(tmp_path, LoPTGRPOTrainer, "gpt2", rows, **settings | dict(max_completion_length=4))


def test_evaluation_and_planning() -> None:
    gpt2, tokenizer = model("gpt2"), byte_tokenizer()
    with pytest.raises(ValueError, match="prompt and completion together have 64 at most"):
        complete(gpt2, tokenizer, [SHORT], 80)
    with pytest.raises(ValueError, match="give shorter texts, or windows of 64 at most"):
        completion_loss(gpt2, tokenizer, [(SHORT, LONG)])
    assert text_loss(gpt2, tokenizer, LONG * 3, window=32) > 0
    with pytest.raises(ValueError, match="windows of 64 at most"):
        text_loss(gpt2, tokenizer, LONG * 3)
    run = dict(config=gpt2.config, batch=1)
    with pytest.raises(ValueError, match="set `max_length` to 64 or less"):
        measure(Run(tokens=65, **run), "e2e", False)
    measure(Run(tokens=64, **run), "e2e", False)
