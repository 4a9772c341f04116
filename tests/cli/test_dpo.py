"""`lopt dpo` through its command line: methods, resume, held-out figures, the reference model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lopt.cli.main import main
from lopt.trainers import LoPTDPOTrainer

Run = Callable[..., tuple[Path, list[dict[str, Any]]]]


@pytest.fixture
def dpo(tiny_folder: Path, tmp_path: Path) -> Run:
    """Run `lopt dpo` on pairs of sums; returns the output folder and its log."""
    pairs = [
        {"prompt": f"What is {a} plus {b}?", "chosen": f" It is {a + b}.", "rejected": f" Maybe {a + b + 1}?"}
        for a in range(6)
        for b in range(3)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def run(name: str, flags: str = "", steps: int = 4) -> tuple[Path, list[dict[str, Any]]]:
        words = (
            f"dpo --model_name_or_path {tiny_folder} --train_file {tmp_path / 'pairs.jsonl'} --num_blocks 2 "
        )
        words += f"--output_dir {tmp_path / name} --max_steps {steps} --logging_steps 1 --learning_rate 1e-3 "
        words += f"--head_warmup_steps 2 --per_device_train_batch_size 4 --held_out 2 --save_steps 2 {flags}"
        assert main(words.split()) == 0
        return tmp_path / name, json.loads((tmp_path / name / "trainer_state.json").read_text())[
            "log_history"
        ]

    return run


@pytest.mark.parametrize(
    ("flags", "still"),
    [
        ("--method lopt --schedule block_major --stages 2 --offload block", ()),
        ("--method e2e", ()),
        ("--method frozen", ("model.layers.0.self_attn.q_proj.weight",)),
        ("--method lora", None),
        ("--streaming --precompute_ref_log_probs False", ()),
    ],
)
def test_every_method_learns_to_prefer(dpo: Run, tiny_folder: Path, flags: str, still: Any) -> None:
    folder, log = dpo("out", flags, steps=6)
    losses = [row["loss"] for row in log if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=1e-3)  # the reference is the model as it was
    assert losses[-1] < 0.65
    figures = json.loads((folder / "eval_results.json").read_text())
    assert figures["eval_rewards/accuracies"] == 1.0 and figures["eval_rewards/margins"] > 0
    if still is None:
        assert (folder / "adapter_model.safetensors").is_file()
        return
    before, after = (load_file(place / "model.safetensors") for place in (tiny_folder, folder))
    alike = {name for name, weight in before.items() if torch.equal(weight, after[name])}
    assert set(still) <= alike and (bool(alike) == bool(still))
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_resumed_run_is_the_whole_one(dpo: Run) -> None:
    whole, _ = dpo("whole")
    dpo("parts", "--lr_scheduler_type constant", steps=2)
    parts, _ = dpo("parts", "--lr_scheduler_type constant --resume")
    constant, _ = dpo("constant", "--lr_scheduler_type constant")
    a, b, c = (load_file(folder / "model.safetensors") for folder in (parts, constant, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert any(not torch.equal(b[name], c[name]) for name in b)


def test_the_reference_is_loaded_as_the_model_is(dpo: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    begin = LoPTDPOTrainer.__init__
    monkeypatch.setattr(
        LoPTDPOTrainer,
        "__init__",
        lambda self, *args, **kwargs: (
            asked.append(kwargs["args"].model_init_kwargs),
            begin(self, *args, **kwargs),
        )[1],
    )
    dpo("out", "--model_revision main", steps=1)
    assert asked == [{"use_safetensors": True, "trust_remote_code": False, "revision": "main"}]
