"""Search the settings that fit into a device's memory for the fastest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lopt.instruments.memory import format_bytes
from lopt.planning.plan import RESERVE, Plan, Planner
from lopt.planning.run import Setting

BLOCKS = (2, 4, 8)
"""Numbers of blocks that are tried unless others are given, as far as the model's layers allow."""
PREFETCH_BYTES = tuple(n * 2**30 for n in (3, 4, 6, 8, 12, 16))
QUICK = 1.05
"""Settings within so many times the fastest count as equally fast."""


def candidates(k: int) -> list[Setting]:
    """Return all ways to run k blocks, the simplest first."""
    eager = Setting(num_blocks=k)
    block_major = Setting(num_blocks=k, schedule="block_major")
    plain = [eager, block_major, *(replace(block_major, offload=what) for what in ("optimizer", "block"))]
    return [replace(setting, checkpointing=again) for setting in plain for again in (False, True)]


def search(planner: Planner, blocks: Iterable[int], limit: int, tflops: float, bandwidth: float) -> Plan:
    """Return the LoPT setting of fewest blocks among the fastest that fit into `limit` bytes.

    On a GPU `RESERVE` of them are left alone. Room that is left over goes to prefetching.

    Raises:
        ValueError: none fits; the message names the smallest and what would help.
    """
    room = limit - (RESERVE if planner.run.device == "cuda" else 0)
    settings = [setting for k in blocks for setting in candidates(k)]
    if planner.run.device == "cpu":  # there host and device are one memory
        settings = [setting for setting in settings if setting.offload == "none"]
    plans = [planner.plan(setting) for setting in settings]
    fitting = [plan for plan in plans if plan.total <= room]
    if not fitting:
        least = min(plans, key=lambda plan: plan.total)
        raise ValueError(
            f"`fit`: nothing fits into {format_bytes(limit)}, of which {format_bytes(limit - room)} is left "
            f"for CUDA. The smallest is {least.setting} with {format_bytes(least.total)}. What helps: "
            "a smaller `per_device_train_batch_size` (with more `gradient_accumulation_steps`) or "
            "`max_length`, more `num_blocks`, `param_dtype` bfloat16"
        )
    wider = [
        planner.plan(plan.setting, size)
        for plan in fitting
        for size in PREFETCH_BYTES
        if plan.setting.offload != "none" and size > plan.prefetch
    ]
    # A plan is not exact to the last byte.
    fitting += [plan for plan in wider if plan.total <= 0.95 * room]
    seconds = [plan.seconds(tflops, bandwidth) for plan in fitting]
    quick = [
        (p.setting.num_blocks, s, p)
        for p, s in zip(fitting, seconds, strict=True)
        if s <= QUICK * min(seconds)
    ]
    # Fewer blocks leave more depth to the task.
    return min(quick, key=lambda found: found[:2])[2]
