"""Training on a stream: what it sees, where it stops, and that it can be resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoTokenizer

from conftest import save_tiny, tiny
from lopt import LoPTConfig
from lopt.cli.main import main
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.config import LoPTSFTConfig


def run(folder: Path, model: Path, rows: Path, *flags: object, code: int = 0) -> list[float]:
    """`lopt sft --streaming`; returns the losses of all steps."""
    arguments = [
        "--model_name_or_path", model, "--train_file", rows, "--output_dir", folder, "--streaming",
        "--logging_steps", 1, "--learning_rate", 1e-3, "--head_warmup_steps", 3,
        "--per_device_train_batch_size", 4, *flags,
    ]  # fmt: skip
    assert main(["sft", *map(str, arguments)]) == code
    if code:
        return []
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in history if "loss" in row]


@pytest.mark.parametrize("flags", [(), ("--packing", "true", "--max_seq_length", 100)])
def test_a_stream_is_learned_from(tiny_folder: Path, sums_file: Path, tmp_path: Path, flags) -> None:
    losses = run(tmp_path / "out", tiny_folder, sums_file, "--max_steps", 30, *flags)
    assert len(losses) == 30 and sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_resume_is_bit_for_bit(sums_file: Path, tmp_path: Path) -> None:
    """The stream ends within step 6, so the run is stopped and resumed in its second pass."""
    model = save_tiny(tmp_path / "model", attention_dropout=0.2)
    flags = [
        "--max_steps", 10, "--save_steps", 8, "--gradient_accumulation_steps", 3,
        "--max_samples", 47, "--per_device_train_batch_size", 3, "--held_out", 4,
    ]  # fmt: skip
    run(tmp_path / "whole", model, sums_file, *flags)
    (tmp_path / "resumed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "resumed" / "checkpoint-8")
    run(tmp_path / "resumed", model, sums_file, *flags, "--resume")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    for name, value in load_file(tmp_path / "resumed" / "model.safetensors").items():
        assert torch.equal(value, whole[name]), name


def make_trainer(folder: Path, rows: list[dict], tokenizer_folder: Path, **settings) -> LoPTSFTTrainer:
    options = dict(
        output_dir=str(folder), max_steps=5, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-3, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    return LoPTSFTTrainer(
        tiny("llama", vocab_size=260, max_position_embeddings=256),
        args=LoPTSFTConfig(**{**options, **settings}),
        lopt_config=LoPTConfig(head_warmup_steps=2),
        train_dataset=Dataset.from_list(rows).to_iterable_dataset(),
        processing_class=AutoTokenizer.from_pretrained(tokenizer_folder),
    )


def test_passes_follow_each_other_without_a_gap(tiny_folder: Path, tmp_path: Path) -> None:
    """7 rows, 5 steps of 2 micro-batches of 2: a step never ends with the stream."""
    rows = [{"prompt": f"Question {i} ", "completion": f"answer {i}"} for i in range(7)]
    trainer = make_trainer(tmp_path, rows, tiny_folder)
    seen: list[str] = []
    steps: list[int] = []

    def note(*args, **kwargs):
        batches, items = LoPTSFTTrainer.get_batch_samples(trainer, *args, **kwargs)
        texts = [trainer.processing_class.decode(ids) for b in batches for ids in b["input_ids"]]
        seen.extend(text.split()[1] for text in texts)
        steps.append(len(batches))
        return batches, items

    trainer.get_batch_samples = note
    trainer.train()
    assert trainer.state.global_step == 5 and steps == [2] * 5
    # The pass ends with a micro-batch of one row.
    assert seen[:14] == [str(i) for i in range(7)] * 2


def test_too_long_rows_are_skipped_and_nothing_but_them_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    good = [{"prompt": "Why ", "completion": f"so {i}"} for i in range(4)]
    bad = [{"prompt": "why " * 50, "completion": "so"}] * 3
    trainer = make_trainer(tmp_path, bad + good, tiny_folder, max_length=40)
    trainer.train()
    assert trainer.state.global_step == 5
    with pytest.raises(ValueError, match=r"no trainable token is left in the train rows.*`max_length` 40"):
        make_trainer(tmp_path, bad, tiny_folder, max_length=40)


def test_a_step_without_a_label_stops(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 8 + [
        {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    ] * 8
    trainer = make_trainer(tmp_path, rows, tiny_folder, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(ValueError, match="step 3: no token of its rows has a label"):
        trainer.train()


def test_a_malformed_row_stops_the_run_and_is_named(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(1001)]
    path.write_text("".join(json.dumps(r) + "\n" for r in [*rows, {"question": "", "answer": "lost"}]))
    flags = ["--max_steps", 99, "--shuffle_buffer", 1, "--per_device_train_batch_size", 50]
    run(tmp_path / "out", tiny_folder, path, *flags, code=2)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "row 1001 (from 0), column `question`, is empty" in error and "'answer': 'lost'" in error


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--streaming needs --max_steps"),
        (("--max_steps", 2, "--held_out", 0.1), "--held_out 0.1 is a share"),
        (("--max_steps", 2, "--held_out", 48), "--held_out 48 takes all 48 rows"),
        (("--max_steps", 2, "--dataset_split", "train[:5]"), "--dataset_split train[:5]"),
        (("--max_steps", 2, "--shuffle_buffer", 0), "--shuffle_buffer must be >= 1 (got 0)"),
    ],
)
def test_mistakes(
    tiny_folder: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flags, words: str
) -> None:
    run(tmp_path / "out", tiny_folder, sums_file, *flags, code=2)
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
