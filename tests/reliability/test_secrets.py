"""Tokens are shown nowhere: not in files, logs, printed settings or errors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import pytest
import transformers

from lopt.cli.main import main
from lopt.reliability.secrets import HIDDEN, known_secrets, redact, redacted

SECRET = "a-Sentinel-T0ken-0123456789"
IN_ENVIRONMENT = "hf_SentinelSentinelSentinel0123456789"


def leaked(folder: Path) -> list[str]:
    secrets = [SECRET.encode(), IN_ENVIRONMENT.encode()]
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(secret in path.read_bytes() for secret in secrets)]


@pytest.fixture
def quiet_again() -> Iterator[None]:
    """`--log_level` holds for the whole process."""
    loggers = (transformers.utils.logging, datasets.utils.logging)
    levels = [logger.get_verbosity() for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.set_verbosity(level)


@pytest.mark.usefixtures("quiet_again")
def test_tokens_are_written_nowhere(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("HF_TOKEN", IN_ENVIRONMENT)
    flags = ["--hub_token", SECRET, "--save_steps", "1"]
    flags += ["--report_to", "tensorboard", "--logging_steps", "1"]
    flags += ["--num_blocks", "2", "--head_warmup_steps", "1", "--log_level", "debug"]
    assert sft(model, *flags, "--output_dir", str(tmp_path / "out")) == 0
    shown = capfd.readouterr()
    assert SECRET not in shown.out + shown.err and IN_ENVIRONMENT not in shown.out + shown.err
    assert (tmp_path / "out" / "checkpoint-1" / "training_args.json").is_file()
    assert list(tmp_path.rglob("events.out.*"))
    assert leaked(tmp_path) == []


IN_ERRORS = (
    ["--hub_tokn", SECRET],
    [f"--hub-tokn={SECRET}"],
    ["--hub_token", SECRET, "x"],
    ["--model_init_kwargs", json.dumps({"token": SECRET})],
    ["--hub_token", SECRET, "--train_file", f"/nowhere/{SECRET}.jsonl"],
    ["--config", "{tmp}/unknown.yaml"],
    ["--config", "{tmp}/broken.yaml"],
)


@pytest.mark.parametrize("flags", IN_ERRORS)
def test_tokens_are_not_told_in_errors(
    flags: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "unknown.yaml").write_text(f"hub_tokn: {SECRET}\nhub_token: {SECRET}\ncolour: {SECRET}\n")
    (tmp_path / "broken.yaml").write_text(f"a: b: {SECRET}\nhub_token: [\n")
    try:
        code = sft(model, *(flag.replace("{tmp}", str(tmp_path)) for flag in flags))
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    assert code == 2 and "error" in shown.err and SECRET not in shown.out + shown.err


@pytest.fixture
def model(tiny_folder: Path) -> Path:
    return tiny_folder


def sft(model: Path, *flags: str) -> int:
    rows = model.parent / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"question": f"{i}?", "answer": f"{i}"}) for i in range(8)))
    given = ["--model_name_or_path", str(model), "--train_file", str(rows), "--max_steps", "1"]
    return main(["sft", *given, *flags])


def test_what_is_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "from-the-environment")
    command = [
        "--hub_token",
        "tok-123456",
        "--eos_token",
        "<|im_end|>",
        "--max_tokens",
        "128000",
        "--api-key=k-12345",
    ]
    found = known_secrets(command)
    assert {"tok-123456", "k-12345", "from-the-environment"} <= found
    assert not {"<|im_end|>", "128000"} & found
    tree = {"hub_token": "x", "eos_token": "<eos>", "list": [{"password": "y", "n": 1}]}
    hidden = {"hub_token": HIDDEN, "eos_token": "<eos>", "list": [{"password": HIDDEN, "n": 1}]}
    assert redacted(tree | {"text": f"a {IN_ENVIRONMENT}"}) == hidden | {"text": f"a {HIDDEN}"}
    assert redact("a tok-123456 b", found) == f"a {HIDDEN} b"
