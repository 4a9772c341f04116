"""`run.yaml` and `run.json`: a folder says how it was made, and is made again from what it says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lopt.cli.main import COMMANDS, main
from lopt.cli.parsing import parse, settings
from lopt.cli.record import record_of
from lopt.reliability.provenance import versions
from lopt.reliability.record import RUN_JSON, RUN_YAML


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `--full_determinism` sets for the whole process is set back."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING",
                 "HCCL_DETERMINISTIC", "FLASH_ATTENTION_DETERMINISTIC"):  # fmt: skip
        monkeypatch.setenv(name, "")
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False


def run(*flags: Any) -> int:
    return main([str(flag) for flag in flags])


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RUN_JSON).read_text())


def model(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("deterministic")
def test_a_run_is_made_again_from_its_folder(tiny_folder: Path, sums_file: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "first-rerun"
    flags = ["--model_name_or_path", tiny_folder, "--train_file", sums_file, "--output_dir", first]
    flags += ["--max_steps", 3, "--save_steps", 2, "--learning_rate", 1e-3, "--head_warmup_steps", 2]
    flags += ["--held_out", 4, "--lr_scheduler_kwargs", "{}", "--full_determinism", "--seed", 7]
    flags += ["--hub_token", "hf_secret", "--max_time", "1h"]
    assert run("sft", *flags) == 0
    assert run("sft", "--config", first / RUN_YAML) == 0  # beside, nothing is overwritten
    assert model(first) == model(again)
    assert run("sft", "--config", first / RUN_YAML, "--output_dir", tmp_path / "other", "--seed", 8) == 0
    assert model(first) != model(tmp_path / "other")

    told, told_again = record(first), record(again)
    assert told["data"] == told_again["data"] and told["data"]["train"]["rows"] == 44
    differing = {k for k, v in told["settings"].items() if v != told_again["settings"][k]}
    assert differing == {"output_dir", "max_time"}  # a time limit is of one start
    (attempt,) = told["attempts"]
    assert attempt["versions"] == versions() and attempt["command"].startswith(
        "lopt sft --model_name_or_path"
    )
    assert not any("hf_secret" in path.read_text() for path in first.rglob("*.[jy][sa][om][nl]"))


def test_a_resumed_run_says_what_is_other(
    tiny_folder: Path, sums_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", tiny_folder, "--train_file", sums_file, "--output_dir", tmp_path / "out"]
    flags += ["--head_warmup_steps", 2, "--save_steps", 1]
    assert run("sft", *flags, "--max_steps", 2) == 0
    capsys.readouterr()
    flags += ["--max_samples", 20, "--weight_decay", 0.1, "--gradient_accumulation_steps", 2]
    assert run("sft", *flags, "--max_steps", 3, "--resume") == 0
    said = capsys.readouterr().out
    assert "Resume: other settings than before: max_samples was null and is 20; " in said
    assert "max_steps was 2 and is 3; weight_decay was 0.0 and is 0.1" in said
    assert (
        "Resume: a step had 8 rows and has 16, so after 2 steps the run goes on at row 32 where it had"
        in said
    )
    assert (
        "come to row 16: 16 rows are skipped, which the run has not seen; the learning rate goes from" in said
    )
    assert "from 0 to 6.67e-06 after the next step, as the schedule now has 3 steps" in said  # 2e-5 / 3
    assert "Resume: the checkpoint's own weight_decay go on: start anew to change that" in said
    assert "Resume: the rows are not those that the run began with" in said
    attempts = record(tmp_path / "out")["attempts"]
    assert [Path(str(a["resumed_from"])).name for a in attempts] == ["None", "checkpoint-2"]


@pytest.mark.parametrize("command", ["sft", "grpo", "compare", "eval", "probe", "demo"])
def test_every_command_s_flags_survive_the_file(command: str, tmp_path: Path) -> None:
    """No flags: no change. What a file says is what the command line said."""
    assert command in COMMANDS and settings(command, [])[1] == {}
    given = ["--output_dir", str(tmp_path / "out")]
    given += {
        "probe": ["--base", "a: b #c"],
        "demo": ["--model", "a: b #c"],
        "eval": ["--base", "a: b #c"],
    }.get(
        command, ["--model_name_or_path", "a: b #c", "--num_blocks", "3", "--gradient_checkpointing", "true"]
    )
    first = record_of(command, given)
    (tmp_path / "out").mkdir()
    first.write(tmp_path / "out")
    again = record_of(command, ["--config", str(tmp_path / "out" / RUN_YAML)])
    changed = dict(again.changed)
    assert changed.pop("output_dir") == str(tmp_path / "out-rerun")
    assert changed == {k: v for k, v in first.changed.items() if k != "output_dir"}


def test_yaml_s_no_is_the_word(tmp_path: Path) -> None:
    """YAML 1.1 takes it for false; flags that are true or false go on taking that."""
    (tmp_path / "no.yaml").write_text("save_strategy: no\npacking: no\n")
    (*_, args) = parse("sft", ["--config", str(tmp_path / "no.yaml"), "--output_dir", "x"])
    assert args.save_strategy == "no" and args.packing is False


def test_secrets_are_left_out(tmp_path: Path) -> None:
    nested = '{"token": "hf_secret"}'
    (tmp_path / "x.yaml").write_text(f"hub_token: hf_secret\nmodel_init_kwargs: {nested}\n")
    for flags in (
        ["--hub_token", "hf_secret"],
        ["--hub_token=hf_secret"],
        ["--model_init_kwargs", nested],
        [f"--model_init_kwargs={nested}"],
        ["--config", str(tmp_path / "x.yaml")],
    ):
        made = record_of("sft", ["--output_dir", "x", *flags])
        assert "hf_secret" not in repr(made) and "hub_token" not in made.settings
    assert yaml.safe_load(made.run_yaml(Path("x")))["output_dir"] == "x-rerun"
