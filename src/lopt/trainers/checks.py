"""Settings that cannot work with boundaries, refused before any work."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, TrainingArguments
from trl import SFTConfig

from lopt.architectures import base_model, find_decoder
from lopt.core.blocks import Blocks, split
from lopt.core.config import LoPTConfig
from lopt.engine import grid
from lopt.engine.block_major import ROUTERS
from lopt.requirements import OLDEST_FOR_FSDP2, check_installed
from lopt.tied_embeddings import shares_embeddings, will_untie
from lopt.trainers.inherited import check_inherited
from lopt.trainers.pipeline import take_place
from lopt.trainers.vllm import check_vllm
from lopt.validation import LARGEST_COUNT, check, check_number


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
        ("save_total_limit", 1),
    ):
        check_number(name, getattr(args, name), minimum=minimum)
    check_number("seed", args.seed, minimum=0, maximum=2**32 - 1)  # NumPy's
    check_number("learning_rate", args.learning_rate, above=0)
    for name in ("num_train_epochs", "adam_epsilon", "logging_steps", "eval_steps"):
        check_number(name, getattr(args, name), above=0)
    for name in ("adam_beta1", "adam_beta2"):
        check_number(name, getattr(args, name), minimum=0, below=1)
    rule = ">= 1, or left out for `num_train_epochs`"
    check(args.max_steps >= 1 or args.max_steps == -1, "max_steps", args.max_steps, rule)
    for name in ("max_steps", "num_train_epochs", "logging_steps", "eval_steps", "save_steps", "max_length"):
        check_number(name, getattr(args, name, None), maximum=LARGEST_COUNT)
    weights = getattr(args, "reward_weights", None) or ()
    for weight in weights:
        check_number("reward_weights", weight)
    if weights and not any(weights):
        raise ValueError("`reward_weights` are all 0, so that nothing would be learned: give one that is not")
    if args.fp16 and args.use_cpu:
        raise ValueError("`fp16` needs a GPU: leave it out, or use `bf16`")


def check_settings(args: TrainingArguments, config: LoPTConfig, model: Any = None) -> None:
    """Refuse what cannot work with boundaries.

    Args:
        model: the model, or its config; None if neither is known yet.

    Raises:
        ValueError: several GPUs in one process; arguments of transformers or TRL that cannot be obeyed;
            reentrant checkpointing, DeepSpeed, FSDP 1, vLLM or a synced reference model with an embedding
            that is untied; block-major with FSDP, a gradient scaler or routers; offloaded weights with
            vLLM; precision that FSDP2 does not keep.
        ImportError: FSDP2 with an accelerate that is too old for it; vLLM is not installed.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    place = grid.current()
    if launched != args.world_size * (1 if place is None else place.size):
        raise ValueError(
            f"the launcher started {launched} processes, which do not find each other: "
            f"each would train alone (world size {args.world_size}). On CPUs add `use_cpu`"
        )
    if fsdp_version(args) == 2:
        check_installed(OLDEST_FOR_FSDP2, "FSDP2")
    check_vllm(args)
    _check_gpus(args, config, model)
    _check_sharded(args, config, model)
    _check_adapters(args, config, model)
    if args.deepspeed or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        raise ValueError(
            f"`method` {config.method} does not run on DeepSpeed, whose engine runs one backward per step: "
            "use FSDP2 (accelerate launch --config_file examples/fsdp2.yaml) or plain torchrun"
        )
    check_inherited(args, config)
    if config.schedule == "pipeline":
        _check_pipeline(args, config)
    if config.is_staged:
        _check_block_major(args, config, model)
    elif not config.is_cut:
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
    if config.is_local and config.aux_loss == "predicted_gradient":
        _check_predicted_gradient(args, config)
    if config.is_local and config.aux_loss == "next_token" and fsdp_version(args) is not None:
        raise ValueError(
            "`aux_loss` next_token reads rows of the LM head, which FSDP2 shards: "
            "use `aux_loss` recon, or DDP"
        )
    _check_untied(args, config, model)


def check_before(given: Iterable[Any], config: LoPTConfig, model: Any, adapters: Any) -> None:
    """Check what a trainer is given, before it loads a model that is given by name, and before its data.

    Args:
        given: the trainer's other arguments, among them its TrainingArguments, in any order.
        adapters: the PEFT config that the trainer will wrap the model in; None if there is none.

    Raises:
        ValueError: there are no rows, the model cannot be cut, `method` lora has no adapters, or of
            `check_settings`.
    """
    given = tuple(given)
    if any(isinstance(value, Dataset) and not len(value) for value in given):
        raise ValueError("`train_dataset` or `eval_dataset` has no rows: give it some, or leave it out")
    args = next((value for value in given if isinstance(value, TrainingArguments)), None)
    known = model
    adapted = hasattr(model, "peft_config") or any(hasattr(value, "peft_type") for value in given)
    if config.method == "lora" and not adapted:
        raise ValueError(
            "`method` lora needs adapters, without which all weights would learn: give `peft_config`"
        )
    if isinstance(model, str) and args is not None:
        options: dict[str, Any] = dict(getattr(args, "model_init_kwargs", None) or {})
        trusted = options.get("trust_remote_code", getattr(args, "trust_remote_code", False))
        known = AutoConfig.from_pretrained(model, revision=options.get("revision"), trust_remote_code=trusted)
        split(known.get_text_config().num_hidden_layers, config)
    if args is not None:
        # Beside adapters the embedding does not learn, so it is not untied.
        check_settings(args, config if adapters is None else config.replace(tied_embeddings="freeze"), known)
    if isinstance(model, nn.Module):
        Blocks(model, config)


def check_batches(args: Any, train: Any, held_out: Any) -> None:
    """Refuse rows that make no whole batch where incomplete ones are left out: a run of 0 steps would follow.

    Args:
        train: Rows as the trainer has prepared them; a stream has no length.
        held_out: Those to evaluate on, or None.

    Raises:
        ValueError: with the numbers and the argument that helps.
    """
    if isinstance(train, Sized) and hasattr(args, "num_generations"):
        prompts = args.generation_batch_size // args.num_generations
        if len(train) < prompts:
            raise ValueError(
                f"the {len(train)} training rows are fewer than the {prompts} prompts of one generation: "
                "give more rows, or lower `per_device_train_batch_size` or `gradient_accumulation_steps`"
            )
    if not args.dataloader_drop_last:
        return
    for rows, flag in ((train, "per_device_train_batch_size"), (held_out, "per_device_eval_batch_size")):
        batch = getattr(args, flag) * args.world_size
        if isinstance(rows, Sized) and len(rows) < batch:
            what = "training" if rows is train else "held-out"
            raise ValueError(
                f"the {len(rows)} {what} rows make no batch of {batch}, and `dataloader_drop_last` drops an "
                f"incomplete one: leave it out, lower `{flag}`, or give more rows"
            )


def check_workers(args: TrainingArguments, streaming: bool) -> None:
    """Refuse workers for a stream where processes start anew, as on macOS and Windows.

    TRL's preparation of a stream holds functions that cannot be sent to a new process.

    Raises:
        ValueError: with the argument to change.
    """
    method = multiprocessing.get_start_method()
    if streaming and args.dataloader_num_workers > 0 and method != "fork":
        raise ValueError(
            f"`dataloader_num_workers` must be 0 for a stream where Python starts processes by {method} "
            f"(got {args.dataloader_num_workers})"
        )


def _check_gpus(args: TrainingArguments, config: LoPTConfig, model: Any) -> None:
    """Refuse several GPUs in one process, which transformers would use by DataParallel or `device_map`."""
    spread = len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1
    if spread and config.is_cut:
        raise ValueError(
            f"`device_map` spreads the model over several devices, and `method` {config.method} computes a "
            "block's local loss on one: load it without, and start one process per GPU by torchrun"
        )
    if args.n_gpu > 1 and not spread:
        script = Path(sys.argv[0]).name
        command = script if script.endswith(".py") else " ".join(["--no-python", script, *sys.argv[1:2]])
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which trains on one: start one process per GPU "
            f"(torchrun --nproc_per_node {args.n_gpu} {command} ...), or make one GPU visible "
            "(CUDA_VISIBLE_DEVICES=0)"
        )


def _check_sharded(args: TrainingArguments, config: LoPTConfig, model: Any) -> None:
    """Refuse what an optimizer under FSDP2, whose parameters accelerate replaces, would not do."""
    if fsdp_version(args) is None:
        return
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    if any(p.is_meta for p in parameters):  # accelerate tells parameters apart by their addresses
        raise ValueError(
            "FSDP2: this process has no weights (meta device), and its part of them would not be trained: "
            "load the model in every process, as from_pretrained does, also with "
            "fsdp_cpu_ram_efficient_loading"
        )
    if config.method != "lora" and isinstance(model, nn.Module):
        base = base_model(model)
        untied = config.is_cut or not shares_embeddings(base)
        if untied and find_decoder(base).module is not base.base_model:
            raise ValueError(
                f"FSDP2: accelerate does not find the final norm of {type(base).__name__}, so that the LM "
                "head would get a wrong gradient: use DDP"
            )
    state = getattr(args, "state_dtype", "float32")
    if state != "float32":
        raise ValueError(f"`state_dtype` {state} does not go with FSDP2: leave it out, or use DDP")
    if args.mixed_precision != "no":  # accelerate makes the weights that are trained float32
        return
    if any(p.requires_grad and p.dtype == torch.bfloat16 for p in parameters):
        raise ValueError(
            "FSDP2 would round every step of weights in bfloat16 to the nearest, which loses small ones: add "
            "`bf16`, by which it keeps them in float32, or load them in float32, or use DDP"
        )


def _check_adapters(args: TrainingArguments, config: LoPTConfig, model: Any) -> None:
    """Refuse adapters whose sharded base weights TRL would change while it sends them to vLLM."""
    sharded = fsdp_version(args) is not None or args.deepspeed
    adapters = config.method == "lora" or hasattr(model, "peft_config")
    if getattr(args, "use_vllm", False) and sharded and adapters:
        raise ValueError(
            "`use_vllm` with adapters on sharded weights: sending adds the adapters to the frozen weights "
            "and subtracts them again, which changes those by rounding: use DDP, or leave `use_vllm` out"
        )


def _check_pipeline(args: TrainingArguments, config: LoPTConfig) -> None:
    if hasattr(args, "num_generations"):
        if not getattr(args, "use_vllm", False) or getattr(args, "vllm_mode", "") != "server":
            raise ValueError(
                "`schedule` pipeline: rollouts need the whole model, and each process has its own blocks: "
                "add `use_vllm` and `vllm_mode` server, or use `schedule` block_major"
            )
        if getattr(args, "beta", 0):
            raise ValueError("`schedule` pipeline: `beta` needs a whole reference model: set `beta` 0")
    if type(args).should_save is TrainingArguments.should_save:
        raise ValueError(
            "`schedule` pipeline needs arguments of lopt.trainers.config, such as LoPTSFTConfig, which know "
            "the process that writes"
        )
    take_place(config)


def _check_block_major(args: TrainingArguments, config: LoPTConfig, model: Any) -> None:
    if fsdp_version(args) is not None:
        raise ValueError("`schedule` block_major does not run on FSDP2: use `schedule` eager, or DDP")
    if args.fp16:
        raise ValueError("`schedule` block_major steps blocks without a gradient scaler: use `bf16`")
    if config.offload == "block" and getattr(args, "use_vllm", False):
        raise ValueError(
            "`offload` block with `use_vllm`: vLLM would read weights that are not on the device: "
            "use `offload` optimizer"
        )
    if model is not None:
        coefficient = getattr(args, "router_aux_loss_coef", 0.0)
        check_routers(config, getattr(model, "config", model), coefficient)


def _check_predicted_gradient(args: TrainingArguments, config: LoPTConfig) -> None:
    """Refuse runs in which exact gradients, to which predictions are fitted, cannot be had."""
    if not isinstance(args, SFTConfig):
        raise ValueError(
            "`aux_loss` predicted_gradient is fitted to the loss of labelled tokens, which SFT alone has: "
            "use `aux_loss` recon"
        )
    if args.loss_type not in ("nll", "chunked_nll") or args.label_smoothing_factor:
        raise ValueError(
            "`aux_loss` predicted_gradient is fitted to plain cross-entropy: use `loss_type` nll without "
            "`label_smoothing_factor`, or `aux_loss` recon"
        )
    if not config.block_count - 1 - config.frozen_blocks:
        raise ValueError(
            "`aux_loss` predicted_gradient needs an earlier block that learns: give more `num_blocks`"
        )
    if args.world_size > 1:
        raise ValueError("`aux_loss` predicted_gradient runs in one process: use `aux_loss` recon")


def check_routers(config: LoPTConfig, model_config: Any, coefficient: float | None = 0.0) -> None:
    """Refuse the block-major schedule for a model that balances its routers.

    Args:
        model_config: of the model, which asks for router logits by itself or has a coefficient.
        coefficient: `router_aux_loss_coef` of the trainer, which asks for them unless it is 0; None takes the
            model's.
    """
    text = model_config.get_text_config()
    if not config.is_staged or not hasattr(text, "output_router_logits"):
        return
    own = getattr(text, "router_aux_loss_coef", 0.0)
    if text.output_router_logits or (own if coefficient is None else coefficient):
        raise ValueError(ROUTERS)


def fsdp_version(args: TrainingArguments) -> int | None:
    """Return 1 or 2, None without FSDP; it is set by the argument `fsdp` or by accelerate's launcher."""
    plugin = getattr(args, "fsdp_plugin_args", None)
    if args.fsdp and plugin:
        return int(plugin.get("fsdp_version", 1))
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true":
        return int(os.environ.get("FSDP_VERSION", "1"))
    return None


def _check_untied(args: TrainingArguments, config: LoPTConfig, model: Any) -> None:
    """Refuse what holds on to the tied LM head of a model whose embedding is untied for training."""
    if isinstance(model, nn.Module):
        unties = will_untie(base_model(model), config.tied_embeddings, config.block_count)
    else:
        tied = getattr(model, "tie_word_embeddings", False)
        unties = tied and config.tied_embeddings == "untie" and config.block_count > 1
    if unties and getattr(args, "use_vllm", False):
        raise ValueError(
            "`use_vllm`: vLLM would go on generating with the tied LM head while training unties it: "
            "add `tied_embeddings` freeze"
        )
    if unties and getattr(args, "sync_ref_model", False):
        raise ValueError(
            "`sync_ref_model`: the reference model has a tied LM head, and training unties the model's: "
            "add `tied_embeddings` freeze"
        )
