"""Every YAML in examples/ is read, becomes the settings of a run, and asks for what the page asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lopt import LoPTConfig
from lopt.cli import grpo, sft
from lopt.cli.parsing import parse
from lopt.cli.rows import check_task
from lopt.data.presets import PRESETS
from lopt.data.question_tasks import QUESTION_TASKS
from lopt.evaluation.compare import parse_arms
from lopt.models.names import ALIASES
from lopt.models.packaged import PACKAGED_MODEL
from lopt.rewards import REWARDS
from lopt.trainers.checks import check_settings
from lopt.trainers.config import LoPTSFTConfig
from lopt.trainers.preferences import check_preference_numbers
from page_commands import commands

FOLDER = Path(__file__).parents[2] / "examples"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "fsdp2.yaml")
RUNS = [name for name in FILES if not name.startswith("compare")]
COMPARISONS = [name for name in FILES if name.startswith("compare")]
SHARED = ("max_samples", "max_steps", "learning_rate", "num_blocks", "lambda_aux", "lr_k1", "loss_type")
SHARED += ("num_generations", "num_iterations", "steps_per_generation", "max_completion_length")
SHARED += ("max_seq_length", "per_device_train_batch_size", "gradient_accumulation_steps", "task")
SHARED += ("dataset_preset", "model_name_or_path", "max_prompt_length")


def settings(name: str) -> list[Any]:
    command = name.partition("_")[0]
    # Whole groups of the 8 processes these files are made for, in one.
    flags = ["--config", str(FOLDER / name)]
    if command == "grpo" and "gemma" not in name and "smoke" not in name:
        flags += ["--per_device_train_batch_size", "4"]
    return list(parse(command, flags))


@pytest.mark.parametrize("name", RUNS)
def test_it_becomes_a_run(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    model_args, data_args, *rest = settings(name)
    args, config = rest[-1], rest[-2]
    check_settings(args, config)
    if name.startswith("sft"):
        sft.check(model_args, data_args, args)
        assert data_args.dataset_preset in PRESETS
    elif name.startswith("dpo"):
        sft.check(model_args, data_args, args)
        check_preference_numbers(args)
    else:
        check_task(rest[0], data_args)
        grpo.check(data_args, args)
        assert QUESTION_TASKS[rest[0].task].reward in REWARDS
    assert model_args.model_name_or_path == PACKAGED_MODEL or "/" in model_args.model_name_or_path
    content = yaml.safe_load((FOLDER / name).read_text())
    for key, value in content.items():  # YAML reads 1e-6 as text; what arrives must be what was meant
        got = next(getattr(x, key) for x in [model_args, data_args, *rest] if hasattr(x, key))
        if key not in ("per_device_train_batch_size", "steps_per_generation", "bf16", "output_dir"):
            assert str(got) == str(value) or got == value or key == "save_strategy", (key, got, value)


@pytest.mark.parametrize("name", COMPARISONS)
def test_it_becomes_a_comparison(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    flags, _, data_args, _, config, args = parse("compare", ["--config", str(FOLDER / name)])
    arms = parse_arms(flags.methods, flags.sweep, config)
    assert len(arms) >= len(flags.methods) and data_args.dataset_preset in PRESETS
    for arm in arms:
        check_settings(args, arm.config)


def test_every_command_of_the_page_has_its_file() -> None:
    contents = [yaml.safe_load((FOLDER / name).read_text()) for name in RUNS]
    for words in commands():
        flags = {
            w.removeprefix("--"): words[i + 1]
            for i, w in enumerate(words[:-1])
            if w.removeprefix("--") in SHARED
        }
        method = "e2e" if "e2e" in words else "lopt"
        found = [
            c
            for c in contents
            if c["method"] == method and all(_same(c.get(key), value) for key, value in flags.items())
        ]
        assert found, words


def _same(ours: Any, theirs: str) -> bool:
    try:
        return float(ours) == float(theirs)
    except (TypeError, ValueError):
        return str(ours) == theirs


def test_fsdp2_is_what_the_trainers_accept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = LoPTSFTConfig(output_dir=str(tmp_path))
    content = yaml.safe_load((FOLDER / "fsdp2.yaml").read_text())
    assert content["distributed_type"] == "FSDP" and content["fsdp_config"]["fsdp_version"] == 2
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("lopt.trainers.checks.OLDEST_FOR_FSDP2", {})
    monkeypatch.setenv("FSDP_VERSION", str(content["fsdp_config"]["fsdp_version"]))
    check_settings(args, LoPTConfig())


def test_aliases_are_the_pages() -> None:
    assert set(ALIASES) >= {"qwen3-4b", "qwen2.5-7b", "qwen2.5-32b", "llama3.1-8b"}
