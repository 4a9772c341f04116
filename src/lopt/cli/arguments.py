"""Groups of flags that commands share."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import yaml
from trl import TrlParser
from yaml.constructor import ConstructorError

from lopt.data.files import SHUFFLE_BUFFER
from lopt.data.hub import one_line
from lopt.data.presets import PRESETS
from lopt.stop import seconds


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A folder, a hub id, an alias (qwen3-4b, qwen2.5-7b, qwen2.5-32b, llama3.1-8b) or "
            "gemma3-270m, the packaged model that needs no hub."
        },
    )
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    param_dtype: str = field(
        default="float32",
        metadata={
            "aliases": ["--dtype"],
            "help": "Dtype of the weights: float32, bfloat16 (half the memory; updates are rounded "
            "stochastically, or follow --master_weights) or auto.",
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "For example sdpa, eager, flash_attention_2."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters of --method lora."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapters of --method lora."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules that get an adapter. Default: every linear layer but the head."},
    )


@dataclass
class DataArguments:
    """Which rows, from where."""

    train_file: list[str] | None = field(
        default=None, metadata={"help": "Local JSON, JSONL, Parquet or CSV: one or more files."}
    )
    dataset_preset: str | None = field(
        default=None,
        metadata={
            "help": f"A public data set: {', '.join(PRESETS)}. From the hub, or from a copy in --train_file."
        },
    )
    dataset_name: str | None = field(default=None, metadata={"help": "A data set on the hub."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Its configuration, if it has several."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    dataset_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the hub."})
    max_samples: int | None = field(default=None, metadata={"help": "Use a random subset of this many rows."})
    held_out: float = field(
        default=0.0,
        metadata={"help": "Rows kept back for evaluation: a share below 1, or a number of rows."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read rows when they are needed, for data larger than memory. Needs --max_steps."},
    )
    shuffle_buffer: int = field(
        default=SHUFFLE_BUFFER,
        metadata={"help": "With --streaming: how many rows the next one is drawn from at random."},
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Longest sequence in tokens; the same as --max_length."}
    )


@dataclass
class TaskArguments:
    """What GRPO asks and how it marks the answers."""

    task: str | None = field(
        default=None,
        metadata={
            "help": "gsm8k or numinamath, whose rows come from the hub or from --train_file, or chain_sum or "
            "gsm_symbolic, whose problems are made on the spot. Default: what --dataset_preset names."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Reward functions: gsm8k, math, procedural or your own as module:function, which is "
            "called as TRL does. Default: the task's."
        },
    )
    instruction: str | None = field(
        default=None,
        metadata={"help": "What the prompt says after the question, '' for nothing. Default: the task's."},
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Leave out rows whose prompt has more tokens."}
    )


@dataclass
class RunArguments:
    """What to do with an output folder that holds a run already."""

    resume: str | None = field(
        default=None,
        metadata={
            "help": "Go on from the newest whole checkpoint in --output_dir (or --resume auto), or from the "
            "checkpoint that is named."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Start anew in a folder that holds a run; its checkpoints are removed."},
    )

    max_time: str | None = field(
        default=None,
        metadata={
            "help": "Stop after so long, with a checkpoint: 90m, 2h, 1h30m or seconds. Goes on with --resume."
        },
    )

    def __post_init__(self) -> None:
        self.limit = None if self.max_time is None else seconds(str(self.max_time))
        word = str(self.resume).lower()  # a YAML file gives true or false
        self.resume = {"true": "auto", "auto": "auto", "none": None, "false": None}.get(word, self.resume)


@dataclass
class RetentionArguments:
    """What is measured while a model trains, to see what it forgets."""

    retention_text: list[str] | None = field(
        default=None,
        metadata={"help": "Plain text that has nothing to do with the task: one or more UTF-8 files."},
    )
    retention_tokens: int = field(default=2048, metadata={"help": "Tokens of each text, from its start."})
    retention_tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Benchmarks, as in lopt eval --tasks; slow, so see --retention_limit."},
    )
    retention_data_dir: str | None = field(
        default=None, metadata={"help": "Local rows for --retention_tasks. Default: from the hub."}
    )
    retention_limit: int | None = field(
        default=100, metadata={"help": "Items of each benchmark (of each subject of MMLU)."}
    )
    retention_every: int | None = field(
        default=None,
        metadata={
            "help": "Measure every so many steps, at the start and at the end. Default: --eval_steps with "
            "--eval_strategy steps, else a tenth of the run."
        },
    )
    max_forgetting: float | None = field(
        default=None,
        metadata={
            "help": "Stop when the mean loss on --retention_text has risen by more than so many nats per "
            "token since the start. The model is saved as it is then."
        },
    )


class _Parser(TrlParser):
    """Says a mistake in one line, as all of lopt does, rather than after three hundred lines of usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(re.sub(r"^argument (--\w+)[^:]*:", r"\1:", message))


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse(command: str, groups: Sequence[Any], arguments: Sequence[str]) -> tuple[Any, ...]:
    """Flags and `--config file.yaml` (flags win) into one instance per dataclass.

    Raises:
        ValueError: an unknown flag, a value of the wrong type; the YAML file is missing, broken or has
            unknown keys.
    """
    parser = _Parser(groups, prog=f"lopt {command}")
    hints = {name: hint for group in groups for name, hint in get_type_hints(group).items()}
    path, words = _take_config(_resume_alone(list(arguments)))
    if path is not None:
        words = _words_of(_read_yaml(path), f"--config {path}", parser, hints) + words
    *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        flag = next((word for word in unknown if word.startswith("-")), unknown[0])
        name = flag.lstrip("-").partition("=")[0]
        raise ValueError(f"{flag} is no flag of lopt {command}: {_hint(name, hints, '--')}")
    return tuple(parsed)


def _hint(name: str, known: Iterable[str], dashes: str = "") -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {dashes}{close[0]}?" if close else "--help lists them"


def _resume_alone(arguments: list[str]) -> list[str]:
    """`--resume` without a value means the newest."""
    ends = [*arguments[1:], "--"]
    pairs = zip(arguments, ends, strict=True)
    return [
        "--resume=auto" if flag == "--resume" and following.startswith("--") else flag
        for flag, following in pairs
    ]


def _take_config(arguments: list[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config FILE` or `--config=FILE`, and the other arguments."""
    for position, word in enumerate(arguments):
        flag, sign, value = word.partition("=")
        if flag == "--config":
            end = position + (1 if sign else 2)
            value = value if sign else "".join(arguments[position + 1 : end])
            if not value:
                raise ValueError("--config needs a YAML file")
            return Path(value), arguments[:position] + arguments[end:]
    return None, arguments


def _read_yaml(path: Path) -> dict[Any, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path} is not a file")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), _UniqueKeys)
    # The last three are what PyYAML itself stumbles over: deep nesting, values that their tags do not fit.
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, LookupError) as error:
        mark = getattr(error, "problem_mark", None)
        told = f"line {mark.line + 1}: {getattr(error, 'problem', '')}" if mark else one_line(error)
        raise ValueError(f"--config {path} is not valid YAML: {told}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path} must hold flags, one 'name: value' per line")
    return content


def _words_of(content: dict[Any, Any], where: str, parser: _Parser, hints: Mapping[str, Any]) -> list[str]:
    """A YAML file as words of a command line, so that its values are checked like those of flags."""
    words: list[str] = []
    for key, value in content.items():
        if key not in hints:
            raise ValueError(f"{where}: {key!r} is no flag: {_hint(str(key), hints)}")
        if value is None and NoneType not in get_args(hints[key]):
            raise ValueError(f"{where}: {key} has no value: give it one, or leave the line out")
        kinds: list[Any] = [get_origin(hint) for hint in (hints[key], *get_args(hints[key]))]
        if isinstance(value, list) and list not in kinds:
            raise ValueError(f"{where}: {key} takes one value, not a list")
        if value is None or value == []:  # no word says this
            parser.set_defaults(**{key: value})
        elif isinstance(value, list) and len(value) > 1:
            words += [f"--{key}", *map(str, value)]
        else:
            (value,) = value if isinstance(value, list) else [value]
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words
