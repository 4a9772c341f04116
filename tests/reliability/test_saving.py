"""What a trainer leaves on the disk: whole checkpoints, no pickles, a model that is whole or absent."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from conftest import tiny
from lopt import LoPTConfig, LoPTSFTTrainer
from lopt.reliability import checkpoint
from lopt.reliability.checkpoint import MANIFEST, CheckpointError, checkpoints, damage
from lopt.trainers.config import LoPTSFTConfig

Make = Callable[..., LoPTSFTTrainer]
ROWS = [{"prompt": f"Question {i} ", "completion": f"answer {i * i}"} for i in range(16)]


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Make:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def build(folder: str = "out", **changes: Any) -> LoPTSFTTrainer:
        settings: dict[str, Any] = dict(
            output_dir=str(tmp_path / folder), max_steps=4, save_steps=1, save_total_limit=2, use_cpu=True,
            per_device_train_batch_size=2, disable_tqdm=True, report_to="none", learning_rate=1e-3,
        )  # fmt: skip
        return LoPTSFTTrainer(
            tiny("llama", vocab_size=260, max_position_embeddings=256),
            args=LoPTSFTConfig(**settings | changes),
            lopt_config=LoPTConfig(head_warmup_steps=2),
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:4]),
            processing_class=tokenizer,
        )

    return build


def weights(trainer: LoPTSFTTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, b[name]) for name, value in a.items())


def test_what_is_on_the_disk_and_what_is_resumed(make: Make, tmp_path: Path, capsys) -> None:
    best = dict(eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, greater_is_better=True)
    trainer = make(**best, metric_for_best_model="eval_loss")
    trainer.train()
    kept = checkpoints(tmp_path / "out")
    assert [path.name for path in kept] == ["checkpoint-1", "checkpoint-4"]  # the best one and the newest
    assert [damage(path) for path in kept] == [None, None] and not (tmp_path / "out" / ".writing").exists()
    assert not list((tmp_path / "out").rglob("*.bin"))
    for path in kept:
        state = json.loads((path / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(kept[0])
        assert json.loads((path / "training_args.json").read_text())["max_steps"] == 4
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            assert (path / name).is_file()
    best_weights = weights(trainer)

    # Resumed at its end it does nothing more, and finds the best one again.
    again = make(**best, metric_for_best_model="eval_loss")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4 and same(best_weights, weights(again))

    # A damaged newest one is passed over, by both ways to ask for it.
    os.truncate(kept[1] / "optimizer.pt", 100)
    third = make()
    assert third.checkpoints.find(True) == str(kept[0])
    assert "checkpoint-4 is passed over: optimizer.pt has 100 of" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"is refused: optimizer\.pt has 100 of"):
        make().train(resume_from_checkpoint=str(kept[1]))


def test_damaged_then_resumed_is_the_whole_run(make: Make, tmp_path: Path) -> None:
    whole = make()
    whole.train()
    damaged = tmp_path / "out" / "checkpoint-4"
    (damaged / "model.safetensors").unlink()
    resumed = make(save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))
    assert [p.name for p in checkpoints(tmp_path / "out")] == ["checkpoint-4"] and damage(damaged) is None


def test_a_disk_that_fills_up(make: Make, tmp_path: Path, monkeypatch) -> None:
    """Before a checkpoint is begun, and in the middle of one: said, nothing half done, the last one whole."""
    trainer, out = make(), tmp_path / "out"
    free = iter([10**12, 10**12, 1000])
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "free_space", lambda _: next(free))
        with pytest.raises(CheckpointError, match=r"checkpoint-3 needs .* the disk of .* has 1000 B left"):
            trainer.train()
    assert [p.name for p in checkpoints(out)] == ["checkpoint-1", "checkpoint-2"]

    real, calls = torch.save, []

    def save(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    sentence = r"checkpoint-3 cannot be written: No space left on device; checkpoint-2 is whole, `resume`"
    with pytest.raises(CheckpointError, match=sentence):
        make().train(resume_from_checkpoint=True)
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"checkpoint-1", "checkpoint-2"}
    assert damage(out / "checkpoint-2") is None


def test_a_model_is_whole_or_absent(make: Make, tmp_path: Path, monkeypatch) -> None:
    trainer, out = make(save_strategy="no"), tmp_path / "out"
    trainer.save_model()
    assert {"config.json", "model.safetensors", "training_args.json"} <= {p.name for p in out.iterdir()}
    assert not list(out.rglob("*.bin")) and not (out / ".writing").exists()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(trainer.processing_class), "save_pretrained", full)
    before = (out / "model.safetensors").read_bytes()
    trainer.model.lm_head.weight.data.zero_()
    with pytest.raises(CheckpointError, match="No space left on device"):
        trainer.save_model()
    assert (out / "model.safetensors").read_bytes() == before and (out / "config.json").is_file()


def test_free_space_is_compared_with_the_bytes_that_are_written(make: Make, tmp_path: Path) -> None:
    """8-bit state takes a byte and a bit per value, though it passes for float32."""
    pytest.importorskip("torchao")
    with torch.compiler.set_stance("force_eager"):
        trainer = make(optim="adamw_torch_8bit", max_steps=1)
        trainer.model.resize_token_embeddings(4096)  # torchao leaves small tensors in float32
        trainer.train()
    folder = tmp_path / "out" / "checkpoint-1"
    names = ("model.safetensors", "optimizer.pt", "reconstruction_heads.safetensors")
    written = sum((folder / name).stat().st_size for name in names)
    assert trainer.checkpoints._bytes() == pytest.approx(written, rel=0.05)
    state = [v for s in trainer.bare_optimizer().state.values() for v in s.values()]
    assert written < sum(v.numel() * v.element_size() for v in state)


def test_a_checkpoint_without_an_optimizer_is_not_resumed(make: Make, tmp_path: Path) -> None:
    make(max_steps=1).train()
    folder = tmp_path / "out" / "checkpoint-1"
    for name in ("optimizer.pt", MANIFEST):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"has no optimizer\.pt, so `save_only_model` wrote it"):
        make(max_steps=2).train(resume_from_checkpoint=str(folder))
