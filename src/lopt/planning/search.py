"""Search the settings that fit into a device's memory for the fastest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lopt.instruments.memory import format_bytes
from lopt.planning.plan import RESERVE, Plan, Planner
from lopt.planning.run import Setting
from lopt.planning.sizes import Method

BLOCKS = (2, 4, 8)
"""Numbers of blocks that are tried unless others are given, as far as the model's layers allow."""
ONE_BLOCK = ("e2e", "lora")
"""Methods without boundaries."""
PREFETCH_BYTES = tuple(n * 2**30 for n in (3, 4, 6, 8, 12, 16))
QUICK = 1.05
"""Settings within so many times the fastest count as equally fast."""


def candidates(
    k: int,
    method: Method = "lopt",
    stages: Sequence[int | None] = (None,),
    stage_layers: Sequence[int] = (),
) -> list[Setting]:
    """Return all ways to run k blocks, the simplest first; one block is end to end.

    Args:
        stages: numbers that the block-major schedule has; None is as many as blocks.
        stage_layers: instead of them the largest numbers of layers of a stage.
    """
    plain = [Setting(method, k)]
    staged = [Setting(method, k, "block_major", stage_layers=most) for most in stage_layers]
    for count in () if stage_layers else stages:
        if (count is None and method in ONE_BLOCK) or (count is not None and count < k):
            continue
        staged.append(Setting(method, k, "block_major", stages=None if count == k else count))
    for block_major in staged:
        block = replace(block_major, offload="block")
        plain += [block_major, replace(block_major, offload="optimizer"), block]
        plain += [replace(block, optimizer_device="cpu")]
    plain = list(dict.fromkeys(plain))
    return [replace(setting, checkpointing=again) for setting in plain for again in (False, True)]


def stage_counts(layers: int) -> list[int | None]:
    """Return the numbers of stages that are tried unless others are given."""
    most = layers + 2
    return [None, *(2**n for n in range(most.bit_length()) if 2**n < most), most]


def search(
    planner: Planner,
    blocks: Iterable[int],
    limit: int,
    tflops: float,
    bandwidth: float,
    methods: Sequence[Method] = ("lopt",),
    stages: Sequence[int] | None = None,
    optimizer_device: str | None = None,
) -> Plan:
    """Return the setting of fewest blocks among the fastest that fit into `limit` bytes.

    On a GPU `RESERVE` of them are left alone. Room that is left over goes to prefetching.

    Args:
        methods: that may be chosen; e2e is one block.
        stages: the numbers of stages that may be chosen; default: those of `stage_counts`.
        optimizer_device: the only one that may be chosen where weights are offloaded.

    Raises:
        ValueError: none fits; the message names the smallest and what would help.
    """
    counts = stage_counts(len(planner.sizes.layers)) if stages is None else stages
    blocks = list(blocks)
    settings = [s for k in blocks for m in methods if m not in ONE_BLOCK for s in candidates(k, m, counts)]
    settings += [s for m in methods if m in ONE_BLOCK for s in candidates(1, m, counts)]
    if optimizer_device is not None:
        settings = [s for s in settings if s.offload != "block" or s.optimizer_device == optimizer_device]
    room = limit - (RESERVE if planner.run.device == "cuda" else 0)
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
            "`max_length`, more `num_blocks` or `stages`, `param_dtype` bfloat16"
        )
    quickest = min(plan.seconds(tflops, bandwidth) for plan in fitting)
    wider = [
        planner.plan(plan.setting, size)
        for plan in fitting
        if plan.setting.offload != "none" and plan.seconds(tflops, math.inf) <= QUICK * quickest
        for size in PREFETCH_BYTES
        if size > plan.prefetch
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
