"""Search the settings that fit into a device's memory for the fastest."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from lopt.instruments.memory import format_bytes
from lopt.planning.devices import Machine
from lopt.planning.plan import RESERVE, Plan, Planner
from lopt.planning.run import Setting
from lopt.planning.sizes import Method

BLOCKS = (2, 4, 8)
"""Numbers of blocks that are tried unless others are given, as far as the model's layers allow."""
ONE_BLOCK = ("e2e", "lora")
"""Methods without boundaries."""
PREFETCH_BYTES = tuple(n * 2**30 for n in (3, 4, 6, 8, 12, 16))
QUICK = 1.05
"""Settings within so many times the fastest count as equally fast, if they have fewer blocks."""
SIMPLER = 1.02
"""And of as many blocks if they are simpler."""


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
    machine: Machine | None = None,
    methods: Sequence[Method] = ("lopt",),
    stages: Sequence[int] | None = None,
    optimizer_device: str | None = None,
    host_limit: int | None = None,
) -> Plan:
    """Return the simplest setting of fewest blocks among the fastest that fit into `limit` bytes.

    On a GPU `RESERVE` of them are left alone. Room that is left over goes to prefetching.

    Args:
        machine: what decides about time; default: one with a GPU like an RTX 4090.
        methods: that may be chosen; e2e and lora are one block.
        stages: the numbers of stages that may be chosen; default: those of `stage_counts`.
        optimizer_device: the only one that may be chosen where weights are offloaded.
        host_limit: bytes of host memory that offloading may take.

    Raises:
        ValueError: none fits; the message names the smallest and what would help.
    """
    machine = machine or Machine()
    counts = stage_counts(len(planner.sizes.layers)) if stages is None else stages
    several = [m for m in methods if m not in ONE_BLOCK]
    settings = [s for k in blocks for m in several for s in candidates(k, m, counts)]
    settings += [s for m in methods if m in ONE_BLOCK for s in candidates(1, m, counts)]
    if optimizer_device is not None:
        settings = [s for s in settings if s.offload != "block" or s.optimizer_device == optimizer_device]
    if planner.run.fsdp2:
        settings = [setting for setting in settings if setting.schedule == "eager"]
    room = limit - (RESERVE if planner.run.device == "cuda" else 0)
    if planner.run.device == "cpu":  # there host and device are one memory
        settings = [setting for setting in settings if setting.offload == "none"]
    plans = [planner.plan(setting) for setting in settings]
    within = [plan for plan in plans if host_limit is None or plan.host <= host_limit]
    fitting = [plan for plan in within if plan.total <= room]
    if not fitting:
        raise ValueError(_why(plans, within, limit, room, host_limit))
    seconds = {id(plan): plan.time(machine).seconds for plan in fitting}
    quickest = min(seconds.values())
    no_bus = replace(machine, bandwidth=(math.inf, math.inf))
    for plan in fitting[:]:
        if plan.setting.offload == "none" or plan.time(no_bus).seconds > QUICK * quickest:
            continue  # more prefetching changes nothing, or too little
        for size in PREFETCH_BYTES:
            wider = planner.plan(plan.setting, size)
            # What is on its way out is not in the plan, and may take all of it.
            if size > plan.prefetch and wider.total - wider.peak.transfers + size <= room:
                fitting.append(wider)
                seconds[id(wider)] = wider.time(machine).seconds
    quickest = min(seconds.values())
    quick = [plan for plan in fitting if seconds[id(plan)] <= QUICK * quickest]
    fewest = min(plan.setting.num_blocks for plan in quick)  # which leaves more depth to the task
    quick = [plan for plan in quick if plan.setting.num_blocks == fewest]
    quickest = min(seconds[id(plan)] for plan in quick)
    return next(plan for plan in quick if seconds[id(plan)] <= SIMPLER * quickest)


def _why(plans: list[Plan], within: list[Plan], limit: int, room: int, host_limit: int | None) -> str:
    """Return why none of `plans` fits, of which those `within` the limit of host memory are left."""
    helps = (
        "What helps: a smaller `per_device_train_batch_size` (with more `gradient_accumulation_steps`) or "
        "`max_length`, more `num_blocks` or `stages`, `param_dtype` bfloat16"
    )
    fitting = [plan for plan in plans if plan.total <= room]
    if fitting and host_limit is not None:
        least = min(fitting, key=lambda plan: plan.host)
        return (
            f"`host_memory`: nothing that fits into {format_bytes(limit)} on the device fits into "
            f"{format_bytes(host_limit)} of host memory. The smallest there is {least.setting} with "
            f"{format_bytes(least.host)}. What helps: a larger `fit`, `state_dtype` bfloat16, no "
            "`master_weights`"
        )
    least = min(within or plans, key=lambda plan: plan.total)
    return (
        f"`fit`: nothing fits into {format_bytes(limit)}, of which {format_bytes(limit - room)} is left "
        f"for CUDA. The smallest is {least.setting} with {format_bytes(least.total)}. {helps}"
    )
