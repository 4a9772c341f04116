"""A pipeline of processes trains through the commands as one process does, and resumes with any number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from lopt import LoPTConfig
from lopt.trainers.checks import check_settings
from lopt.trainers.config import LoPTGRPOConfig
from lopt.trainers.pipeline import Reports, join_pipeline, take_place
from pipeline_runs import assert_same, figures, run, weights


@pytest.fixture
def flags(tiny_folder: Path, sums_file: Path) -> list[str]:
    given = dict(
        model_name_or_path=tiny_folder, train_file=sums_file, report_to="none", seed=3, learning_rate=1e-3,
        per_device_train_batch_size=2, gradient_accumulation_steps=3, max_steps=4, logging_steps=1,
        head_warmup_steps=2, num_blocks=3, disable_tqdm=True, held_out=6, eval_strategy="steps", eval_steps=2,
        save_strategy="no",
    )  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_sft_and_a_resume_with_other_processes(flags: list[str], tmp_path: Path) -> None:
    """With head warm-up, evaluation, retention, offloaded stages; 3 processes, then 2, then 1."""
    one, three, text = tmp_path / "one", tmp_path / "three", tmp_path / "text.txt"
    text.write_text("It rains on the hills and it is dry by the sea. " * 8)
    flags += ["--retention_text", str(text), "--retention_every", "2", "--retention_tokens", "100"]
    flags += ["--save_strategy", "steps", "--save_steps", "2"]
    flags += ["--load_best_model_at_end", "true", "--metric_for_best_model", "loss"]
    run(1, "sft", *flags, "--output_dir", one, "--schedule", "block_major")
    staged = ("--stages", 5, "--offload", "block", "--optimizer_device", "cpu")
    run(3, "sft", *flags, "--output_dir", three, "--schedule", "pipeline", *staged)
    assert_same(one, three)
    rows = figures(three)
    assert rows == figures(one)
    assert any("retention/text_loss" in row for row in rows) and any("eval_loss" in row for row in rows)
    logged = [
        row for row in json.loads((three / "trainer_state.json").read_text())["log_history"] if "loss" in row
    ]
    assert all(0 <= row[f"busy_share/rank_{rank}"] <= 1 for row in logged for rank in range(3))
    for name, ranks, schedule in (
        ("two", 2, ("pipeline", "--pipeline_size", 2)),
        ("again", 1, ("block_major",)),
    ):
        folder = tmp_path / name
        shutil.copytree(three / "checkpoint-2", folder / "checkpoint-2")
        run(ranks, "sft", *flags, "--output_dir", folder, "--schedule", *schedule, "--resume")
        assert_same(one, folder)


def test_replicas_and_frozen_blocks(flags: list[str], tmp_path: Path) -> None:
    """Two pipelines of two learn what two processes learn that have the whole model."""
    whole, grid = tmp_path / "whole", tmp_path / "grid"
    less = [*flags, "--method", "frozen", "--num_blocks", "2"]
    run(2, "sft", *less, "--output_dir", whole, "--schedule", "block_major")
    run(4, "sft", *less, "--output_dir", grid, "--schedule", "pipeline")
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(grid)[name], value, rtol=1e-6, atol=1e-7)


def test_dpo(flags: list[str], tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": f"What is {n}? ", "chosen": f"It is {n}.", "rejected": "no" * (1 + n % 4)}
        for n in range(24)
    ]
    pairs.write_text("\n".join(map(json.dumps, rows)) + "\n")
    given = [*flags, "--train_file", str(pairs), "--precompute_ref_log_probs"]
    run(1, "dpo", *given, "--output_dir", tmp_path / "one", "--schedule", "block_major")
    run(2, "dpo", *given, "--output_dir", tmp_path / "two", "--schedule", "pipeline", "--pipeline_size", 2)
    assert_same(tmp_path / "one", tmp_path / "two")
    assert figures(tmp_path / "one") == figures(tmp_path / "two")


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoPTConfig(schedule="pipeline", num_blocks=2)
    with pytest.raises(ValueError, match="this process has joined none"):
        take_place(config)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node 2"):
        join_pipeline(config)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"`pipeline_size` must be a divisor of 3, .* \(got 2\)"):
        join_pipeline(config)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ValueError, match=r"needs arguments of lopt\.trainers\.config"):
        check_settings(TrainingArguments(str(tmp_path), use_cpu=True), config)
    with pytest.raises(ValueError, match="rollouts need the whole model"):
        check_settings(LoPTGRPOConfig(str(tmp_path), use_cpu=True), config)
    with pytest.raises(ValueError, match="`pipeline_size` 2 needs `schedule` pipeline"):
        LoPTConfig(pipeline_size=2)


def test_norms_of_all_processes_make_the_shares_of_one() -> None:
    """Steps of norms 3 and 4, then 0 and 5: shares 0.36 and 0.64, then 0 and 1."""
    shares = Reports(None)._shares([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 4.0], [0.0, 5.0]]])  # type: ignore[arg-type]
    expected = {"grad_norm": 5.0, "grad_share/block_1": 0.18, "grad_share/block_2": 0.82}
    assert shares == pytest.approx(expected)
