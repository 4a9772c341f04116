"""A user's mistake: one clear line, exit code 2, before any training, and nothing touched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BertConfig, BertForMaskedLM

from conftest import save_tiny
from lopt.cli.main import main

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
    "no block left to learn": ({"--frozen_blocks": 1}, "--method frozen"),
    "frozen blocks, end to end": ({"--frozen_blocks": 1, "--method": "e2e"}, "leave --frozen_blocks out"),
    "never learning locally": ({"--local_every": 0}, "--local_every 0"),
    "block-major, global clipping": (
        {"--schedule": "block_major", "--clip": "global"},
        "use --clip block",
    ),
    "block-major, end to end": ({"--schedule": "block_major", "--method": "e2e"}, "leave --schedule out"),
    "lambda < 0": ({"--lambda_aux": "-1"}, "--lambda_aux -1.0"),
    "lambda not finite": ({"--lambda_aux": "nan"}, "--lambda_aux nan"),
    "held out everything": ({"--held_out": 48}, "--held_out"),
    "nothing to resume": ({"--resume": "true"}, "--resume"),
    "contradiction": ({"--resume": "true", "--overwrite_output_dir": "true"}, "contradict"),
    "output is a file": ({"--output_dir": "{tmp}/rows.xml"}, "is a file"),
    "output holds a run": ({"--output_dir": "{tmp}/model"}, "--overwrite_output_dir"),
    "reentrant": ({"--gradient_checkpointing_kwargs": '{"use_reentrant": true}'}, "use_reentrant"),
    "dtype": ({"--param_dtype": "int8"}, "--param_dtype int8"),
    "dtype of the state": ({"--state_dtype": "int8"}, "--state_dtype int8"),
    "offload without the schedule": ({"--offload": "block"}, "add --schedule block_major"),
    "unknown offload": ({"--schedule": "block_major", "--offload": "disk"}, "invalid choice: 'disk'"),
    "prefetch < 0": ({"--prefetch_gib": "-1"}, "--prefetch_gib -1.0"),
    "unknown optimizer": ({"--optim": "adamm"}, "--optim adamm is no class of torch.optim"),
    "unknown argument of the optimizer": (
        {"--optim": "NAdam", "--optim_args": "speed=9"},
        "torch.optim.NAdam takes",
    ),
    "broken argument of the optimizer": ({"--optim": "SGD", "--optim_args": "momentum"}, "momentum=0.9"),
    "optimizer that is missing": (
        {"--optim": "galore_adamw", "--optim_target_modules": "q_proj"},
        "galore_torch",
    ),
    "retention text missing": ({"--retention_text": "{tmp}/none.txt"}, "--retention_text"),
    "retention text empty": ({"--retention_text": "{tmp}/empty.jsonl"}, "empty.jsonl is empty"),
    "retention text binary": ({"--retention_text": "{tmp}/binary.jsonl"}, "is not UTF-8 text"),
    "retention task unknown": ({"--retention_tasks": "chess"}, "--retention_tasks chess does not exist"),
    "retention never": (
        {"--retention_text": "{tmp}/rows.xml", "--retention_every": 0},
        "--retention_every 0",
    ),
    "retention of nothing": ({"--retention_every": 5}, "add --retention_text"),
    "budget without text": ({"--max_forgetting": 0.1}, "add --retention_text"),
    "budget < 0": ({"--max_forgetting": "-1", "--retention_text": "{tmp}/rows.xml"}, "--max_forgetting -1.0"),
    "rows without tasks": ({"--retention_data_dir": "{tmp}"}, "add --retention_tasks"),
    "yaml missing": ({"--config": "{tmp}/none.yaml"}, "--config"),
    "yaml unknown key": ({"--config": "{tmp}/unknown.yaml"}, "colour"),
    "unknown flag": ({"--colour": "red"}, "--colour"),
    "unknown method": ({"--method": "magic"}, "magic"),
}


# The same mistakes in `lopt grpo`; what it asks of rows is another matter.
OF_SFT = ("no rows given", "unknown columns", "prompts too long", "held out everything")
GRPO: dict[str, tuple[dict[str, object], str]] = {
    **{name: case for name, case in CASES.items() if name not in OF_SFT},
    "no rows, no task": ({"--train_file": None, "--task": None}, "nothing says what a right answer is"),
    "own reward, no rows": (
        {"--train_file": None, "--task": None, "--reward_funcs": "{module}:good"},
        "--train_file or --dataset_name",
    ),
    "unknown task": ({"--task": "chess"}, "--task must be one of gsm8k, numinamath"),
    "columns of another task": ({"--task": "numinamath"}, "--task numinamath needs the columns `problem`"),
    "task without answers": ({"--train_file": "{tmp}/unanswered.jsonl"}, "none of the 4 rows has an answer"),
    "prompts all too long": ({"--max_prompt_length": 8}, "--max_prompt_length 8: all 48 prompts are longer"),
    "wrong length flag": ({"--max_seq_length": 64}, "--max_prompt_length"),
    "groups that do not fit": ({"--num_generations": 3}, "--num_generations 3 does not divide the 4"),
    "one generation": ({"--num_generations": 1}, "at least 2 generations"),
    "evaluation without whole groups": (
        {"--held_out": 8, "--per_device_eval_batch_size": 3},
        "--per_device_eval_batch_size",
    ),
    "held out everything": ({"--held_out": 48}, "--held_out"),
    "streaming": ({"--streaming": "true"}, "--streaming is for lopt sft"),
    "unknown reward": ({"--reward_funcs": "praise"}, "--reward_funcs"),
    "reward module missing": ({"--reward_funcs": "nowhere_to_be_found:f"}, "nowhere_to_be_found"),
    "reward function missing": ({"--reward_funcs": "{module}:nothing"}, "nothing"),
    "reward raises": ({"--reward_funcs": "{module}:broken"}, "What is"),
    "reward of the wrong length": (
        {"--reward_funcs": "{module}:short"},
        "returned 3 values for 4 completions",
    ),
    "reward that is no number": ({"--reward_funcs": "{module}:text"}, "text"),
    "tied head and vLLM": (
        {"--model_name_or_path": "{tmp}/tied", "--use_vllm": "true"},
        "--tied_embeddings freeze",
    ),
}
REWARDS = """
def good(completions, **_):
    return [0.0] * len(completions)

def broken(completions, **_):
    raise KeyError("no such thing")

def short(completions, **_):
    return [1.0] * (len(completions) - 1)

def text(completions, **_):
    return ["high"] * len(completions)
"""


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
    (folder / "unanswered.jsonl").write_text(
        "\n".join(json.dumps({"question": f"Why {i}?", "answer": "nobody knows"}) for i in range(4)) + "\n"
    )
    (folder / "bad_rewards.py").write_text(REWARDS)
    save_tiny(folder / "tied", "llama-tied")
    (folder / "unknown.yaml").write_text("colour: red\n")
    return folder


OF_GRPO = {"--task": "gsm8k", "--num_generations": 4, "--per_device_train_batch_size": 4}
OF_GRPO |= {"--max_completion_length": 4, "--head_warmup_steps": 1, "--per_device_eval_batch_size": 4}


def command(tmp: Path, changes: dict[str, object], name: str = "sft") -> list[str]:
    flags: dict[str, object] = {
        "--model_name_or_path": "{tmp}/model",
        "--train_file": "{tmp}/good.jsonl",
        "--output_dir": "{tmp}/out",
        "--max_steps": 2,
        "--num_blocks": 2,
        **(OF_GRPO if name == "grpo" else {}),
        **changes,
    }
    words: list[str] = []
    for flag, value in flags.items():
        if value is not None:
            text = str(value).replace("{tmp}", str(tmp)).replace("{module}", "bad_rewards")
            words += [flag, *(value if isinstance(value, list) else [text])]
    return [name, *words]


@pytest.mark.parametrize(
    ("name", "case"), [*(("sft", case) for case in CASES), *(("grpo", case) for case in GRPO)]
)
def test_mistake(
    name: str, case: str, tmp: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = (CASES if name == "sft" else GRPO)[case]
    monkeypatch.chdir(tmp)
    before = snapshot(tmp)
    try:
        code = main(command(tmp, changes, name))
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
