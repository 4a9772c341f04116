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


@pytest.mark.slow
def test_methods_are_compared_on_pairs(dpo: Run, tiny_folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "note.txt").write_text("One window of text, which has no interval over items.")
    words = f"compare dpo --model_name_or_path {tiny_folder} --train_file {tmp_path / 'pairs.jsonl'} "
    words += "--held_out 4 "
    words += (
        f"--methods e2e frozen --seeds 0 --max_steps 2 --learning_rate 1e-3 --output_dir {tmp_path / 'both'} "
    )
    words += f"--retention_text {tmp_path / 'note.txt'} --per_device_train_batch_size 4 --disable_tqdm True"
    assert main(words.split()) == 0
    results = json.loads((tmp_path / "both" / "compare.json").read_text())
    assert results["base"]["adaptation"]["loss"] == pytest.approx(0.6931, abs=1e-3)
    for run in results["cells"]:
        assert run["adaptation"]["loss"] < 0.6931 and 0 <= run["adaptation"]["pair_accuracy"] <= 1
    assert results["summary"]["items"]["e2e"]["text:note"]["low"] is None
    page = (tmp_path / "both" / "report.html").read_text()
    assert "held-out pair accuracy" in page and "nats per pair" in page and "nats per token" not in page
    assert main([*words.split(), "--methods", "lopt:aux_loss=next_token"]) == 2
    assert "--aux_loss next_token would teach earlier blocks rejected answers" in capsys.readouterr().err


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
