"""Arguments that transformers and TRL define and a LoPT trainer cannot obey.

The library's own code, which `LoPTMixin` leaves in place, reads all others: tests/trainers/test_inherited.py
goes through every field of the three configs.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import Trainer, TrainingArguments, get_scheduler

from lopt.core.config import LoPTConfig
from lopt.trainers.optimizer import is_torch_optimizer

# They replace parts of the loop with one that knows each layer, and take no groups of parameters.
LAYER_WISE = ("galore", "apollo", "lomo")


class Conflict(NamedTuple):
    """What is refused.

    Attributes:
        names: The arguments.
        asked: Whether the settings ask for it.
        reason: Why it is refused, and what to do instead.
    """

    names: tuple[str, ...]
    asked: Callable[[Any, LoPTConfig], Any]
    reason: str


CONFLICTS = (
    Conflict(
        ("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        lambda args, config: args.torch_compile,
        "the hooks at boundaries and for stops run Python inside the forward, and nothing is compiled: leave "
        "it out",
    ),
    Conflict(
        ("activation_offloading",),
        lambda args, config: (
            getattr(args, "activation_offloading", False) and (config.is_local or args.use_cpu)
        ),
        "it needs a GPU, and one backward per forward, where earlier blocks have one of their own: use "
        "`gradient_checkpointing`, or more blocks",
    ),
    Conflict(
        ("use_transformers_continuous_batching",),
        lambda args, config: getattr(args, "use_transformers_continuous_batching", False) and args.use_cpu,
        "it sizes its cache by the memory of a GPU, and on a CPU takes all there is: leave it out",
    ),
    Conflict(
        ("sync_ref_model",),
        lambda args, config: getattr(args, "sync_ref_model", False) and config.offload == "block",
        "the reference model would be mixed with weights that are not on the device: use `offload` optimizer",
    ),
    Conflict(
        ("enable_jit_checkpoint",),
        lambda args, config: getattr(args, "enable_jit_checkpoint", False),
        "a stop signal is answered with a whole checkpoint anyway: leave it out",
    ),
    Conflict(
        ("average_tokens_across_devices",),
        lambda args, config: (
            not args.average_tokens_across_devices and args.world_size > 1 and config.is_local
        ),
        "local losses are means over the tokens of all processes: leave it at true",
    ),
    Conflict(
        ("parallelism_config",),
        lambda args, config: args.parallelism_config is not None,
        "tensor, context and sequence parallelism split what a block is: use FSDP2 or DDP",
    ),
    Conflict(
        ("accelerator_config",),
        lambda args, config: getattr(args.accelerator_config, "split_batches", False) and args.world_size > 1,
        "split_batches divides a batch among the processes, where `per_device_train_batch_size` is for "
        "each: set it to a process's share",
    ),
    Conflict(
        ("bf16_full_eval", "fp16_full_eval"),
        lambda args, config: (args.bf16_full_eval or args.fp16_full_eval) and config.offload == "block",
        "`offload` block keeps the weights in host memory as they are: leave it out",
    ),
    Conflict(
        ("label_smoothing_factor",),
        lambda args, config: args.label_smoothing_factor and hasattr(args, "beta"),
        "only the loss of supervised fine-tuning reads it: leave it out (DPO has `label_smoothing`)",
    ),
    Conflict(
        ("train_sampling_strategy",),
        lambda args, config: args.train_sampling_strategy != "random" and hasattr(args, "num_generations"),
        "GRPO draws prompts in an order of its own: use `shuffle_dataset` true or false",
    ),
)
"""Arguments that are refused where they are asked for, in any LoPT trainer."""


def check_inherited(args: TrainingArguments, config: LoPTConfig) -> None:
    """Refuse arguments of transformers and TRL that a LoPT trainer would not obey.

    Raises:
        ValueError: with the argument, the reason and what to do instead.
    """
    for conflict in CONFLICTS:
        if conflict.asked(args, config):
            plain = type(args).__dataclass_fields__
            given = [name for name in conflict.names if getattr(args, name, None) != plain[name].default]
            raise ValueError(f"`{(given or conflict.names)[0]}`: {conflict.reason}")
    if config.method == "frozen" and (config.num_blocks if config.block_boundaries is None else 2) == 1:
        raise ValueError("`method` frozen needs `num_blocks` >= 2: one block is end to end")
    check_optimizer(args, config)
    check_schedule(args)
    check_best_model(args)


def check_optimizer(args: TrainingArguments, config: LoPTConfig) -> None:
    """Refuse an optimizer that is not installed or cannot serve blocks, and options that it does not read.

    Raises:
        ValueError: it makes parameter groups of its own, or has no use for `optim_args`.
        ImportError: its package is missing.
    """
    name = str(getattr(args.optim, "value", args.optim))
    layer_wise = any(word in name for word in LAYER_WISE)
    if layer_wise and config.method != "lora":
        raise ValueError(
            f"`optim` {name} makes its own parameter groups and cannot serve blocks: use one such as "
            "adamw_torch_fused"
        )
    if args.optim_target_modules is not None and not layer_wise:
        raise ValueError(f"`optim_target_modules` has no effect on `optim` {name}: leave it out")
    if is_torch_optimizer(args.optim) or layer_wise:
        return  # the first's arguments are checked when they are parsed
    options = Trainer.get_optimizer_cls_and_kwargs(args)[1]
    if args.optim_args:
        without = copy.copy(args)
        without.optim_args = None
        if Trainer.get_optimizer_cls_and_kwargs(without)[1] == options:
            raise ValueError(
                f"`optim_args` {args.optim_args} has no effect on `optim` {name}: leave it out, or name the "
                "class in torch.optim, such as AdamW or NAdam"
            )


def check_schedule(args: TrainingArguments) -> None:
    """Refuse arguments that the learning rate's schedule does not take.

    Raises:
        ValueError: with the schedule and the reason.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        with warnings.catch_warnings(action="ignore"):
            get_scheduler(
                args.lr_scheduler_type,
                optimizer,
                0,
                10,
                scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
            )
    except (TypeError, ValueError, KeyError) as error:
        kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        given = args.lr_scheduler_kwargs or "missing"
        raise ValueError(
            f"`lr_scheduler_kwargs` {given}: `lr_scheduler_type` {kind} cannot be made of them: {error}"
        ) from error


def check_best_model(args: TrainingArguments) -> None:
    """Refuse to keep the best of models that are never compared.

    Raises:
        ValueError: no metric, or no evaluation.
    """
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        raise ValueError("`save_strategy` best needs a metric: add `metric_for_best_model` loss")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise ValueError(
            "`save_strategy` best compares evaluations, and there are none: add `eval_strategy` steps"
        )
