"""TRL's configs with the defaults of the command line."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import GenerationConfig
from transformers.training_args import OptimizerNames
from trl import DPOConfig, GRPOConfig, SFTConfig

from lopt.engine import grid
from lopt.reliability.manifest import VERIFY
from lopt.reliability.secrets import redacted
from lopt.trainers.optimizer import is_torch_optimizer, torch_options
from lopt.validation import check_choice, check_number

if TYPE_CHECKING:  # what the defaults are put in front of
    from transformers import TrainingArguments
else:
    TrainingArguments = object

logger = logging.getLogger(__name__)


@dataclass
class _Defaults(TrainingArguments):
    """Fields and defaults of a LoPT run that TRL's configs do not have.

    No gradient checkpointing (one block's activations are what it would save), bfloat16 autocast
    only where the hardware has it, two checkpoints kept.
    """

    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute activations in the backward: less memory, about a third slower."},
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Mixed precision in bfloat16. Default: where the GPU supports it."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Leave losses that are not finite out of the log. A run stops at such a loss, and the "
            "filter would wait for the GPU after every micro-batch."
        },
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "How many checkpoints to keep; the oldest go first."}
    )
    checkpoint_verify: Literal["none", "size", "hash"] = field(
        default="hash",
        metadata={
            "help": "What is compared before a checkpoint replaces older ones, and by --resume: 'hash' reads "
            "every byte from the disk, once each time; 'size' compares sizes; 'none' nothing."
        },
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "A name that transformers knows (adamw_torch_fused, adamw_torch_8bit, adamw_torch_4bit, "
            "sgd, adafactor, ...) or a class of torch.optim (NAdam, RMSprop, ...)."
        },
    )
    master_weights: bool | None = field(
        default=None,
        metadata={
            "help": "With weights in bfloat16: keep float32 masters in the optimizer's state (4 bytes per "
            "parameter) instead of rounding stochastically. Default: with `optimizer_device` cpu, where "
            "rounding takes longer than the step."
        },
    )
    state_dtype: str = field(
        default="float32",
        metadata={"help": "Dtype of the optimizer's state between steps: float32 or bfloat16 (half of it)."},
    )
    on_divergence: Literal["warn", "stop", "ignore"] = field(
        default="warn",
        metadata={
            "help": "What follows when a local loss rises far above its lowest or a boundary collapses: "
            "'warn' once, 'stop' with exit code 2, or 'ignore'."
        },
    )
    divergence_factor: float = field(
        default=3.0,
        metadata={"help": "A local loss diverges if its mean is more than so many times its lowest mean."},
    )
    divergence_steps: int = field(
        default=50, metadata={"help": "Optimizer steps that this mean is over, about."}
    )

    def __post_init__(self) -> None:
        check_choice("on_divergence", self.on_divergence, ("warn", "stop", "ignore"))
        check_number("divergence_factor", self.divergence_factor, above=1)
        check_number("divergence_steps", self.divergence_steps, minimum=1)
        check_choice("checkpoint_verify", self.checkpoint_verify, VERIFY)
        check_choice("state_dtype", self.state_dtype, ("float32", "bfloat16"))
        check_choice("include_num_input_tokens_seen", self.include_num_input_tokens_seen,
                     ("all", "non_padding", "no", True, False))  # fmt: skip
        if self.fp16 and self.bf16:
            raise ValueError("`fp16` and `bf16` contradict each other: give one of them")
        if self.ddp_backend and "WORLD_SIZE" not in os.environ:
            raise ValueError("`ddp_backend` is for several processes: start with torchrun, or leave it out")
        if self.load_best_model_at_end and self.eval_strategy == "no":
            raise ValueError(
                "`load_best_model_at_end` compares evaluations, and there are none: add `eval_strategy` "
                "steps and `eval_steps`, of which `save_steps` is a multiple"
            )
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        # Set explicitly: otherwise each of several processes on CPUs would silently train alone.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # Pinned pages serve copies to a GPU; without one torch only warns about them.
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        if getattr(self, "activation_checkpointing", False) is None:  # the flag's new name, since 5.23
            self.activation_checkpointing = self.gradient_checkpointing
        own = str(self.optim) if is_torch_optimizer(self.optim) else None
        if own is not None:
            torch_options(self)
            self.optim = OptimizerNames.ADAMW_TORCH  # whatever transformers knows
        elif self.optim not in list(OptimizerNames):
            raise ValueError(
                f"`optim` {self.optim} is no class of torch.optim and none of {', '.join(OptimizerNames)}"
            )
        super().__post_init__()
        self.optim = own or self.optim

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: the first, in a pipeline the first with the last block."""
        return self.process_index == 0 and _is_at_end()

    @property
    def should_save(self) -> bool:
        """Whether this process writes what is written once."""
        return super().should_save and _is_at_end()

    @property
    def should_log(self) -> bool:
        """Whether this process says what is said once."""
        return super().should_log and _is_at_end()

    def to_dict(self) -> dict[str, Any]:
        """Return what checkpoints, logs and trackers show: no token, also none of `model_init_kwargs`."""
        return redacted(super().to_dict())


def _is_at_end() -> bool:
    """Return whether this process has the last block, if it is in a pipeline."""
    place = grid.current()
    return place is None or place.is_last


@dataclass
class LoPTSFTConfig(_Defaults, SFTConfig):
    """`trl.SFTConfig` with the defaults above."""

    drop_long_rows: bool = field(
        default=False,
        metadata={"help": "Leave rows longer than max_length out instead of cutting them there."},
    )


@dataclass
class LoPTDPOConfig(_Defaults, DPOConfig):
    """`trl.DPOConfig` with the defaults above."""


@dataclass
class LoPTGRPOConfig(_Defaults, GRPOConfig):
    """`trl.GRPOConfig` with the defaults above, which makes room for whole groups of completions.

    A generation batch smaller than a group is spread over more micro-batches of the same optimizer
    step, if that holds enough of them: the policy does not change in between. What cannot work is a
    ValueError.
    """

    def __post_init__(self) -> None:
        words = {"true": True, "false": False}  # TRL's field is for text, and takes these two as well
        self.scale_rewards = words.get(str(self.scale_rewards).lower(), self.scale_rewards)  # type: ignore[assignment]
        _check_sampling(self)
        if self.generation_batch_size is None:
            self.steps_per_generation = self._whole_groups(
                self.steps_per_generation or self.gradient_accumulation_steps
            )
        super().__post_init__()
        given: Any = self.generation_kwargs or {}  # a dict by now
        unknown = given.keys() - vars(GenerationConfig()).keys()
        if unknown and not self.use_vllm:
            raise ValueError(
                f"`generation_kwargs` {', '.join(sorted(unknown))} is nothing that transformers' "
                "GenerationConfig knows: correct it, or leave it out"
            )
        for name in sorted(given.keys() & _OWN_GENERATION.keys()):
            raise ValueError(f"`generation_kwargs` {name}: use {_OWN_GENERATION[name]}")

    def _whole_groups(self, steps: int) -> int:
        ranks = int(os.environ.get("WORLD_SIZE", "1"))  # the launcher's; not set up here yet
        rows, group = self.per_device_train_batch_size * ranks, self.num_generations
        if not group or rows * steps % group == 0:
            return steps
        count = self.gradient_accumulation_steps
        for more in range(steps + 1, count + 1):
            if count % more == 0 and rows * more % group == 0:
                logger.warning(
                    "`steps_per_generation` %d gives %d completions at a time, not whole groups of "
                    "`num_generations` %d: using %d, still within one optimizer step",
                    steps, rows * steps, group, more,
                )  # fmt: skip
                return more
        raise ValueError(
            f"`num_generations` {group} does not divide the {rows * steps} completions generated at a time "
            f"({rows} per micro-batch on all processes x `steps_per_generation` {steps}): "
            "change `num_generations`, `per_device_train_batch_size` or `gradient_accumulation_steps`"
        )


# What may not stand in `generation_kwargs`, where its value would not be checked.
_OWN_GENERATION = {
    **{name: f"`{name}`" for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "max_new_tokens": "`max_completion_length`",
    "num_return_sequences": "`num_generations`",
}
# What TRL compares with in the first step, after rollouts.
_GRPO_CHOICES = {
    "importance_sampling_level": ("token", "sequence"),
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "vllm_mode": ("colocate", "server"),
}


def _check_sampling(args: GRPOConfig) -> None:
    """Refuse what cannot be sampled, and names that TRL would not know in the first step.

    Raises:
        ValueError: with the argument and its bounds.
    """
    check_number("num_generations", args.num_generations, minimum=2)
    check_number("temperature", args.temperature, above=0)
    check_number("top_p", args.top_p, above=0, maximum=1)
    check_number("top_k", args.top_k, minimum=-1)
    check_number("min_p", args.min_p, minimum=0, maximum=1)
    check_number("repetition_penalty", args.repetition_penalty, above=0)
    for name in ("beta", "epsilon", "epsilon_high", "delta"):
        check_number(name, getattr(args, name), minimum=0)
    for name in ("max_completion_length", "num_iterations", "steps_per_generation", "generation_batch_size",
                 "num_generations_eval"):  # fmt: skip
        check_number(name, getattr(args, name), minimum=1)
    check_number("top_entropy_quantile", args.top_entropy_quantile, above=0, maximum=1)
    check_number("off_policy_mask_threshold", args.off_policy_mask_threshold, minimum=0)
    check_number("ref_model_sync_steps", args.ref_model_sync_steps, minimum=1)
    check_number("ref_model_mixup_alpha", args.ref_model_mixup_alpha, minimum=0, maximum=1)
    for name, choices in _GRPO_CHOICES.items():
        check_choice(name, getattr(args, name), choices)
