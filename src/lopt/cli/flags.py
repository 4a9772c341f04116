"""The flags of the commands that train but those inherited from TRL, and which command has which.

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lopt.cli.report_flags import (
    ChatArguments,
    CompareArguments,
    DemoArguments,
    DownloadArguments,
    EvalArguments,
    MergeArguments,
    PlanArguments,
    PreviewArguments,
    ProbeArguments,
    ReportArguments,
)
from lopt.core.config import LoPTConfig
from lopt.data.presets import PRESETS, SHUFFLE_BUFFER
from lopt.options import flag
from lopt.reliability.stop import seconds


@dataclass
class ModelArguments:
    """Which model, and how it is loaded."""

    groups: ClassVar[dict[str, str]] = {"Model": "model_name_or_path"}

    model_name_or_path: str | None = flag(
        None,
        "A folder, a hub id, an alias (qwen3-4b, qwen2.5-7b, llama3.1-8b, ...) or gemma3-270m or "
        "smollm2-135m, the packaged models that need no hub.",
    )
    model_revision: str | None = flag(None, "Branch, tag or commit on the hub.")
    param_dtype: str = flag(
        "float32",
        "Dtype of the weights: float32, bfloat16 (half the memory; updates are rounded stochastically, or "
        "follow --master_weights) or auto.",
        aliases=["--dtype"],
    )
    attn_implementation: str | None = flag(None, "For example sdpa, eager, flash_attention_2.")
    lora_r: int = flag(16, "Rank of the adapters of --method lora.")
    lora_alpha: int = flag(32, "Scale of the adapters of --method lora.")
    lora_target_modules: list[str] | None = flag(
        None, "Modules that get an adapter. Default: every linear layer but the head."
    )


@dataclass
class DataArguments:
    """Which rows, from where."""

    groups: ClassVar[dict[str, str]] = {"Data": "train_file"}

    train_file: list[str] | None = flag(
        None,
        "JSON, JSONL, Parquet or CSV: one or more files, also packed (.gz, .zst) or by address "
        "(s3://bucket/rows.jsonl).",
    )
    dataset_preset: str | None = flag(
        None, f"A public data set: {', '.join(PRESETS)}. From the hub, or from a copy in --train_file."
    )
    dataset_name: str | None = flag(None, "A data set on the hub.")
    data_mix: list[str] | None = flag(
        None,
        "Several sources in place of one, each with its share of the rows: a.jsonl:0.7 b.parquet:0.3 (files, "
        "presets, data sets on the hub; without weights, all rows).",
    )
    dataset_config: str | None = flag(None, "Its configuration, if it has several.")
    dataset_split: str = flag("train", "Its split.")
    dataset_revision: str | None = flag(None, "Branch, tag or commit on the hub.")
    max_samples: int | None = flag(None, "Use a random subset of this many rows.")
    held_out: float = flag(
        0.0, "Rows kept back for evaluation: a share below 1, or a number of rows from 1 on."
    )
    streaming: bool = flag(
        False, "Read rows when they are needed, for data larger than memory. Needs --max_steps."
    )
    shuffle_buffer: int = flag(
        SHUFFLE_BUFFER, "With --streaming: the number of rows from which the next one is drawn at random."
    )
    max_seq_length: int | None = flag(None, "Longest sequence in tokens; another name for --max_length.")


@dataclass
class TaskArguments:
    """What GRPO asks, and how answers are rewarded."""

    groups: ClassVar[dict[str, str]] = {"Task": "task"}

    task: str | None = flag(
        None,
        "gsm8k or numinamath, whose rows come from the hub or from --train_file, or chain_sum or "
        "gsm_symbolic, whose problems are generated. Default: --dataset_preset.",
    )
    reward_funcs: list[str] | None = flag(
        None,
        "Reward functions: gsm8k, math, procedural, or module:function of your own with the signature that "
        "TRL calls. Default: the task's.",
    )
    instruction: str | None = flag(
        None, "Text of the prompt after the question, '' for none. Default: the task's."
    )
    max_prompt_length: int | None = flag(None, "Leave out rows whose prompt has more tokens.")


def checkpoint_named(value: Any) -> str | None:
    """Return what `--resume` means: auto for the newest whole checkpoint, None for none, or a checkpoint."""
    word = str(value).lower()  # a YAML file gives true, yes, false or no
    if word in ("true", "yes", "auto"):
        return "auto"
    return None if word in ("none", "false", "no") else str(value)


@dataclass
class RunArguments:
    """What to do with an output folder that holds a run already, and when to stop."""

    groups: ClassVar[dict[str, str]] = {"Run": "resume"}

    resume: str | None = flag(
        None,
        "Resume from the newest whole checkpoint in --output_dir (or --resume auto), or from the checkpoint "
        "that is named.",
        nargs="?",
        const="auto",
    )
    overwrite_output_dir: bool = flag(
        False, "Start anew in a folder that holds a run; its checkpoints are removed."
    )
    max_time: str | None = flag(
        None, "Stop with a checkpoint after this long: 90m, 2h, 1h30m or seconds. Continue with --resume."
    )

    def __post_init__(self) -> None:
        self.limit = None if self.max_time is None else seconds(str(self.max_time))
        self.resume = checkpoint_named(self.resume)


@dataclass
class RetentionArguments:
    """What is measured while a model trains, to see what it forgets."""

    groups: ClassVar[dict[str, str]] = {"Retention": "retention_text"}

    retention_text: list[str] | None = flag(
        None, "Plain text that has nothing to do with the task: one or more UTF-8 files."
    )
    retention_tokens: int = flag(2048, "Tokens of each text, from its start.")
    retention_tasks: list[str] | None = flag(
        None, "Benchmarks, as in lopt eval --tasks; slow, so see --retention_limit."
    )
    retention_data_dir: str | None = flag(None, "Local rows for --retention_tasks. Default: from the hub.")
    retention_limit: int | None = flag(100, "Items of each benchmark (of each subject of MMLU).")
    retention_every: int | None = flag(
        None,
        "Measure every N steps, and at the start and at the end. Default: --eval_steps with "
        "--eval_strategy steps, else a tenth of the run.",
    )
    max_forgetting: float | None = flag(
        None,
        "Stop when the mean loss on --retention_text has risen by more than this many nats per token since "
        "the start. The model is saved as it is then.",
    )


@dataclass
class ScreenArguments:
    """What is printed."""

    groups: ClassVar[dict[str, str]] = {"Screen": "quiet"}

    quiet: bool = flag(False, "Print nothing but warnings and errors.")
    json_logs: bool = flag(
        False, "Print a JSON object a line instead of text: start, log, message and end, for programs."
    )

    def __post_init__(self) -> None:
        if self.quiet and self.json_logs:
            raise ValueError("--quiet and --json_logs contradict each other: give one of them")


_RUN = (ModelArguments, DataArguments, RunArguments, RetentionArguments, ScreenArguments, LoPTConfig)
OWN: dict[str, tuple[type, ...]] = {
    "sft": _RUN,
    "dpo": _RUN,
    "grpo": (*_RUN[:2], TaskArguments, *_RUN[2:]),
    "chat": (ChatArguments,),
    "merge": (MergeArguments,),
    "eval": (EvalArguments,),
    **dict.fromkeys(
        ("compare", "compare dpo"),
        (CompareArguments, ModelArguments, DataArguments, RunArguments, LoPTConfig),
    ),
    "probe": (ProbeArguments,),
    "report": (ReportArguments,),
    "plan": (PlanArguments,),
    "data preview": (PreviewArguments, *_RUN),
    "data preview dpo": (PreviewArguments, *_RUN),
    "data download": (DownloadArguments,),
    "demo": (DemoArguments,),
}
"""Our own dataclasses whose fields are the flags of a command, in the order in which `parse` returns them."""
_TRAINERS = {
    **dict.fromkeys(("sft", "compare", "data preview"), "LoPTSFTConfig"),
    **dict.fromkeys(("dpo", "data preview dpo", "compare dpo"), "LoPTDPOConfig"),
    "grpo": "LoPTGRPOConfig",
}


def flags_of(command: str) -> Sequence[Any]:
    """Return every dataclass whose fields are flags of `command`: ours, then that of its trainer.

    Imports torch, transformers and TRL for the commands that train.
    """
    if command not in _TRAINERS:
        return OWN[command]
    from lopt.trainers import config

    return (*OWN[command], getattr(config, _TRAINERS[command]))
