"""What LoPTSFTTrainer changes in TRL's, against TRL's. The runs themselves: tests/cli/test_sft.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer
from trl import SFTTrainer

from conftest import assert_moved_alike, tiny
from lopt import LoPTConfig
from lopt.trainers import LoPTSFTTrainer
from lopt.trainers.config import LoPTSFTConfig
from lopt.trainers.sft import RowCounts


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
    start = dict(tiny("llama-tied", vocab_size=260, max_position_embeddings=256).named_parameters())
    assert_moved_alike(start, plain, ours)


@pytest.mark.parametrize(("packing", "kept"), [(None, 6), ("bfd", 6), ("wrapped", 17), ("bfd_split", 17)])
def test_what_max_length_takes_away(tiny_folder: Path, tmp_path: Path, caplog, packing, kept) -> None:
    """Rows of 20 tokens at --max_length 8: cut and said so, unless packing carries them over."""
    rows = [{"prompt": "ab", "completion": "c" * 17}] * 3 + [{"prompt": "a" * 9, "completion": "b" * 8}]
    trainer = LoPTSFTTrainer(
        tiny("llama", vocab_size=260, max_position_embeddings=256),
        args=LoPTSFTConfig(
            output_dir=str(tmp_path), max_length=8, packing=packing is not None,
            packing_strategy=packing or "bfd",
        ),
        lopt_config=LoPTConfig(method="e2e"),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
    )  # fmt: skip
    tokens = [token for row in trainer.train_dataset for token in row["input_ids"]]
    assert tokens.count(trainer.processing_class.encode("c")[0]) == 3 * kept
    assert all(any(label != -100 for label in row["labels"]) for row in trainer.train_dataset)
    if kept == 6:
        assert trainer.row_counts["train"] == RowCounts(rows=4, dropped=1, cut=3)
        assert "1 of 4 train rows are left out" in caplog.text
        assert "3 of 4 train rows are cut at `max_length` 8" in caplog.text
    else:
        assert not caplog.text


def test_long_rows_can_be_left_out(tiny_folder: Path, tmp_path: Path, caplog) -> None:
    rows = [{"prompt": "ab", "completion": "c" * n} for n in (3, 17, 4, 18)]

    def trainer(train: object, max_length: int = 8) -> LoPTSFTTrainer:
        args = LoPTSFTConfig(
            output_dir=str(tmp_path), max_length=max_length, drop_long_rows=True, max_steps=1
        )
        return LoPTSFTTrainer(
            tiny("llama", vocab_size=260, max_position_embeddings=256),
            args=args, lopt_config=LoPTConfig(method="e2e"), train_dataset=train,
            processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        )  # fmt: skip

    made = trainer(Dataset.from_list(rows))
    lengths = [len(row["input_ids"]) for row in made.train_dataset]
    assert len(lengths) == 2 and max(lengths) <= 8
    assert made.row_counts["train"] == RowCounts(rows=4, dropped=2, cut=0)
    assert "2 of 4 train rows are left out: longer than `max_length` 8" in caplog.text
    stream = trainer(Dataset.from_list(rows).to_iterable_dataset()).train_dataset
    assert [len(row["input_ids"]) for row in stream] == lengths
    assert caplog.text.count("rows of the stream: longer than `max_length` 8, left out") == 1
    with pytest.raises(ValueError, match="`drop_long_rows` leaves none of the 4 train rows"):
        trainer(Dataset.from_list(rows), max_length=3)
