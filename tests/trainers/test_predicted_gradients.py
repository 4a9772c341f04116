"""Runs whose earlier blocks follow predicted gradients: every schedule and a resumed run end alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from conftest import tiny
from lopt import LoPTConfig, LoPTSFTTrainer
from lopt.trainers.checks import check_settings
from lopt.trainers.config import LoPTDPOConfig, LoPTSFTConfig

ROWS = [{"prompt": f"Question {i} ", "completion": "answer " * (i % 4 + 1)} for i in range(30)]
BLOCK_MAJOR = dict(schedule="block_major", stages=5, offload="block")


def train(tiny_folder: Path, folder: Path, checkpoint: str | None = None, **config: Any) -> LoPTSFTTrainer:
    args = LoPTSFTConfig(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, logging_steps=1, save_steps=3, report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = LoPTSFTTrainer(
        tiny("llama", vocab_size=260, max_position_embeddings=256),
        args=args,
        lopt_config=LoPTConfig(num_blocks=4, aux_loss="predicted_gradient", refit_every=2, **config),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )
    trainer.train(checkpoint)
    return trainer


def weights(trainer: LoPTSFTTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_schedules_and_a_resumed_run_end_alike(tiny_folder: Path, tmp_path: Path) -> None:
    start = dict(tiny("llama", vocab_size=260, max_position_embeddings=256).named_parameters())
    eager = train(tiny_folder, tmp_path / "eager")
    ended = weights(eager)
    assert all(not torch.equal(value, start[name]) for name, value in ended.items())
    cosines = [
        row[f"predicted_gradient/block_{block}"]
        for row in eager.state.log_history
        if "predicted_gradient/block_1" in row
        for block in (1, 2, 3)
    ]
    assert len(cosines) == 6 and all(0.2 < cosine < 1 for cosine in cosines)  # before steps 3 and 5

    staged = weights(train(tiny_folder, tmp_path / "staged", **BLOCK_MAJOR))
    for name, value in ended.items():
        torch.testing.assert_close(staged[name], value, rtol=1e-5, atol=1e-6)

    resumed = weights(
        train(tiny_folder, tmp_path / "staged", str(tmp_path / "staged" / "checkpoint-3"), **BLOCK_MAJOR)
    )
    assert all(torch.equal(value, staged[name]) for name, value in resumed.items())


def test_other_losses_than_that_of_sft_are_refused(tmp_path: Path) -> None:
    config = LoPTConfig(aux_loss="predicted_gradient")
    with pytest.raises(ValueError, match="labelled tokens, which SFT alone has: use `aux_loss` recon"):
        check_settings(LoPTDPOConfig(output_dir=str(tmp_path), use_cpu=True), config)
