"""Groups of flags that commands share."""

from __future__ import annotations

from dataclasses import dataclass, field

from lopt.data.presets import PRESETS, SHUFFLE_BUFFER
from lopt.reliability.stop import seconds


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
