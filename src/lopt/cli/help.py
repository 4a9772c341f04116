"""`lopt COMMAND --help`: a page of flags in named groups, before torch, transformers or TRL are imported.

The commands that train have some two hundred flags. `--help` shows those of `COMMON`, one line each, and
`--help-all` every flag, with the groups of TRL's and transformers' own documentation.
"""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NamedTuple

from lopt.cli.flag_names import with_flags
from lopt.cli.flags import OWN, flags_of


class Line(NamedTuple):
    """What the help says of one flag: its name, its default as text ("" for none), and a description."""

    name: str
    default: str
    text: str


MODEL = (
    Line("model_name_or_path", "", "folder, hub id or alias, as gemma3-270m"),
    Line("param_dtype", "float32", "dtype of the weights: float32, bfloat16, auto"),
    Line("lora_r", "16", "rank of the adapters of --method lora"),
)
DATA = (
    Line("train_file", "", "JSON, JSONL, Parquet or CSV, also .gz, .zst"),
    Line("dataset_preset", "", "public data set by name; see lopt data"),
    Line("dataset_name", "", "data set on the hub"),
    Line("max_samples", "", "use a random subset of this many rows"),
)
MIX = Line("data_mix", "", "several by weight: a.jsonl:0.7 b.csv:0.3")
SFT_DATA = (
    *DATA,
    MIX,
    Line("max_length", "1024", "tokens per row; longer ones are cut"),
    Line("packing", "False", "fill sequences with several rows"),
)
DPO_DATA = (
    *DATA,
    MIX,
    Line("max_length", "1024", "tokens of prompt and answer; longer is cut"),
    Line("beta", "0.1", "how close to stay to the model as it was"),
    Line("loss_type", "sigmoid", "sigmoid, ipo, hinge and others of TRL"),
)
GRPO_DATA = (
    *DATA,
    Line("task", "", "gsm8k, numinamath, chain_sum or gsm_symbolic"),
    Line("reward_funcs", "", "gsm8k, math, procedural or module:function"),
    Line("max_prompt_length", "", "leave out prompts with more tokens"),
    Line("max_completion_length", "512", "tokens of an answer"),
    Line("num_generations", "8", "answers per prompt"),
)
METHOD = (
    Line("method", "lopt", "lopt, e2e, frozen or lora"),
    Line("num_blocks", "2", "blocks of layers; 1 is end to end"),
    Line("aux_loss", "recon", "recon, next_token, predicted_gradient"),
    Line("lambda_aux", "10.0", "weight of the mean local loss"),
    Line("lr_k1", "", "learning rate of the earlier blocks"),
    Line("local_every", "1", "earlier blocks learn on every N-th step"),
)
MEMORY = (
    Line("per_device_train_batch_size", "8", "rows in a micro-batch"),
    Line("gradient_accumulation_steps", "1", "micro-batches per step"),
    Line("schedule", "eager", "eager, block_major or pipeline"),
    Line("stages", "", "parts of the model that run in turn"),
    Line("offload", "none", "keep on the host: none, optimizer or block"),
    Line("optimizer_device", "auto", "auto, or cpu: step on the host"),
    Line("gradient_checkpointing", "False", "recompute activations: slower, less memory"),
    Line("optim", "adamw_torch_fused", "of transformers or torch.optim"),
    Line("state_dtype", "float32", "optimizer state: float32 or bfloat16"),
)
RUN = (
    Line("output_dir", "outputs/COMMAND", "folder for checkpoints and the model"),
    Line("max_steps", "-1", "optimizer steps; overrides --num_train_epochs"),
    Line("num_train_epochs", "3.0", "passes over the rows"),
    Line("warmup_steps", "0", "steps, or a share below 1"),
    Line("logging_steps", "10", "steps between log lines"),
    Line("save_steps", "500", "steps between checkpoints"),
    Line("resume", "", "continue from the newest whole checkpoint"),
    Line("max_time", "", "stop with a checkpoint after 90m, 2h, ..."),
    Line("seed", "42", "of data order, dropout and heads"),
    Line("report_to", "none", "tensorboard, wandb, trackio, ..."),
)
SFT_RUN = (Line("learning_rate", "2e-05", "of the last block"), *RUN)
DPO_RUN = (Line("learning_rate", "1e-06", "of the last block"), *RUN)
GRPO_RUN = (Line("learning_rate", "1e-06", "of the last block"), *RUN)
EVALUATION = (
    Line("held_out", "0.0", "rows kept back: a share below 1, or a number"),
    Line("eval_steps", "", "steps between evaluations"),
    Line("retention_text", "", "measure the loss on these text files"),
    Line("retention_tasks", "", "measure these benchmarks; slow"),
    Line("max_forgetting", "", "stop when the text's loss has risen by this"),
)
COMPARISON = (
    Line("methods", "e2e lopt frozen lora", "arms, each with settings if needed"),
    Line("sweep", "", "settings to vary, as lambda_aux=0,1,10"),
    Line("seeds", "0 1 2", "one run of every arm for each"),
    Line("keep_models", "False", "keep the model of every run"),
)
MEASURED = (
    Line("held_out", "0.0", "rows for the task loss; 0 means 64"),
    Line("adaptation_tasks", "", "benchmarks of the task itself"),
    Line("retention_tasks", "", "benchmarks of what should be kept"),
    Line("retention_text", "", "text files whose loss should not rise"),
)
_MODEL_AND_DATA = {"model": MODEL, "data": SFT_DATA}
_SHOWN = (Line("rows", "3", "sequences or pairs to show"),)
_METHOD = {"method": METHOD, "memory": MEMORY}
COMMON: dict[str, dict[str, Sequence[Line]]] = {
    "sft": {**_MODEL_AND_DATA, **_METHOD, "run": SFT_RUN, "evaluation": EVALUATION},
    "dpo": {"model": MODEL, "data": DPO_DATA, **_METHOD, "run": DPO_RUN, "evaluation": EVALUATION},
    "grpo": {"model": MODEL, "data": GRPO_DATA, **_METHOD, "run": GRPO_RUN, "evaluation": EVALUATION},
    "compare": {
        "comparison": COMPARISON,
        **_MODEL_AND_DATA,
        **_METHOD,
        "run": SFT_RUN,
        "evaluation": MEASURED,
    },
    "compare dpo": {
        "comparison": COMPARISON,
        "model": MODEL,
        "data": DPO_DATA,
        **_METHOD,
        "run": DPO_RUN,
        "evaluation": MEASURED,
    },
    "data preview": {"preview": _SHOWN, **_MODEL_AND_DATA},
    "data preview dpo": {"preview": _SHOWN, "model": MODEL, "data": DPO_DATA},
}
NAME_A_FOLDER = ("chat", "merge")
"""Commands whose first word is a folder."""

"""The flags that `--help` shows for the commands that train; a test compares them with the real ones."""


def help_page(command: str, what: str, *, every: bool) -> str:
    """Return the help of a command.

    Args:
        command: A key of `OWN`.
        what: What the command does, in a few words.
        every: Show every flag with its whole text, which imports TRL for the commands that train.
    """
    common = command in COMMON and not every
    sections = list(COMMON[command].items() if common else _every_flag(command))
    names = {flag.name for _, flags in sections for flag in flags}
    word = command.split()[0]
    place = "FOLDER " if command in NAME_A_FOLDER else ""
    lines = [f"usage: lopt {command} {place}[--flag value ...]", "", f"{what[0].upper()}{what[1:]}."]
    for title, flags in sections:
        flags = [Line(name, default.replace("COMMAND", word), text) for name, default, text in flags]
        lines += ["", title, *(with_flags(line, names) for flag in flags for line in _wrapped(flag))]
    lines += ["", "A flag is shown with its default; for true or false, the flag alone means true."]
    lines += ["--config FILE.yaml takes flags from a file; those on the command line win."]
    if common:
        lines += [f"All flags, also those of TRL and transformers: lopt {command} --help-all"]
    return "\n".join(lines)


def _wrapped(flag: Line) -> list[str]:
    """Return the lines of one flag: its name and default in a column, the text beside it."""
    name = f"  --{flag.name} {flag.default}".rstrip()
    width = max(shutil.get_terminal_size().columns, 60)
    indent = " " * 35
    text = textwrap.wrap(flag.text, width, initial_indent=indent, subsequent_indent=indent) or [name]
    if len(name) < len(indent) - 1:
        return [name.ljust(len(indent)) + text[0].strip(), *text[1:]] if flag.text else [name]
    return [name, *text]


def _every_flag(command: str) -> Iterator[tuple[str, list[Line]]]:
    """Yield title and flags of each section."""
    groups = OWN[command] if command not in COMMON else flags_of(command)
    for group in groups:
        title, found = "", dict[str, list[Line]]()
        starts = {first: title for title, first in getattr(group, "groups", {}).items()}
        places = _documented(group) if not starts else {}
        for part in fields(group):
            title = places.get(part.name) or starts.get(part.name) or title or "Method and memory"
            found.setdefault(title, []).append(_line(part))
        yield from found.items()


def _line(part: Field[Any]) -> Line:
    default = part.default if part.default_factory is MISSING else part.default_factory()
    if isinstance(default, list):
        default = " ".join(map(str, default))
    text = "" if default is None or default is MISSING else str(getattr(default, "value", default))
    return Line(part.name, text, " ".join(str(part.metadata.get("help", "")).split()))


def _documented(config: type) -> dict[str, str]:
    """Return the sections of the flags of a trainer's config, from the docstrings of it and its bases."""
    found: dict[str, str] = {}
    for base in config.__mro__:
        if base.__module__.startswith("lopt.trainers"):
            own = "Training: lopt's own, or with another default"
            found |= dict.fromkeys(inspect.get_annotations(base), own)
            continue
        title, package = "", base.__module__.partition(".")[0]
        text = inspect.cleandoc(base.__doc__ or "")  # Python 3.13 takes the indentation off itself
        for section, name in re.findall(r"^ {4}(?:> (?!\[)(.+)|(\w+) ?\()", text, re.MULTILINE):
            title = section.removeprefix("Parameters that control ") or title
            if name:
                found.setdefault(name, f"{package}: {title or 'general'}")
    return found
