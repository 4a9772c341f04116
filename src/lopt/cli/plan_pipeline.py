"""`lopt plan` for several processes: what their flags must be, and the plan of a pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lopt.cli.report_flags import PlanArguments
from lopt.core.config import LoPTConfig
from lopt.engine.pipeline import check_pipeline
from lopt.files import write_text
from lopt.planning.devices import Machine
from lopt.planning.end_to_end import rivals
from lopt.planning.pipeline import PipelinePlanner
from lopt.planning.plan import Planner
from lopt.planning.run import Setting
from lopt.reports import pipeline_plan as report
from lopt.validation import check, check_number

LEFT_OUT: dict[str, Any] = {
    "fit": None, "host_memory": None, "calibrate": False, "stages": None, "stage_layers": None,
    "offload": "none", "optimizer_device": "auto", "fsdp2": False, "precompute_ref_log_probs": False,
}  # fmt: skip
"""What a pipeline is not planned with, and its default."""


def check_several(args: PlanArguments) -> None:
    """Refuse flags about several processes that make no sense.

    Raises:
        ValueError: Naming the flag and what it must be.
    """
    in_pipeline = args.schedule == "pipeline"
    one = args.num_processes == 1 or not args.calibrate
    check(one, "num_processes", args.num_processes, "1 with `calibrate`")
    links = args.link_gbps
    for rate in links or ():
        check_number("link_gbps", rate, above=0)
    several = links is None or args.num_processes > 1 or in_pipeline
    check(several, "link_gbps", links, "given with `num_processes` 2 or more, or `schedule` pipeline")
    most = 2 if in_pipeline else 1
    check(
        links is None or len(links) <= most, "link_gbps", links, "one number, or two with `schedule` pipeline"
    )
    check_number("latency_ms", args.latency_ms, minimum=0)
    check(in_pipeline or not args.latency_ms, "latency_ms", args.latency_ms, "given with `schedule` pipeline")
    starts = args.block_boundaries
    check(in_pipeline or starts is None, "block_boundaries", starts, "given with `schedule` pipeline")
    if args.fsdp2:
        _check_fsdp2(args)
    if in_pipeline:
        _check_pipeline(args)


def _check_fsdp2(args: PlanArguments) -> None:
    """Refuse what does not run on FSDP2, or is not planned with it."""
    check(args.num_processes > 1, "fsdp2", True, "given with `num_processes` 2 or more")
    rules: dict[str, tuple[Any, str]] = {
        "param_dtype": ("float32", "float32 with `fsdp2`, which computes in bfloat16 all the same"),
        "state_dtype": ("float32", "float32 with `fsdp2`"),
        "aux_loss": ("recon", "recon with `fsdp2`, which shards the LM head"),
        "stages": (None, "left out with `fsdp2`, on which block_major does not run"),
        "stage_layers": (None, "left out with `fsdp2`, on which block_major does not run"),
        "optimizer_device": ("auto", "auto with `fsdp2`, on which block_major does not run"),
        "command": ("sft", "sft with `fsdp2`: DPO is not planned with it"),
    }
    for name, (value, rule) in rules.items():
        check(getattr(args, name) == value, name, getattr(args, name), rule)
    check("lora" not in args.method, "method", args.method, "lopt, e2e or frozen with `fsdp2`")


def _check_pipeline(args: PlanArguments) -> None:
    for name, value in LEFT_OUT.items():
        given = getattr(args, name)
        check(given == value, name, given, "left out with `schedule` pipeline, which is planned without")
    one = len(args.method) == 1 and args.method[0] in ("lopt", "frozen")
    check(one, "method", args.method, "one of lopt and frozen with `schedule` pipeline")
    counts = args.num_blocks or []
    check(len(counts) <= 1, "num_blocks", counts, "one number with `schedule` pipeline")
    known = bool(counts or args.pipeline_size or args.block_boundaries)
    check(known, "pipeline_size", None, "given with `schedule` pipeline: how many devices have a block each")
    starts = args.block_boundaries
    agree = not counts or starts is None or counts[0] == len(starts) + 1
    check(
        agree, "num_blocks", counts, f"left out with `block_boundaries`, which make {len(starts or ()) + 1}"
    )
    setting = setting_of(args)
    size = int(setting.pipeline_size or 0)
    check(size >= 2, "pipeline_size", size, ">= 2")
    rule = f"a multiple of {size}, the processes of a pipeline"
    check(
        args.num_processes == 1 or args.num_processes % size == 0, "num_processes", args.num_processes, rule
    )
    one_pipeline = args.num_processes in (1, size)
    rule = "one number with one pipeline, whose blocks have no replicas"
    check(not one_pipeline or len(args.link_gbps or ()) < 2, "link_gbps", args.link_gbps, rule)
    names = ("method", "num_blocks", "schedule", "pipeline_size", "pipeline_depth")
    shared = ("aux_loss", "frozen_blocks", "clip")
    values = {name: getattr(setting, name) for name in names} | {n: getattr(args, n) for n in shared}
    check_pipeline(LoPTConfig(**values, block_boundaries=args.block_boundaries), size)


def setting_of(args: PlanArguments) -> Setting:
    """Return the pipeline that the flags ask for; blocks are split evenly unless boundaries are given."""
    starts = args.block_boundaries
    blocks = len(starts) + 1 if starts else args.num_blocks[0] if args.num_blocks else args.pipeline_size or 0
    return Setting(
        args.method[0],  # type: ignore[arg-type]
        blocks,
        "pipeline",
        args.gradient_checkpointing,
        block_boundaries=tuple(starts) if starts else None,
        pipeline_size=args.pipeline_size or blocks,
        pipeline_depth=args.pipeline_depth,
    )


def planned(
    args: PlanArguments,
    planner: Planner,
    machine: Machine,
    command: Callable[[Setting, PlanArguments, int, int], str],
) -> str:
    """Return the plan of a pipeline, and write what was asked for beside it.

    Args:
        command: Returns the command line of a setting, for so many processes and bytes of prefetching.

    Raises:
        ValueError: The model has too few layers.
    """
    setting = setting_of(args)
    size, layers = int(setting.pipeline_size or 0), len(planner.sizes.layers)
    check(setting.num_blocks <= layers, "num_blocks", setting.num_blocks, f"<= {layers}, the model's layers")
    processes = max(size, args.num_processes)
    planner = Planner(replace(planner.run, reference=False), planner)  # which runs before the first step
    pipelines = PipelinePlanner(planner, processes // size)
    even = None if args.block_boundaries else pipelines.plan(setting)
    chosen = pipelines.balanced(setting, machine) if even is not None else setting
    plan = pipelines.plan(chosen)
    others = rivals(planner, size, plan.replicas, machine, setting.checkpointing)
    if args.json:
        found = {"arguments": asdict(args), "machine": asdict(machine)}
        found["pipeline"] = report.as_json(plan, others, machine)
        write_text(Path(args.json), json.dumps(found, indent=1) + "\n")
    if args.svg:
        title = f"{args.model_name_or_path}: peak memory of each process"
        batch = f"{args.per_device_train_batch_size} x {args.max_length} tokens, {args.param_dtype}"
        write_text(Path(args.svg), report.picture(plan, title, f"GiB on the device, {batch}") + "\n")
    parts = [report.ranks(plan, machine), report.summary(plan, even, machine)]
    parts += [report.comparison(plan, others, machine), command(chosen, args, processes, 0)]
    return "\n".join([_headline(args, planner, plan.replicas, setting, size), *parts])


def _headline(args: PlanArguments, planner: Planner, replicas: int, setting: Setting, size: int) -> str:
    run, layers = planner.run, len(planner.sizes.layers)
    numbers = args.param_dtype + (", bfloat16 autocast" if run.autocast else "")
    pairs = ", 2 rows a pair" * (args.command == "dpo")
    blocks = f"{setting.num_blocks} blocks, {setting.method}, in a pipeline of {size} processes"
    copies = f", {replicas} replicas of each" * (replicas > 1)
    return (
        f"{args.model_name_or_path}: {planner.sizes.model / 1e9:.2f} B weights in {layers} layers, "
        f"{numbers}, {args.optim}\n{run.batch} x {run.tokens:,} tokens a micro-batch{pairs}, "
        f"{run.accumulation} a step; {blocks}{copies}\n"
    )
