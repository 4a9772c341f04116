"""Advice after an out-of-memory error: with which arguments the planner says that the run would fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainingArguments
from trl import DPOConfig

from lopt.core.config import LoPTConfig
from lopt.instruments.memory import format_bytes, free_memory, used_memory
from lopt.planning.devices import machine_of
from lopt.planning.plan import RESERVE, Plan, Planner
from lopt.planning.run import Run, Setting
from lopt.planning.search import BLOCKS, search
from lopt.reliability.ranks import processes_here

SMALLER = (
    "a smaller `per_device_train_batch_size` with more `gradient_accumulation_steps`, a smaller "
    "`max_length`, `gradient_checkpointing` true"
)


@dataclass(frozen=True)
class Attempt:
    """The run that did not fit.

    Attributes:
        tokens: the longest row of its micro-batches, padding included; None if not known.
        dtype: of the weights.
    """

    config: PreTrainedConfig
    args: TrainingArguments
    lopt: LoPTConfig
    tokens: int | None
    dtype: torch.dtype
    device: torch.device


def advice(failed: Callable[[], Attempt]) -> str:
    """Return arguments with which the planner says that the run would fit, or general advice."""
    attempt, found = None, []
    try:
        attempt = failed()
        found = _proposals(attempt)
    # The planner runs the model's code on fake tensors, and not every model is made for that.
    except (ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError):
        found = []
    if not found:
        return f"What helps: {_general(attempt)}"
    return "By `lopt plan` this would fit: " + ", or ".join(found)


def _general(attempt: Attempt | None) -> str:
    """Return what helps any run like this one."""
    if attempt is None:
        return f"{SMALLER}, more `num_blocks`"
    words = [SMALLER]
    if attempt.lopt.is_staged:
        words.append("more `stages`")
    elif not attempt.lopt.is_cut and not _is_sharded(attempt):
        words.append("`schedule` block_major with several `stages`")
    return ", ".join(words + ["more `num_blocks`"] * attempt.lopt.is_cut)


def _is_sharded(attempt: Attempt) -> bool:
    return bool(getattr(attempt.args, "fsdp", None))


def _proposals(attempt: Attempt) -> list[str]:
    """Return the same run in smaller micro-batches, and what `lopt plan --fit` proposes."""
    unplanned = attempt.lopt.method == "lora" or attempt.lopt.schedule == "pipeline"
    if attempt.tokens is None or unplanned or _is_sharded(attempt):
        return []  # not planned for
    now = _setting(attempt)
    planner = Planner(_run(attempt, attempt.args.per_device_train_batch_size))
    reserve = RESERVE if attempt.device.type == "cuda" else 0
    # A plan is not exact, and this run did not fit, whatever it says.
    free = free_memory(attempt.device)
    if attempt.device.type == "cpu":
        free //= processes_here()
    room = free + used_memory(attempt.device)
    limit = min(room, int(0.9 * planner.plan(now).total) + reserve)
    found: list[str] = []
    batch = attempt.args.per_device_train_batch_size
    while batch > 1 and not found:
        batch //= 2
        plan = Planner(_run(attempt, batch), planner).plan(now)
        if plan.total <= limit - reserve:
            times = attempt.args.per_device_train_batch_size // batch
            arguments = {
                "per_device_train_batch_size": batch,
                "gradient_accumulation_steps": times * attempt.args.gradient_accumulation_steps,
            }
            found.append(_sentence(arguments, plan, "the same run otherwise"))
    layers = len(planner.sizes.layers)
    least = attempt.lopt.frozen_blocks + 2
    blocks = sorted({k for k in (*BLOCKS, now.num_blocks) if least <= k <= layers})
    machine = machine_of(on_gpu=attempt.device.type == "cuda")
    for method in dict.fromkeys((now.method, "lopt")):  # what learns the same, if it fits
        try:
            best = search(planner, blocks, limit, machine, (method,))
        except ValueError:  # nothing fits
            continue
        return [*found, _sentence(_changed(best, now), best)]
    return found


def _sentence(arguments: Mapping[str, object], plan: Plan, why: str = "") -> str:
    need = f"{format_bytes(plan.total)} at its peak"
    if plan.host:
        need += f", {format_bytes(plan.host)} of host memory"
    words = " ".join(f"`{name}` {value}" for name, value in arguments.items())
    return f"{words} ({why + ', ' if why else ''}{need})"


_CHOSEN = (
    "method", "num_blocks", "block_boundaries", "schedule", "stages", "stage_layers", "offload",
    "optimizer_device",
)  # fmt: skip


def _changed(plan: Plan, now: Setting) -> dict[str, object]:
    """Return the arguments in which a plan differs from the run."""
    setting = plan.setting
    changed: dict[str, object] = {}
    for name in _CHOSEN:
        if name == "num_blocks" and setting.method == "e2e":
            continue
        if (value := getattr(setting, name)) != getattr(now, name):
            changed[name] = "left out" if value is None else value
    if "block_boundaries" in changed and setting.method != "e2e":
        changed["num_blocks"] = setting.num_blocks  # which the boundaries have overridden
    if setting.checkpointing != now.checkpointing:
        changed["gradient_checkpointing"] = str(setting.checkpointing).lower()
    if setting.offload != "none":
        changed["prefetch_gib"] = f"{plan.prefetch / 2**30:g}"
    return changed


def _setting(attempt: Attempt) -> Setting:
    config = attempt.lopt
    blocks = config.block_count
    method: Any = "e2e" if blocks == 1 else config.method
    return Setting(
        method,
        blocks,
        "block_major" if config.is_staged else "eager",
        bool(attempt.args.gradient_checkpointing),
        config.offload,
        config.stages,
        config.stage_layers,
        config.optimizer_device,
        tuple(config.block_boundaries) if config.block_boundaries and blocks > 1 else None,
    )


def _run(attempt: Attempt, batch: int) -> Run:
    args: Any = attempt.args
    assert attempt.tokens is not None
    preferences = isinstance(args, DPOConfig)
    return Run(
        config=attempt.config,
        batch=2 * batch if preferences else batch,  # a pair is two rows
        tokens=attempt.tokens,
        accumulation=args.gradient_accumulation_steps * (args.per_device_train_batch_size // batch),
        dtype=attempt.dtype,
        autocast=bool(args.bf16),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        state_dtype=getattr(torch, getattr(args, "state_dtype", "float32")),
        masters=attempt.lopt.keeps_masters(getattr(args, "master_weights", None)),
        local_every=attempt.lopt.local_every,
        frozen_blocks=attempt.lopt.frozen_blocks,
        aux_loss=attempt.lopt.aux_loss,
        tied_embeddings=attempt.lopt.tied_embeddings,
        reference=preferences and not args.precompute_ref_log_probs,
        clips=bool(args.max_grad_norm),
        clip=attempt.lopt.clip,
        prefetch=int(attempt.lopt.prefetch_gib * 2**30),
        device=attempt.device.type,
    )
