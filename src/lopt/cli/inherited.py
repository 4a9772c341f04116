"""Flags inherited from transformers and TRL that would be accepted by a command and have no effect there."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from trl import DPOConfig


class Need(NamedTuple):
    """Flags that are read only together with another.

    Attributes:
        names: The flags; a name that ends in `*` stands for all that begin so.
        needed: The flag that they need; the words of several of which one will do.
        values: The values of it that will do; empty for any but its default, false and none.
    """

    names: tuple[str, ...]
    needed: str
    values: tuple[Any, ...] = ()


NEEDS = (
    Need(("activation_checkpointing_kwargs",), "activation_checkpointing"),
    Need(("gradient_checkpointing_kwargs",), "gradient_checkpointing"),
    Need(("liger_kernel_config",), "use_liger_kernel"),
    Need(("hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), "push_to_hub"),
    Need(("hub_private_repo",), "push_to_hub report_to"),
    Need(
        (
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
            "dataloader_in_order",
        ),
        "dataloader_num_workers",
    ),
    Need(("length_column_name",), "train_sampling_strategy", ("group_by_length", "batch_rebalance")),
    Need(("greater_is_better",), "metric_for_best_model"),
    Need(("metric_for_best_model", "eval_delay", "eval_on_start"), "eval_strategy", ("steps", "epoch")),
    Need(("eval_steps",), "eval_strategy", ("steps",)),
    Need(("save_steps",), "save_strategy", ("steps",)),
    Need(("logging_steps",), "logging_strategy", ("steps",)),
    Need(("fsdp_config",), "fsdp"),
    Need(("packing_strategy",), "packing eval_packing"),
    Need(("ref_model_*",), "sync_ref_model"),
    Need(("precompute_ref_batch_size",), "precompute_ref_log_probs"),
    Need(("f_alpha_divergence_coef",), "f_divergence_type", ("alpha_divergence",)),
    Need(("discopop_tau",), "loss_type", ("discopop",)),
    Need(("sync_ref_model", "use_bias_correction_kl"), "beta"),
    Need(("num_completions_to_print", "log_unique_prompts", "log_completions_hub_repo"), "log_completions"),
    Need(("entropy_coef_*", "entropy_target"), "use_adaptive_entropy"),
    Need(("sapo_*",), "loss_type", ("sapo",)),
    Need(("vespo_*",), "loss_type", ("vespo",)),
    Need(("transformers_continuous_batching_config",), "use_transformers_continuous_batching"),
    Need(("vllm_*",), "use_vllm"),
    Need(("vllm_server_*", "vllm_group_port"), "vllm_mode", ("server",)),
    Need(
        (
            "vllm_gpu_memory_utilization",
            "vllm_max_model_length",
            "vllm_tensor_parallel_size",
            "vllm_enable_sleep_mode",
        ),
        "vllm_mode",
        ("colocate",),
    ),
)
"""Flags without effect unless another is given."""

_NO_METRICS = "it is for a function compute_metrics, which a command does not have: leave it out"
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            "batch_eval_metrics",
            "eval_accumulation_steps",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "include_for_metrics",
            "label_names",
            "prediction_loss_only",
        ),
        _NO_METRICS,
    ),
    "dataset_kwargs": "rows of a file have to be prepared: leave it out",
    "do_predict": "this command trains: use lopt eval afterwards",
    "ds3_gather_for_generation": "it belongs to DeepSpeed, which is refused: leave it out",
    "log_multimodal": "rows are text: leave it out",
    "max_tool_calling_iterations": "a command has no tools to call: use `LoPTGRPOTrainer` in Python",
    "model_init_kwargs": "a model is loaded by flags: use `param_dtype`, `attn_implementation`, "
    "`model_revision` or `trust_remote_code`",
}
"""Flags that no command obeys, each with what to do instead."""

# Flags that say nothing of what is done: a description, a credential, and what old launchers add.
LABELS = ("run_name", "hub_token", "project")


def check_effects(args: Any, *, streaming: bool = False) -> None:
    """Refuse flags that would have no effect on a command that trains.

    Args:
        args: The trainer's config.
        streaming: Whether rows are a stream.

    Raises:
        ValueError: With the flag and what to do instead.
    """
    changed = changed_fields(args)
    for name in changed & REFUSED.keys():
        raise ValueError(f"`{name}`: {REFUSED[name]}")
    for need in NEEDS:
        for name in _matching(need.names, changed):
            if not _is_met(need, args):
                values = f" {' or '.join(map(str, need.values))}" if need.values else ""
                needed = f"`{need.needed.split()[0]}`{values}"
                raise ValueError(f"`{name}` has no effect without {needed}: add it, or leave it out")
    if args.local_rank != -1 and "WORLD_SIZE" not in os.environ:
        raise ValueError("`local_rank` is given by a launcher: start the command with torchrun")
    if args.fsdp and "WORLD_SIZE" not in os.environ:
        raise ValueError("`fsdp` is for several processes: start the command with torchrun, or leave it out")
    if getattr(args, "padding_free", False) and isinstance(args, DPOConfig):
        raise ValueError("`padding_free`: TRL's DPO pads all the same: leave it out")
    if getattr(args, "padding_free", False) and not args.packing and args.max_length is not None:
        raise ValueError("`padding_free` cuts no row at `max_length`: add `packing`, or leave it out")
    trackers = _matching(["trackio_*"], changed)
    if trackers and "trackio" not in args.report_to:
        raise ValueError(
            f"`{trackers[0]}` has no effect without `report_to` trackio: add it, or leave it out"
        )
    for name in ("train_sampling_strategy", "dataset_num_proc"):
        if streaming and name in changed:
            raise ValueError(f"`{name}` has no effect on a stream of rows: leave it out")


def changed_fields(args: Any) -> set[str]:
    """Return the names of the fields of a config that differ from their defaults."""
    return {name for name, default in _defaults(args) if getattr(args, name) != default}


def _defaults(args: Any) -> Iterator[tuple[str, Any]]:
    for field in fields(args):
        yield field.name, field.default if field.default_factory is MISSING else field.default_factory()


def _matching(patterns: Collection[str], names: Collection[str]) -> list[str]:
    def fits(name: str, pattern: str) -> bool:
        return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern

    return sorted(name for name in names if any(fits(name, pattern) for pattern in patterns))


def _is_met(need: Need, args: Any) -> bool:
    if need.values:
        value = getattr(args, need.needed)
        given = value if isinstance(value, list) else [getattr(value, "value", value)]
        return any(one in need.values for one in given)
    return any(getattr(args, name, None) for name in need.needed.split())
