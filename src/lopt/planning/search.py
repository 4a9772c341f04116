"""The setting that fits: of all ways to run, the fastest within a device's memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from lopt.instruments.memory import format_bytes
from lopt.planning.plan import RESERVE, Plan, Planner, Setting

PREFETCH_BYTES = tuple(n * 2**30 for n in (3, 4, 6, 8, 12, 16))
QUICK = 1.05
"""Times the fastest: settings within it count as equally fast."""


def candidates(k: int) -> list[Setting]:
    """All ways to run k blocks, the simplest first."""
    eager = Setting(num_blocks=k)
    staged = Setting(num_blocks=k, schedule="block_major")
    plain = [eager, staged, replace(staged, offload="optimizer"), replace(staged, offload="block")]
    rows = [[setting, replace(setting, checkpointing=True)] for setting in plain]
    return [setting for pair in rows for setting in pair]


def fit(planner: Planner, blocks: Iterable[int], limit: int, tflops: float, bandwidth: float) -> Plan:
    """The LoPT setting of fewest blocks among the fastest within `limit` bytes, less what CUDA keeps.

    Room that is left goes to what travels.

    Raises:
        ValueError: none fits; says which comes closest and what would help.
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
            f"--fit: nothing fits into {format_bytes(limit)}, of which {format_bytes(limit - room)} is left "
            f"for CUDA. The smallest is {least.setting} with {format_bytes(least.total)}. What helps: "
            "a smaller --per_device_train_batch_size (with more --gradient_accumulation_steps) or "
            "--max_length, more --num_blocks, --param_dtype bfloat16"
        )
    # A plan is not exact to the last byte.
    more = [p for plan in fitting for p in _prefetching(planner, plan) if p.total <= 0.95 * room]
    times = {id(plan): plan.seconds(tflops, bandwidth) for plan in (*fitting, *more)}
    quick = [plan for plan in (*fitting, *more) if times[id(plan)] <= QUICK * min(times.values())]
    # Fewer blocks leave more depth to the task.
    return min(quick, key=lambda plan: (plan.setting.num_blocks, times[id(plan)]))


def _prefetching(planner: Planner, plan: Plan) -> list[Plan]:
    """The same with more room for what travels."""
    if plan.setting.offload == "none":
        return []
    return [planner.plan(plan.setting, size) for size in PREFETCH_BYTES if size > plan.prefetch]
