"""Advice after an out-of-memory error: with which arguments the planner says that the run would fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, TrainingArguments

from lopt.core.config import LoPTConfig
from lopt.instruments.memory import format_bytes, free_memory, used_memory
from lopt.planning.plan import BANDWIDTH, RESERVE, TFLOPS, Plan, Planner
from lopt.planning.run import Run, Setting
from lopt.planning.search import BLOCKS, search
from lopt.reliability.ranks import processes_here

GENERAL = (
    "a smaller `per_device_train_batch_size` with more `gradient_accumulation_steps`, a smaller "
    "`max_length`, `gradient_checkpointing` true, more `num_blocks`"
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
    try:
        found = _proposals(failed())
    # The planner runs the model's code on fake tensors, and not every model is made for that.
    except (ValueError, RuntimeError, TypeError, AttributeError, LookupError, ArithmeticError, MemoryError):
        found = []
    if not found:
        return f"What helps: {GENERAL}"
    return "By `lopt plan` this would fit: " + ", or ".join(found)


def _proposals(attempt: Attempt) -> list[str]:
    """Return the same run in smaller micro-batches, and what `lopt plan --fit` proposes."""
    sharded = bool(getattr(attempt.args, "fsdp", None))
    if attempt.tokens is None or attempt.lopt.method == "lora" or sharded:
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
    try:
        best = search(planner, blocks, limit, TFLOPS, BANDWIDTH)
    except ValueError:  # nothing fits
        return found
    return [*found, _sentence(_changed(best, now), best)]


def _sentence(arguments: Mapping[str, object], plan: Plan, why: str = "") -> str:
    need = f"{format_bytes(plan.total)} at its peak"
    if plan.host:
        need += f", {format_bytes(plan.host)} of host memory"
    words = " ".join(f"`{name}` {value}" for name, value in arguments.items())
    return f"{words} ({why + ', ' if why else ''}{need})"


def _changed(plan: Plan, now: Setting) -> dict[str, object]:
    """Return the arguments in which a plan differs from the run."""
    setting = plan.setting
    changed: dict[str, object] = {}
    for name in ("method", "num_blocks", "schedule", "offload"):
        if getattr(setting, name) != getattr(now, name):
            changed[name] = getattr(setting, name)
    if setting.checkpointing != now.checkpointing:
        changed["gradient_checkpointing"] = str(setting.checkpointing).lower()
    if setting.offload != "none":
        changed["prefetch_gib"] = f"{plan.prefetch / 2**30:g}"
    return changed


def _setting(attempt: Attempt) -> Setting:
    config = attempt.lopt
    method: Any = "e2e" if config.num_blocks == 1 else config.method
    bounds = config.block_boundaries
    blocks = 1 if method == "e2e" else config.num_blocks if bounds is None else len(bounds) + 1
    checkpointing = bool(attempt.args.gradient_checkpointing)
    return Setting(method, blocks, config.schedule, checkpointing, config.offload)


def _run(attempt: Attempt, batch: int) -> Run:
    args: Any = attempt.args
    assert attempt.tokens is not None
    return Run(
        config=attempt.config,
        batch=batch,
        tokens=attempt.tokens,
        accumulation=args.gradient_accumulation_steps * (args.per_device_train_batch_size // batch),
        dtype=attempt.dtype,
        autocast=bool(args.bf16),
        optimizer=str(getattr(args.optim, "value", args.optim)),
        state_dtype=getattr(torch, getattr(args, "state_dtype", "float32")),
        masters=bool(getattr(args, "master_weights", False)),
        local_every=attempt.lopt.local_every,
        frozen_blocks=attempt.lopt.frozen_blocks,
        aux_loss=attempt.lopt.aux_loss,
        prefetch=int(attempt.lopt.prefetch_gib * 2**30),
        device=attempt.device.type,
    )
