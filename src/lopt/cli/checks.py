"""What a command that trains checks before anything is read."""

from __future__ import annotations

import importlib.util
import inspect
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import whoami
from transformers import TrainingArguments
from transformers.integrations import (
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)
from transformers.trainer_utils import IntervalStrategy
from trl import DPOConfig, GRPOConfig

from lopt.cli.flags import DataArguments, ModelArguments
from lopt.cli.inherited import check_effects
from lopt.core.blocks import split
from lopt.core.config import LoPTConfig
from lopt.data.mix import parse_mix
from lopt.data.presets import PRESETS, Preset
from lopt.messages import error_text
from lopt.models.load import load_config
from lopt.trainers.checks import check_numbers, check_routers, check_settings, check_workers
from lopt.validation import check, check_number

# What transformers does not name as available even where it is.
_NEVER_LISTED = ("azure_ml", "flyte")

METRICS = {
    "sft": ("loss", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"),
    "dpo": (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/*"),
        *("logits/*", "entropy", "mean_token_accuracy", "num_tokens", "aux_loss"),
    ),
    "grpo": (
        *("loss", "reward", "reward_std", "frac_reward_zero_std", "rewards/*/mean", "rewards/*/std", "kl"),
        *("entropy", "completions/*", "clip_ratio/*", "sampling/*", "num_tokens", "aux_loss", "step_time"),
    ),
}
"""Figures of a command's evaluation, by which a best model can be chosen; `*` stands for a name."""


def check_run(
    model_args: ModelArguments, data_args: DataArguments, config: LoPTConfig, args: TrainingArguments
) -> None:
    """Refuse what is known to be impossible before anything is read.

    Raises:
        ValueError: no model, no peft, settings that do not go with the method or have no effect, a metric
            that no evaluation has, a hub or a logger that cannot be used.
    """
    check_model(model_args)
    check_numbers(args)
    _check_more_numbers(args)
    check_effects(args, streaming=data_args.streaming)
    check_settings(args, config)
    _check_metric(args)
    check_workers(args, data_args.streaming)
    check_loggers(args)
    check_hub(args)
    check_cache()
    if config.method == "lora":
        check_lora(model_args.lora_r, model_args.lora_alpha)


def check_lora(r: int, lora_alpha: int) -> None:
    """Check the flags of adapters.

    Raises:
        ValueError: a number is out of its bounds; PEFT is not installed.
    """
    check_number("lora_r", r, minimum=1)
    check_number("lora_alpha", lora_alpha, above=0)
    if importlib.util.find_spec("peft") is None:
        raise ValueError('--method lora needs peft: pip install "lopt[peft]"')


def _check_more_numbers(args: Any) -> None:
    """Refuse numbers that transformers and TRL take, and fail on or ignore later."""
    check(bool(str(args.output_dir).strip()), "output_dir", repr(args.output_dir), "the name of a folder")
    check_number("save_steps", args.save_steps, above=0)
    check_number("pad_to_multiple_of", getattr(args, "pad_to_multiple_of", None), minimum=1)
    check_number("neftune_noise_alpha", args.neftune_noise_alpha, minimum=0)
    check_number("label_smoothing_factor", args.label_smoothing_factor, minimum=0, below=1)


def _check_metric(args: TrainingArguments) -> None:
    """Refuse to choose the best model by a figure that no evaluation has.

    A trainer in Python may have more figures: of several data sets, or of a function of its own.
    """
    metric = args.metric_for_best_model
    figures = METRICS[_command_of(args)]
    if metric is not None and not any(fnmatch(metric.removeprefix("eval_"), figure) for figure in figures):
        raise ValueError(
            f"`metric_for_best_model` {metric} is no figure of an evaluation: use one of {', '.join(figures)}"
        )


def _command_of(args: TrainingArguments) -> str:
    """Return the command whose trainer has this config."""
    return "grpo" if isinstance(args, GRPOConfig) else "dpo" if isinstance(args, DPOConfig) else "sft"


def check_cache() -> None:
    """Refuse a cache of rows that cannot be written to, before anything is read.

    Raises:
        ValueError: with the folder, the reason and the variable that moves it.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"the cache of rows {folder} cannot be written to ({error.strerror}): set HF_DATASETS_CACHE to a "
            "folder that can"
        ) from error


def check_loggers(args: TrainingArguments) -> None:
    """Refuse what the run should be reported to and is unknown, not installed, or without a key.

    Raises:
        ValueError: with the name and what to do.
    """
    if "none" in (args.report_to or ()):  # alone it has become an empty list
        raise ValueError("--report_to none cannot be given beside another name: give one or the other")
    try:
        get_reporting_integration_callbacks(args.report_to)
    except ValueError as error:
        raise ValueError(f"--report_to: {error}") from error
    installed = (*get_available_reporting_integrations(), *_NEVER_LISTED)
    for name in args.report_to or ():
        if name not in installed:
            raise ValueError(f"--report_to {name} is not installed: pip install {name.replace('_', '-')}")
        if name == "wandb":
            _check_wandb()


def _check_wandb() -> None:
    """Refuse Weights & Biases without a key, or with one that it does not take, unless it logs locally."""
    import wandb

    if wandb.setup().settings.mode not in ("online", "run", None):  # by WANDB_MODE or `wandb offline`
        return
    helps = "run `wandb login`, or log locally with WANDB_MODE=offline"
    try:
        newer = "prompt" in inspect.signature(wandb.login).parameters
        known = wandb.login(prompt=False) if newer else wandb.api.api_key
    except wandb.errors.Error as error:
        raise ValueError(f"--report_to wandb: {error_text(error).rstrip('.')}: {helps}") from error
    if not known:
        raise ValueError(f"--report_to wandb has no key: {helps}")


def check_hub(args: TrainingArguments) -> None:
    """Refuse to push to a hub that does not answer or does not know the user.

    Raises:
        ValueError: with the flag and the reason.
    """
    for name in ("push_to_hub", "log_completions_hub_repo"):
        if not getattr(args, name, None) or not args.should_save:
            continue
        try:
            whoami(token=args.hub_token)
        except Exception as error:  # of the network, of huggingface_hub, or of what it is built on
            raise ValueError(
                f"--{name}: the hub cannot be written to ({error_text(error)}): log in with `hf auth login`, "
                "or leave it out"
            ) from error


def check_model(model_args: ModelArguments) -> None:
    """Refuse a command without a model."""
    if model_args.model_name_or_path is None:
        raise ValueError(
            "--model_name_or_path is missing: give a folder, a hub id, gemma3-270m or smollm2-135m"
        )


def check_evaluation(data_args: DataArguments, args: TrainingArguments) -> None:
    """Evaluate where rows are held out, each epoch or every `--eval_steps`; refuse it where none are.

    Raises:
        ValueError: nothing is held out; a preset of pairs outside `lopt dpo`, or another within.
    """
    mixed = [part.name for part in parse_mix(data_args.data_mix or [])]
    for preset in (PRESETS[name] for name in (data_args.dataset_preset, *mixed) if name in PRESETS):
        _check_use(preset, _command_of(args))
    if args.eval_strategy == "no":
        if args.do_eval and not args.do_train:
            raise ValueError("--do_eval alone asks for no training: use lopt eval, or add --do_train")
        if args.do_eval and not data_args.held_out:
            raise ValueError("--do_eval has no rows to evaluate on: add --held_out")
        if data_args.held_out:
            args.eval_strategy = IntervalStrategy.STEPS if args.eval_steps else IntervalStrategy.EPOCH
    elif not data_args.held_out:
        name = IntervalStrategy(args.eval_strategy).value
        raise ValueError(f"--eval_strategy {name} has no rows to evaluate on: add --held_out")


def _check_use(preset: Preset, command: str) -> None:
    if (preset.use == "dpo") == (command == "dpo"):
        return
    pairs = [name for name, preset in PRESETS.items() if preset.use == "dpo"]
    what = "has pairs for lopt dpo" if preset.use == "dpo" else "has no pairs"
    names = pairs if preset.use != "dpo" else [name for name in PRESETS if name not in pairs]
    raise ValueError(f"`dataset_preset` {preset.name} {what}: use one of {', '.join(names)}")


def check_cut(model: str, configs: Iterable[LoPTConfig], **where: Any) -> None:
    """Refuse what the model cannot be cut into, by its config, before its weights are read.

    Args:
        where: `revision` and `trust_remote_code` of the model.
    """
    shape = load_config(model, weights=True, **where)
    for config in configs:
        split(shape.get_text_config().num_hidden_layers, config)
        check_routers(config, shape)
