"""What LoPTSFTTrainer changes in TRL's, against TRL's. The runs themselves: tests/cli/test_sft.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTTrainer

from conftest import tiny
from lopt import LoPTConfig
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.config import LoPTSFTConfig


@pytest.mark.parametrize("completion_only", [True, False])
def test_end_to_end_is_trls_own_run(tiny_folder: Path, tmp_path: Path, completion_only: bool) -> None:
    """Method e2e: the same losses and weights as SFTTrainer, though fewer positions meet the head."""
    rows = [{"prompt": f"Question {i} ", "completion": f"answer {i * i}"} for i in range(16)]
    outcome = []
    for trainer_class, extra in (
        (SFTTrainer, {}),
        (LoPTSFTTrainer, {"lopt_config": LoPTConfig(method="e2e")}),
    ):
        trainer = trainer_class(
            tiny("llama-tied", vocab_size=260, max_position_embeddings=256),
            args=LoPTSFTConfig(
                output_dir=str(tmp_path), max_steps=4, logging_steps=1, save_strategy="no",
                per_device_train_batch_size=4, learning_rate=1e-3, disable_tqdm=True,
                completion_only_loss=completion_only,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
            **extra,
        )  # fmt: skip
        trainer.train()
        losses = [
            (row["loss"], row["mean_token_accuracy"]) for row in trainer.state.log_history if "loss" in row
        ]
        outcome.append((losses, dict(trainer.model.named_parameters())))
    (plain_losses, plain), (losses, ours) = outcome
    assert losses == [pytest.approx(pair, rel=1e-5) for pair in plain_losses]
    assert plain.keys() == ours.keys()
    for name, parameter in plain.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=1e-5)
