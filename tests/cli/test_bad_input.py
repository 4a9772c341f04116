"""A user's mistake: one clear line, exit code 2, before any training, and nothing touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM

from conftest import save_tiny
from lopt.cli.main import main

GOOD = object()
CASES: dict[str, tuple[dict[str, object], str]] = {
    "no model": ({"--model_name_or_path": None}, "--model_name_or_path is missing"),
    "missing model": (
        {"--model_name_or_path": "./nowhere"},
        "--model_name_or_path ./nowhere is not a folder",
    ),
    "encoder": ({"--model_name_or_path": "{tmp}/encoder"}, "not a decoder-only causal LM"),
    "no rows given": ({"--train_file": None}, "--train_file and --dataset_name"),
    "missing file": ({"--train_file": "{tmp}/none.jsonl"}, "none.jsonl"),
    "broken JSON": ({"--train_file": "{tmp}/broken.jsonl"}, "line 2"),
    "not text": ({"--train_file": "{tmp}/binary.jsonl"}, "UTF-8"),
    "unknown suffix": ({"--train_file": "{tmp}/rows.xml"}, ".jsonl"),
    "empty file": ({"--train_file": "{tmp}/empty.jsonl"}, "empty.jsonl"),
    "unknown columns": ({"--train_file": "{tmp}/columns.jsonl"}, "spam"),
    "prompts too long": ({"--max_seq_length": 8}, "no trainable token is left"),
    "k > L": ({"--num_blocks": 5}, "--num_blocks 5 is more than the model's 4 layers"),
    "k = 0": ({"--num_blocks": 0}, "--num_blocks 0"),
    "boundaries out of order": ({"--block_boundaries": ["2", "1"]}, "--block_boundaries [2, 1]"),
    "boundary beyond the layers": ({"--block_boundaries": ["2", "4"]}, "--block_boundaries [2, 4]"),
    "lambda < 0": ({"--lambda_aux": "-1"}, "--lambda_aux -1.0"),
    "lambda not finite": ({"--lambda_aux": "nan"}, "--lambda_aux nan"),
    "held out everything": ({"--held_out": 48}, "--held_out"),
    "nothing to resume": ({"--resume": "true"}, "--resume"),
    "contradiction": ({"--resume": "true", "--overwrite_output_dir": "true"}, "contradict"),
    "output is a file": ({"--output_dir": "{tmp}/rows.xml"}, "is a file"),
    "output holds a run": ({"--output_dir": "{tmp}/model"}, "--overwrite_output_dir"),
    "reentrant": ({"--gradient_checkpointing_kwargs": '{"use_reentrant": true}'}, "use_reentrant"),
    "dtype": ({"--dtype": "int8"}, "--dtype int8"),
    "optimizer that is missing": (
        {"--optim": "galore_adamw", "--optim_target_modules": "q_proj"},
        "galore_torch",
    ),
    "yaml missing": ({"--config": "{tmp}/none.yaml"}, "--config"),
    "yaml unknown key": ({"--config": "{tmp}/unknown.yaml"}, "colour"),
    "unknown flag": ({"--colour": "red"}, "--colour"),
    "unknown method": ({"--method": "magic"}, "magic"),
}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory: pytest.TempPathFactory, sums_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    save_tiny(folder / "model")
    save_tiny(folder / "encoder")
    (folder / "encoder" / "config.json").unlink()
    sizes = dict(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=300
    )
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(folder / "encoder")
    (folder / "good.jsonl").write_text(sums_file.read_text())
    (folder / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n')
    (folder / "binary.jsonl").write_bytes(b'{"question": "\xff\xfe\xfa", "answer": "b"}\n')
    (folder / "rows.xml").write_text("<rows/>")
    (folder / "empty.jsonl").write_text("")
    (folder / "columns.jsonl").write_text(json.dumps({"spam": "a", "eggs": "b"}) + "\n")
    (folder / "unknown.yaml").write_text("colour: red\n")
    return folder


def command(tmp: Path, changes: dict[str, object]) -> list[str]:
    flags: dict[str, object] = {
        "--model_name_or_path": "{tmp}/model",
        "--train_file": "{tmp}/good.jsonl",
        "--output_dir": "{tmp}/out",
        "--max_steps": 2,
        "--num_blocks": 2,
        **changes,
    }
    words: list[str] = []
    for flag, value in flags.items():
        if value is not None:
            words += [flag, *(value if isinstance(value, list) else [str(value).replace("{tmp}", str(tmp))])]
    return ["sft", *words]


@pytest.mark.parametrize("case", CASES)
def test_mistake(
    case: str, tmp: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = CASES[case]
    monkeypatch.chdir(tmp)
    before = snapshot(tmp)
    try:
        code = main(command(tmp, changes))
    except SystemExit as stop:  # argparse's own way out
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    last = error.strip().splitlines()[-1]
    assert "error:" in last and message in error, error
    assert "loss" not in last and not (tmp / "out" / "config.json").exists()
    assert {k: v for k, v in snapshot(tmp).items() if k in before} == before


def test_a_run_that_explodes_stops_and_names_the_step(tmp: Path, capsys: pytest.CaptureFixture) -> None:
    flags = {"--learning_rate": "1e30", "--output_dir": "{tmp}/exploded", "--head_warmup_steps": 0}
    assert main(command(tmp, flags)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 2, batch 1 of 1" in error and "stopped before the optimizer step" in error
    assert not (tmp / "exploded" / "config.json").exists()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
