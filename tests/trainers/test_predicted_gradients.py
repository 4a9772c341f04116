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


def train(
    tiny_folder: Path, folder: Path, checkpoint: str | None = None, batch: int = 2, **config: Any
) -> LoPTSFTTrainer:
    args = LoPTSFTConfig(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=batch,
        gradient_accumulation_steps=4 // batch,
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


def test_micro_batches_count_by_their_labels(tiny_folder: Path, tmp_path: Path) -> None:
    """Also where earlier blocks rest in the steps before a fit."""
    whole, parts = (
        weights(train(tiny_folder, tmp_path / str(batch), batch=batch, local_every=2)) for batch in (4, 1)
    )
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-4, atol=1e-5)


REFUSED = {
    "DPO": (LoPTDPOConfig, {}, {}, "labelled tokens, which SFT alone has: use `aux_loss` recon"),
    "another loss": (LoPTSFTConfig, dict(loss_type="dft"), {}, "plain cross-entropy: use `loss_type` nll"),
    "one block": (LoPTSFTConfig, {}, dict(num_blocks=1), "needs an earlier block that learns"),
    "all frozen": (
        LoPTSFTConfig,
        {},
        dict(num_blocks=3, frozen_blocks=2),
        "needs an earlier block that learns",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    kind, args, config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        check_settings(
            kind(output_dir=str(tmp_path), use_cpu=True, **args),
            LoPTConfig(aux_loss="predicted_gradient", **config),
        )
