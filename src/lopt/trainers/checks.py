"""Settings that cannot work with boundaries, refused before any work."""

from __future__ import annotations

import os
from typing import Any

from torch import nn
from transformers import TrainingArguments

from lopt.architectures import base_model
from lopt.core.config import LoPTConfig
from lopt.tied_embeddings import shares_embeddings
from lopt.trainers.inherited import check_inherited
from lopt.validation import check, check_number


def check_numbers(args: TrainingArguments) -> None:
    """Refuse numbers that a trainer would take for something else, or fail on late.

    Raises:
        ValueError: a number is out of its bounds, with the argument and the bounds.
    """
    for name, minimum in (
        ("per_device_train_batch_size", 1),
        ("per_device_eval_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("dataloader_num_workers", 0),
        ("weight_decay", 0),
        ("max_grad_norm", 0),
        ("warmup_steps", 0),
    ):
        check_number(name, getattr(args, name), minimum=minimum)
    check_number("learning_rate", args.learning_rate, above=0)
    check_number("num_train_epochs", args.num_train_epochs, above=0)
    rule = ">= 1, or left out for `num_train_epochs`"
    check(args.max_steps >= 1 or args.max_steps == -1, "max_steps", args.max_steps, rule)
    if args.fp16 and args.use_cpu:
        raise ValueError("`fp16` needs a GPU: leave it out, or use `bf16`")


def check_settings(args: TrainingArguments, config: LoPTConfig, model: Any = None) -> None:
    """Refuse what cannot work with boundaries.

    Args:
        model: checked as well if it is loaded already (not a name).

    Raises:
        ValueError: arguments of transformers and TRL that cannot be obeyed; reentrant checkpointing,
            DeepSpeed, FSDP 1, vLLM with an untied embedding; block-major with FSDP, a gradient scaler or
            routers; offloaded weights with several processes or vLLM.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(
            f"the launcher started {launched} processes, which do not find each other: "
            f"each would train alone (world size {args.world_size}). On CPUs add `use_cpu`"
        )
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise ValueError(
            f"`method` {config.method} does not run on DeepSpeed, whose engine runs one backward per step: "
            "use FSDP2 (accelerate launch --config_file examples/fsdp2.yaml) or plain torchrun"
        )
    check_inherited(args, config)
    if not config.is_cut:
        return
    checkpointing: Any = args.gradient_checkpointing_kwargs or {}
    if checkpointing.get("use_reentrant"):
        raise ValueError(
            "`gradient_checkpointing_kwargs` with use_reentrant=true gives no gradient behind a boundary: "
            "leave it out or set it to false"
        )
    if fsdp_version(args) == 1:
        raise ValueError(
            f"`method` {config.method} needs FSDP2, which shards parameter by parameter: set fsdp_version: 2 "
            "(examples/fsdp2.yaml)"
        )
    if config.is_local and config.aux_loss == "next_token" and fsdp_version(args) is not None:
        raise ValueError(
            "`aux_loss` next_token reads rows of the LM head, which FSDP2 shards: "
            "use `aux_loss` recon, or DDP"
        )
    if config.schedule == "block_major":
        _check_block_major(args, config, model)
    if getattr(args, "use_vllm", False) and isinstance(model, nn.Module):
        _check_vllm(config, model)


def _check_block_major(args: TrainingArguments, config: LoPTConfig, model: Any) -> None:
    if fsdp_version(args) is not None:
        raise ValueError("`schedule` block_major does not run on FSDP2: use `schedule` eager, or DDP")
    if args.fp16:
        raise ValueError("`schedule` block_major steps blocks without a gradient scaler: use `bf16`")
    if config.offload == "block" and args.world_size > 1:
        raise ValueError(
            "`offload` block keeps the whole model in the host memory of each of the "
            f"{args.world_size} processes, which cannot average its gradients: use `offload` optimizer, "
            "one process, or FSDP2 with `schedule` eager"
        )
    if config.offload == "block" and getattr(args, "use_vllm", False):
        raise ValueError(
            "`offload` block with `use_vllm`: vLLM would read weights that are not on the device: "
            "use `offload` optimizer"
        )
    if isinstance(model, nn.Module):
        check_routers(config, model.config)


def check_routers(config: LoPTConfig, model_config: Any) -> None:
    """Refuse the block-major schedule for a model that balances its routers, by its config."""
    if config.schedule == "block_major" and getattr(model_config, "output_router_logits", False):
        raise ValueError(
            "`schedule` block_major cannot balance routers over all layers at once: use `schedule` eager"
        )


def fsdp_version(args: TrainingArguments) -> int | None:
    """Return 1 or 2, None without FSDP; it is set by the argument `fsdp` or by accelerate's launcher."""
    plugin = getattr(args, "fsdp_plugin_args", None)
    if args.fsdp and plugin:
        return int(plugin.get("fsdp_version", 1))
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        return int(os.environ.get("FSDP_VERSION", "1"))
    return None


def _check_vllm(config: LoPTConfig, model: nn.Module) -> None:
    base = base_model(model)
    if config.tied_embeddings == "untie" and shares_embeddings(base):
        raise ValueError(
            "`use_vllm`: vLLM would go on generating with the tied LM head while training unties it: "
            "add `tied_embeddings` freeze"
        )
