"""Every field that TRL's three configs inherit or define is obeyed, or refused with the reason.

A field is obeyed if the code of transformers or TRL that reads it still runs in a LoPT trainer: the library
reads it somewhere, and no method that a LoPT class overrides forgets to call the original. Runs of `lopt sft`
and `lopt grpo` with one flag changed at a time have shown that weights, logs or files change.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import transformers
import trl

from lopt import LoPTConfig
from lopt.cli.inherited import LABELS, NEEDS, REFUSED, check_effects
from lopt.trainers import LoPTDPOTrainer, LoPTGRPOTrainer, LoPTSFTTrainer
from lopt.trainers.config import LoPTGRPOConfig, LoPTSFTConfig
from lopt.trainers.inherited import CONFLICTS, check_inherited

CONFIGS = (trl.SFTConfig, trl.DPOConfig, trl.GRPOConfig)
# Read by the command line: lopt.cli.training, .checks, .rows and .inherited.
BY_COMMANDS = {"resume_from_checkpoint", "dataset_text_field", "do_train", "do_eval", "local_rank"}


def library() -> str:
    """The code that reads a config: of transformers' Trainer, its integrations, and TRL's trainers."""
    root, trainers = Path(transformers.__file__).parent, Path(trl.__file__).parent / "trainer"
    paths = [*root.glob("trainer*.py"), *(root / "integrations").glob("*.py"), root / "training_args.py"]
    for name in ("sft", "dpo", "grpo"):
        paths += [trainers / f"{name}_config.py", trainers / f"{name}_trainer.py"]
    paths += [trainers / "base_trainer.py", trainers / "callbacks.py"]
    return "\n".join(path.read_text("utf-8") for path in paths)


def overrides() -> Iterator[tuple[FunctionType, FunctionType]]:
    """Methods of LoPT's trainers with those of the library that they stand in front of."""
    for cls in (LoPTSFTTrainer, LoPTDPOTrainer, LoPTGRPOTrainer):
        ours = [base for base in cls.__mro__ if base.__module__.startswith("lopt.")]
        theirs = [base for base in cls.__mro__ if base.__module__.startswith(("trl.", "transformers."))]
        for base in ours:
            for name, found in vars(base).items():
                for original in (vars(other).get(name) for other in theirs):
                    if isinstance(found, FunctionType) and isinstance(original, FunctionType):
                        yield found, original


def test_every_field_is_read_or_spoken_for() -> None:
    code = library()
    refused = {name for conflict in CONFLICTS for name in conflict.names} | REFUSED.keys()
    for config in CONFIGS:
        for field in fields(config):
            read = re.search(rf"\bargs\.{field.name}\b|\bself\.{field.name}\b(?! = )", code)
            known = field.name in BY_COMMANDS | refused or field.name in LABELS
            assert read or known, f"nothing reads {config.__name__}.{field.name}: obey it or refuse it"


def test_no_override_forgets_the_original() -> None:
    """A method that replaces the library's reads every flag which that reads, or calls it."""
    for method, original in overrides():
        reads = set(re.findall(r"\bargs\.\w+", inspect.getsource(original)))
        own = inspect.getsource(method)
        assert "super(" in own or all(flag in own for flag in reads), method.__qualname__


def test_rules_name_fields_that_exist() -> None:
    names = {field.name for config in CONFIGS for field in fields(config)}
    names |= {"activation_checkpointing", "activation_checkpointing_kwargs"}  # since transformers 5.23
    ruled = [*REFUSED, *LABELS, *(n for need in NEEDS for n in (*need.names, *need.needed.split()))]
    for name in [*ruled, *(n for conflict in CONFLICTS for n in conflict.names)]:
        assert any(re.fullmatch(name.replace("*", ".*"), known) for known in names), name


def config(folder: Path, kind: type = LoPTSFTConfig, **given: Any) -> Any:
    return kind(output_dir=str(folder), use_cpu=True, **given)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (LoPTSFTConfig, {"hub_strategy": "end", "push_to_hub": True}),
        (LoPTSFTConfig, {"run_name": "a", "hub_token": "x", "logging_steps": 5, "save_steps": 7}),
        (LoPTSFTConfig, {"packing": True, "packing_strategy": "wrapped"}),
        (LoPTSFTConfig, {"eval_packing": True, "packing_strategy": "wrapped", "max_grad_norm": 2.0}),
        (LoPTSFTConfig, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"a": 1}}),
        (LoPTSFTConfig, {"eval_strategy": "steps", "metric_for_best_model": "loss", "eval_delay": 2}),
        (LoPTGRPOConfig, {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2}),
        (LoPTGRPOConfig, {"loss_type": "sapo", "sapo_temperature_neg": 2.0, "scale_rewards": "false"}),
        (LoPTGRPOConfig, {"log_completions": True, "num_completions_to_print": 2}),
    ],
)
def test_what_has_an_effect_passes(kind: type, given: dict[str, Any], tmp_path: Path) -> None:
    args = config(tmp_path, kind, **given)
    check_effects(args)
    check_inherited(args, LoPTConfig())


def test_trainers_refuse_what_they_cannot_obey_also_without_a_command(tmp_path: Path) -> None:
    lopt = LoPTConfig()
    for kind, given, message in (
        (LoPTSFTConfig, {"torch_compile": True}, "`torch_compile`: the hooks"),
        (LoPTSFTConfig, {"optim_args": "a=1"}, "`optim_args` a=1 has no effect on `optim` adamw_torch_fused"),
        (trl.DPOConfig, {"label_smoothing_factor": 0.1}, "`label_smoothing_factor`: only the loss of"),
        (trl.DPOConfig, {"activation_offloading": True}, "`activation_offloading`: it needs a GPU"),
        (LoPTGRPOConfig, {"train_sampling_strategy": "sequential"}, "`train_sampling_strategy`: GRPO draws"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            check_inherited(config(tmp_path, kind, **given), lopt)  # type: ignore[arg-type]
    args = config(tmp_path, LoPTSFTConfig, optim="adamw_torch_4bit", weight_decay=0.1)
    check_inherited(args, lopt)
    check_inherited(config(tmp_path, optim="NAdam", optim_args="momentum_decay=0.1"), lopt)
    # Of one of several data sets, or of a function of its own: only a command knows all figures.
    check_inherited(config(tmp_path, eval_strategy="steps", metric_for_best_model="eval_first_loss"), lopt)
