"""What a training command checks before it reads anything, where a table of words does not reach."""

from __future__ import annotations

import logging
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lopt.cli import checks
from lopt.cli.checks import check_cache, check_evaluation, check_hub, check_loggers
from lopt.cli.flags import DataArguments
from lopt.cli.noise import at_log_level
from lopt.trainers.checks import check_batches
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig


def sft(folder: Path, **fields: Any) -> LoPTSFTConfig:
    return LoPTSFTConfig(output_dir=str(folder), use_cpu=True, **fields)


def test_a_logger_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: ["tensorboard"])
    check_loggers(sft(tmp_path, report_to=["tensorboard"]))
    with pytest.raises(ValueError, match="--report_to comet_ml is not installed: pip install comet-ml"):
        check_loggers(sft(tmp_path, report_to=["tensorboard", "comet_ml"]))


class WandbError(Exception):
    pass


@pytest.mark.parametrize(
    ("mode", "login", "expected"),
    [
        ("online", lambda prompt=True: True, None),
        ("offline", lambda prompt=True: False, None),
        (
            "online",
            lambda prompt=True: False,
            "--report_to wandb has no key: run `wandb login`, or log locally",
        ),
        ("online", lambda key=None: True, "has no key"),  # before `prompt`, when it would ask for one
    ],
)
def test_wandb_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, login: Any, expected: str | None
) -> None:
    """As wandb 0.31 answers; it is not installed for tests."""
    settings = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    wandb = SimpleNamespace(
        setup=lambda: settings, login=login, api=SimpleNamespace(api_key=None),
        errors=SimpleNamespace(Error=WandbError),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(checks, "get_available_reporting_integrations", lambda: ["wandb"])
    monkeypatch.setattr(checks, "get_reporting_integration_callbacks", lambda names: names)
    args = sft(tmp_path, report_to=["wandb"])
    with nullcontext() if expected is None else pytest.raises(ValueError, match=expected):
        check_loggers(args)


def test_wandb_with_a_key_that_it_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def login(prompt: bool = True) -> bool:
        raise WandbError("WANDB_API_KEY invalid: it has 3 characters.")

    test_wandb_without_a_key(
        tmp_path,
        monkeypatch,
        "online",
        login,
        "wandb: WANDB_API_KEY invalid: it has 3 characters: run `wandb",
    )


def test_the_log_level_holds_inside_a_command_only(tmp_path: Path) -> None:
    logger = logging.getLogger("lopt")
    before = logger.level
    with at_log_level(sft(tmp_path, log_level="error")):
        assert logger.level == logging.ERROR
    assert logger.level == before
    with at_log_level(sft(tmp_path)):
        assert logger.level == before


@pytest.mark.parametrize("error", [ConnectionError("no route"), RuntimeError("httpx: no such host")])
def test_a_hub_that_does_not_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def refuse(**_: Any) -> None:
        raise error

    monkeypatch.setattr(checks, "whoami", refuse)
    check_hub(sft(tmp_path))
    for fields in ({"push_to_hub": True}, {"log_completions": True, "log_completions_hub_repo": "a/b"}):
        config = LoPTGRPOConfig(output_dir=str(tmp_path), use_cpu=True, **fields)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{error}.*log in with `hf auth login`, or leave it out"):
            check_hub(config)


def test_when_held_out_rows_are_evaluated_on(tmp_path: Path) -> None:
    for fields, strategy in (
        ({}, "epoch"),
        ({"eval_steps": 5}, "steps"),
        ({"eval_strategy": "steps"}, "steps"),
    ):
        args = sft(tmp_path, **fields)
        check_evaluation(DataArguments(held_out=4), args)
        assert args.eval_strategy == strategy
    args = sft(tmp_path)
    check_evaluation(DataArguments(), args)
    assert args.eval_strategy == "no"


def test_rows_of_a_batch(tmp_path: Path) -> None:
    rows = list(range(7))
    check_batches(sft(tmp_path), rows, None)
    check_batches(sft(tmp_path, dataloader_drop_last=True, per_device_train_batch_size=7), rows, iter(rows))
    with pytest.raises(ValueError, match="the 7 training rows make no batch of 8"):
        check_batches(sft(tmp_path, dataloader_drop_last=True), rows, None)
    grpo = LoPTGRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, num_generations=2, gradient_accumulation_steps=2
    )
    with pytest.raises(ValueError, match="the 7 training rows are fewer than the 8 prompts"):
        check_batches(grpo, rows, None)
    check_batches(grpo, [*rows, 7], None)


def test_a_cache_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "new/cache")
    check_cache()
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/cache")
    with pytest.raises(ValueError, match=r"/proc/cache cannot be written to .*: set HF_DATASETS_CACHE"):
        check_cache()
