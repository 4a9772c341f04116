"""Guards, each provoked for real: what is said, what is left alone, what is on the disk afterwards."""

from __future__ import annotations

import json
import logging
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
from lopt import LoPTConfig, LoPTSFTTrainer
from lopt.cli.main import main
from lopt.instruments.hidden_states import token_spread, token_variance
from lopt.losses.reconstruction import reconstruction_loss
from lopt.reliability.checkpoint import checkpoints, damage
from lopt.reliability.divergence import DivergenceMonitor
from lopt.reliability.machine_errors import is_out_of_memory, worker_error
from lopt.trainers import DivergedError, NonFiniteError, OutOfMemory, WorkerDied
from lopt.trainers.config import LoPTSFTConfig

ROWS = [{"prompt": f"Question {i} ", "completion": f"answer {i * i}"} for i in range(16)]
Make = Callable[..., Any]


@pytest.fixture
def make(tiny_folder: Path, tmp_path: Path) -> Make:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)

    def build(name: str = "out", config: dict[str, Any] | None = None, **changes: Any) -> LoPTSFTTrainer:
        settings: dict[str, Any] = dict(
            output_dir=str(tmp_path / name), max_steps=4, logging_steps=1, per_device_train_batch_size=2,
            gradient_accumulation_steps=2, learning_rate=1e-3, disable_tqdm=True, save_strategy="no",
            report_to="none", use_cpu=True,
        )  # fmt: skip
        return LoPTSFTTrainer(
            tiny("llama", vocab_size=260, max_position_embeddings=256),
            args=LoPTSFTConfig(**settings | changes),
            lopt_config=LoPTConfig(**dict(head_warmup_steps=2) | (config or {})),
            train_dataset=Dataset.from_list(ROWS),
            eval_dataset=Dataset.from_list(ROWS[:4]),
            processing_class=tokenizer,
        )

    return build


class At(TrainerCallback):
    """Does something at an event after so many steps."""

    def __init__(self, event: str, step: int, what: Callable[[], None]) -> None:
        self.step, self.what = step, what
        setattr(self, event, self.act)

    def act(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.what()


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


# -- numbers that are not finite ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [("eager", "local loss"), ("eager", "gradient"), ("block_major", "loss"), ("block_major", "gradient")],
)
def test_not_finite_stops_before_a_block_is_stepped(
    make: Make, tmp_path: Path, schedule: str, kind: str
) -> None:
    """In block-major block 1 has been stepped when block 2 is found out; the checkpoint is whole."""
    trainer = make(config=dict(num_blocks=3, schedule=schedule), save_strategy="steps", save_steps=2)
    trainer.model.train()
    block = 2 if kind == "loss" else 1
    parameter = trainer.lopt.blocks.layers[trainer.lopt.blocks[block].stop - 1].mlp.up_proj.weight
    spoiled: list[dict[str, torch.Tensor]] = []

    def spoil() -> None:
        spoiled.append(weights_of(trainer))
        if kind == "gradient":
            parameter.register_hook(lambda gradient: gradient * float("inf"))
        else:
            parameter.data.fill_(float("nan"))
            spoiled[-1] = weights_of(trainer)

    trainer.add_callback(At("on_step_begin", 2, spoil))
    with pytest.raises(NonFiniteError) as error:
        trainer.train()
    text = str(error.value)
    named = {"loss": "the loss is nan", "local loss": "the local loss of block 2 is nan"}
    assert named.get(kind, "the gradient norm of block 2 is ") in text
    assert "step 3, " in text and "rows " in text and "'Question" in text
    assert ("batches 1 to 2" if kind == "gradient" else "batch 1 of 2") in text
    assert "checkpoint-2 is whole" in text
    staged = schedule == "block_major"
    stepped = [1, 2] if staged and kind == "loss" else [1] if staged else []
    assert (f"block {' and '.join(map(str, stepped))} had been stepped" in text) == bool(stepped)
    assert ("the weights hold such numbers already" in text) == (kind != "gradient")
    blocks, after = trainer.lopt.blocks, dict(trainer.model.named_parameters())
    moved = {
        blocks.owner(after[name]) + 1
        for name, value in spoiled[0].items()
        if not torch.equal(value.nan_to_num(), after[name].nan_to_num())
    }
    assert moved == set(stepped)
    assert damage(checkpoints(tmp_path / "out")[-1]) is None


def test_weights_that_are_not_finite_are_not_saved(make: Make, tmp_path: Path) -> None:
    trainer = make(save_strategy="steps", save_steps=2)
    weight = trainer.model.model.layers[1].mlp.down_proj.weight
    trainer.add_callback(At("on_step_end", 4, lambda: weight.data.fill_(float("nan"))))
    why = r"after step 4 weights are not finite: model\.layers\.1\..*; checkpoint-2 is whole"
    with pytest.raises(NonFiniteError, match=why):
        trainer.train()
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    with pytest.raises(NonFiniteError, match=why):
        trainer.save_model()
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_model_that_is_not_finite_is_refused(make: Make) -> None:
    trainer = make()
    weight = trainer.model.model.layers[1].mlp.down_proj.weight
    weight.data[3, 4] = float("inf")
    with pytest.raises(
        NonFiniteError, match=r"before any training: model\.layers\.1\.mlp\.down_proj\.weight\. "
    ):
        trainer.train()
    weight.data.zero_()
    trainer.lopt.heads[0].up.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="head warm-up, step 1: the local loss of block 1 is nan"):
        trainer.train()


# -- local losses that diverge, boundaries that collapse ---------------------------------------------


def losses(monitor: DivergenceMonitor, values: list[float], start: int = 1) -> list[int]:
    """The steps at which block 1 is said to diverge."""
    return [step for step, value in enumerate(values, start) if monitor.add_losses(step, {0: value})]


def test_what_counts_as_divergence() -> None:
    assert not losses(DivergenceMonitor(), [1.0] * 80 + [200.0] + [1.0] * 80)  # a spike
    assert not losses(DivergenceMonitor(), [1.0] * 100 + [2.5] * 400)  # a little higher for good
    assert not losses(DivergenceMonitor(), [100 * 0.9**step for step in range(200)])
    steps = losses(DivergenceMonitor(), [1.0] * 100 + [10.0] * 100)
    assert 125 < steps[0] < 145 and steps[-1] == 200
    assert losses(DivergenceMonitor(steps=5), [1.0] * 100 + [10.0] * 100)[0] < 106
    assert losses(DivergenceMonitor(factor=9.0), [1.0] * 100 + [10.0] * 200)[0] > 200
    warm = DivergenceMonitor()
    warm.start([0], [[5.0], [1.0], [1.0], [1.0], [1.0], [1.0]])
    assert losses(warm, [8.0] * 9)[0] == 6, "a run that diverges from its first step on"


def test_a_monitor_goes_on_from_its_state() -> None:
    values = [1.0 + step % 3 for step in range(60)] + [40.0] * 60
    whole, first, second = DivergenceMonitor(), DivergenceMonitor(), DivergenceMonitor()
    told = losses(whole, values)
    whole.add_boundaries(7, {0: 0.5}, {0: 0.25})
    assert losses(first, values[:50]) == []
    second.load(json.loads(json.dumps(first.state())))
    assert losses(second, values[50:], 51) == told
    second.add_boundaries(7, {0: 0.5}, {0: 0.25})
    assert second.state() == whole.state()


def test_figures_of_a_boundary() -> None:
    hidden = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)) + 3
    mask = torch.ones(3, 7)
    mask[1, 4:] = 0
    real = hidden[mask.bool()]
    hidden[1, 4:] = float("nan")
    constant = real.mean(0).expand_as(hidden)
    torch.testing.assert_close(token_variance(hidden, mask), reconstruction_loss(constant, hidden, mask))
    torch.testing.assert_close(token_variance(hidden, mask), real.var(0, correction=0).mean())
    cosines = torch.nn.functional.cosine_similarity(real[:, None], real[None], dim=-1)
    torch.testing.assert_close(token_spread(hidden, mask), 1 - cosines.mean())
    assert token_spread(torch.ones(2, 3, 4) * torch.rand(2, 3, 1), None).abs() < 1e-6


def test_a_learning_rate_that_diverges(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    wild: dict[str, Any] = dict(
        config=dict(lr_k1=0.3), max_steps=12, per_device_train_batch_size=8, gradient_accumulation_steps=1
    )
    ends = {}
    for choice in ("warn", "ignore"):
        caplog.clear()
        trainer = make(on_divergence=choice, **wild)
        with caplog.at_level(logging.WARNING, "lopt"):
            trainer.train()
        assert trainer.state.global_step == 12
        told = [r.getMessage() for r in caplog.records if "diverges" in r.getMessage()]
        rows = [r for r in trainer.state.log_history if "guard/local_loss_rise/block_1" in r]
        assert len(told) == len(rows) == (choice == "warn")
        ends[choice] = weights_of(trainer)
        if told:
            assert "the local loss of block 1 diverges: its mean is" in told[0]
            assert "a lower `lr_k1` (it is 0.3)" in told[0] and "`on_divergence` stop" in told[0]
            assert rows[0]["step"] < 12
    assert all(torch.equal(value, ends["ignore"][name]) for name, value in ends["warn"].items())
    trainer = make(on_divergence="stop", save_strategy="steps", save_steps=1, **wild)
    with pytest.raises(DivergedError, match=r"block 1 diverges.*; stopped, checkpoint-\d+ is whole") as error:
        trainer.train()
    step = trainer.state.global_step
    assert str(error.value).startswith(f"step {step}: ") and f"checkpoint-{step - 1} is whole" in str(
        error.value
    )
    again = make(on_divergence="stop", save_strategy="steps", save_steps=1, **wild)
    with pytest.raises(DivergedError) as repeated:
        again.train(resume_from_checkpoint=True)
    assert str(repeated.value) == str(error.value)


def test_boundaries_that_collapse(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """All tokens get the same embedding: there is nothing to tell them apart."""
    trainer = make(
        config=dict(lr_k1=0.0, head_warmup_steps=20), max_steps=45, logging_steps=10, learning_rate=0.0,
        per_device_train_batch_size=1, gradient_accumulation_steps=1,
    )  # fmt: skip
    embedding = trainer.model.get_input_embeddings().weight

    def collapse() -> None:
        embedding.data.copy_(embedding.data[5].expand_as(embedding))

    trainer.add_callback(At("on_step_begin", 11, collapse))
    with caplog.at_level(logging.WARNING, "lopt"):
        trainer.train()
    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "the hidden states behind block 1 collapse: their spread over tokens is" in told
    assert "the head of block 1 reconstructs no better than a constant would" in told
    rows = [row["spread/block_1"] for row in trainer.state.log_history if "spread/block_1" in row]
    assert rows[0] > 0.5 and rows[-1] < 0.01


# -- the machine -------------------------------------------------------------------------------------


def allocate(*_: Any) -> None:
    """Asks the allocator for a petabyte."""
    torch.empty(2**50, dtype=torch.uint8)


@pytest.mark.parametrize("schedule", ["eager", "block_major"])
def test_out_of_memory_in_training(
    make: Make, tmp_path: Path, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(config=dict(num_blocks=2, schedule=schedule), save_strategy="steps", save_steps=2)
    if schedule == "block_major":
        monkeypatch.setattr("lopt.reliability.advice.Planner", lambda *_: {}["unknown"])
    layer = trainer.lopt.blocks.layers[-1]
    trainer.add_callback(At("on_step_begin", 2, lambda: layer.register_forward_pre_hook(allocate) and None))
    with pytest.raises(OutOfMemory) as error:
        trainer.train()
    text = str(error.value)
    assert text.startswith("out of memory in step 3, batch 1 of 2, block 2 of 2: the machine has ")
    assert "were in use (weights " in text and "optimizer state " in text
    assert "checkpoint-2 is whole, `resume` goes on from there" in text
    same = "`per_device_train_batch_size` 1 `gradient_accumulation_steps` 4 (the same run otherwise, "
    if schedule == "eager":
        assert f"By `lopt plan` this would fit: {same}" in text and "`offload`" not in text
    else:
        assert text.endswith("more `num_blocks`")
    assert damage(checkpoints(tmp_path / "out")[-1]) is None


def test_out_of_memory_elsewhere(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lopt.reliability.advice._proposals", lambda attempt: [])
    trainer = make(eval_strategy="steps", eval_steps=1)
    trainer.add_callback(At("on_prediction_step", 1, allocate))
    with pytest.raises(
        OutOfMemory, match=r"in the evaluation.*there is no earlier.*per_device_eval_batch_size"
    ):
        trainer.train()
    trainer = make()
    trainer.lopt.heads[0].register_forward_pre_hook(allocate)
    with pytest.raises(OutOfMemory, match="in the head warm-up: "):
        trainer.train()
    trainer = make()
    trainer.add_callback(At("on_pre_optimizer_step", 0, allocate))
    with pytest.raises(
        OutOfMemory, match=r"in step 1, the optimizer's step: .* What helps: a smaller `per_device"
    ):
        trainer.train()
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert all(map(is_out_of_memory, (gpu, MemoryError()))) and not is_out_of_memory(RuntimeError("shape"))


def test_out_of_memory_in_a_command(
    tiny_folder: Path, sums_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setattr("lopt.cli.training.load_model", lambda *_, **__: allocate())
    monkeypatch.setattr("lopt.reliability.advice._proposals", lambda run: [f"`num_blocks` 4 ({run.tokens})"])
    flags = ["--model_name_or_path", tiny_folder, "--train_file", sums_file, "--output_dir", tmp_path / "out"]
    assert main(["sft", *map(str, flags)]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"lopt sft: error: out of memory in loading {tiny_folder}: the machine has")
    assert "By `lopt plan` this would fit: --num_blocks 4 " in line


class Collator:
    """Something happens in the worker's eighth batch, which is made ahead in step 2."""

    def __init__(self, collate: Any, what: Callable[[], None]) -> None:
        self.collate, self.what, self.calls = collate, what, 0

    def __call__(self, rows: Any) -> Any:
        self.calls += 1
        if torch.utils.data.get_worker_info() is not None and self.calls == 8:
            self.what()
        return self.collate(rows)


def fail() -> None:
    raise KeyError("completion")


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            r"worker( \(process \d+\))? (was killed \(Killed\)|exited): .*/dev/shm",
        ),
        (fail, "data-loader worker 0 failed with KeyError: 'completion'; `dataloader_num_workers` 0"),
    ],
)
def test_a_worker_that_dies(make: Make, tmp_path: Path, what: Callable[[], None], words: str) -> None:
    trainer = make(dataloader_num_workers=1, save_strategy="steps", save_steps=1)
    trainer.data_collator = Collator(trainer.data_collator, what)
    with pytest.raises(WorkerDied, match=words + ".*; checkpoint-[12] is whole, `resume` goes on") as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert damage(checkpoints(tmp_path / "out")[-1]) is None
    told = worker_error(RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly. See above"))
    assert told is not None and told.startswith("a data-loader worker (process 12, 13) exited: most likely")
    assert worker_error(RuntimeError("shape")) is None
