"""`lopt plan`: what a run will need, from the model's config alone, before anyone rents a GPU."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from lopt.cli.checks import check_lora
from lopt.cli.parsing import check_effect, parse
from lopt.cli.plan_pipeline import check_several, planned
from lopt.cli.report_flags import PlanArguments
from lopt.core.config import LoPTConfig
from lopt.files import write_text
from lopt.instruments.memory import MemoryPeak, format_bytes, free_memory
from lopt.models.shapes import SHAPES, model_config
from lopt.planning.calibrate import measured
from lopt.planning.devices import DEVICES, Machine, machine_of
from lopt.planning.plan import Plan, Planner
from lopt.planning.rates import rates_bytes, typical
from lopt.planning.run import Run, Setting
from lopt.planning.search import BLOCKS, ONE_BLOCK, candidates, search
from lopt.planning.sizes import Method
from lopt.reports import plan as report
from lopt.reports.plan import GIB
from lopt.validation import check, check_choice, check_number

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9}
# What the printed command always says, and what it says where it is not the default.
ALWAYS = (
    "model_name_or_path", "param_dtype", "method", "num_blocks", "per_device_train_batch_size",
    "gradient_accumulation_steps", "max_length", "optim",
)  # fmt: skip
IF_CHANGED = (
    "model_revision", "state_dtype", "master_weights", "bf16", "use_cpu", "gradient_checkpointing",
    "schedule", "block_boundaries", "pipeline_size", "pipeline_depth", "stages", "offload",
    "optimizer_device", "clip", "tied_embeddings", "precompute_ref_log_probs",
)  # fmt: skip
SHARED = (
    "schedule", "pipeline_size", "pipeline_depth", "offload", "prefetch_gib", "aux_loss", "frozen_blocks",
)  # fmt: skip
OF_METHOD = {
    "lopt": ("frozen_blocks", "aux_loss", "local_every"),
    "lora": ("lora_r", "lora_alpha", "lora_target_modules"),
}
"""Method -> flags that only its command says, where they are not the default."""
TIMED = 5
"""Steps that `--calibrate` times."""
CHOSEN = (
    "method", "num_blocks", "block_boundaries", "schedule", "pipeline_size", "pipeline_depth", "stages",
    "offload", "optimizer_device",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Check the flags, measure the parts, print the table and what was asked for beside it."""
    (args,) = parse("plan", arguments)
    limit = check_arguments(args)
    planner = Planner(_run(args))
    if args.schedule == "pipeline":
        print(planned(args, planner, _machine(args, planner.run), command_of))
        return
    blocks = _blocks(args, len(planner.sizes.layers))
    if args.calibrate:
        print(_calibrated(planner, _calibrated_setting(args, blocks[0])))
        return
    machine = _machine(args, planner.run)
    plans = [planner.plan(setting) for setting in settings(args, blocks)]
    print(_headline(args, planner))
    print(
        report.table(plans),
        report.bars(plans),
        report.times(plans, machine),
        report.hiding(plans, machine),
        sep="\n",
    )
    if args.json:
        rows = [report.as_row(plan, machine) for plan in plans]
        found = {"arguments": asdict(args), "machine": asdict(machine), "plans": rows}
        write_text(Path(args.json), json.dumps(found, indent=1) + "\n")
    if args.svg:
        batch = f"{args.per_device_train_batch_size} x {args.max_length} tokens, {args.param_dtype}"
        title = f"{args.model_name_or_path}: peak memory"
        write_text(Path(args.svg), report.picture(plans, title, f"GiB on the device, {batch}") + "\n")
    if limit is not None:
        print(_proposal(planner, blocks, limit, args, machine))


def check_arguments(args: PlanArguments) -> int | None:
    """Refuse flags that make no sense; returns the bytes of --fit.

    Raises:
        ValueError: naming the flag and what it must be.
    """
    if args.model_name_or_path is None:
        raise ValueError(
            f"--model_name_or_path is missing: give a folder, a hub id or one of {', '.join(SHAPES)}"
        )
    for name in ("param_dtype", "state_dtype"):
        check_choice(name, getattr(args, name), DTYPES)
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "local_every"):
        check_number(name, getattr(args, name), minimum=1)
    check_number("max_length", args.max_length, minimum=2)
    check_number("num_processes", args.num_processes, minimum=1)
    _check_machine(args)
    LoPTConfig(**{name: getattr(args, name) for name in SHARED})
    check_several(args)
    for count in args.stages or ():
        check_number("stages", count, minimum=1)
    for count in args.stage_layers or ():
        check_number("stage_layers", count, minimum=1)
    for name in ("stages", "fit"):
        if args.stage_layers is not None and getattr(args, name) is not None:
            raise ValueError(
                f"`stage_layers` cannot be combined with `{name}`: leave it out, or give numbers of `stages` "
                "in its place"
            )
    check_choice("aux_loss", args.aux_loss, ("recon", "next_token"))
    for method in args.method or [""]:
        check_choice("method", method, ("lopt", "e2e", "frozen", "lora"))
    if "lora" in args.method:
        check_lora(args.lora_r, args.lora_alpha)
    check(not (args.calibrate and args.command == "dpo"), "command", "dpo", "sft with `calibrate`")
    if args.command == "dpo":
        check(args.aux_loss == "recon", "aux_loss", args.aux_loss, "recon with `command` dpo")
    else:
        asked = args.precompute_ref_log_probs
        check(not asked, "precompute_ref_log_probs", asked, "given with `command` dpo")
    if args.schedule != "pipeline":
        check_effect(args, calibrate=("schedule", "offload", "gradient_checkpointing"))
    for name in ("json", "svg"):
        if (value := getattr(args, name)) is not None:
            path = Path(value).absolute()
            check(path.parent.is_dir(), name, value, "a file in a folder that exists: make it first")
            check(os.access(path.parent, os.W_OK), name, value, "in a folder that can be written to")
            check(not path.is_dir(), name, value, "a file, and this is a folder")
            device = path.exists() and not path.is_file()  # which would be replaced
            check(not device, name, value, "a regular file, and this is a device or a pipe")
    if args.fit == "device":
        check(args.device_name is not None, "fit", args.fit, "a size, or device with `device_name`")
        return int(DEVICES[str(args.device_name)].memory_gib * GIB)
    return None if args.fit is None else size_in_bytes(args.fit)


def _check_machine(args: PlanArguments) -> None:
    """Refuse what makes no sense of the flags that describe a machine."""
    for name, counts in (("bandwidth", (1, 2)), ("tflops", (1, 3))):
        values = getattr(args, name)
        check(values is None or len(values) in counts, name, values, f"{counts[0]} or {counts[1]} numbers")
        for value in values or ():
            check_number(name, value, above=0)
    check_number("host_gbps", args.host_gbps, above=0)
    if args.device_name is not None:
        check_choice("device_name", args.device_name, DEVICES)
        check(not args.use_cpu, "device_name", args.device_name, "left out with `use_cpu`")
    check(
        args.host_memory is None or args.fit is not None, "host_memory", args.host_memory, "given with `fit`"
    )
    if args.host_memory is not None:
        size_in_bytes(args.host_memory, "host_memory")
    found = ("fit", "json", "svg", "device_name", "tflops", "bandwidth", "host_gbps")
    for name in found if args.calibrate else ():
        rule = "left out with `calibrate`, which measures and compares"
        check(getattr(args, name) is None, name, getattr(args, name), rule)


def size_in_bytes(text: str, name: str = "fit") -> int:
    """Return the bytes of "24GiB", "24GB" or "24" (GiB).

    Raises:
        ValueError: not a size.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(GiB|GB|G|gib|gb|g|)\s*", text)  # Gb are bits
    size = float(found[1]) * UNITS[found[2].lower()] if found else 0
    check(0 < size < 2**63, name, text, "a size such as 24GiB, 80GB (both in bytes) or 24 (GiB)")
    return int(size)


def settings(args: PlanArguments, blocks: Iterable[int]) -> list[Setting]:
    """Return the rows of the table."""
    rows = [Setting("e2e", 1), Setting("e2e", 1, checkpointing=True)]
    stages: Sequence[int | None] = args.stages or (None,)
    ways = [(1, method) for method in _methods(args) if method in ONE_BLOCK]
    ways += [(k, method) for k in blocks for method in _methods(args) if method not in ONE_BLOCK]
    if args.fsdp2:
        rows += [s for k, method in ways for s in candidates(k, method) if s.schedule == "eager"]
        return list(dict.fromkeys(rows))
    host = args.optimizer_device == "cpu" or args.stages is not None or args.stage_layers is not None
    for k, method in ways:
        rows += [
            s
            for s in candidates(k, method, stages, args.stage_layers or ())
            if (s.schedule == "eager" or not s.checkpointing) and (host or s.optimizer_device == "auto")
        ]
    return list(dict.fromkeys(rows))


def command(plan: Plan, args: PlanArguments, prefetch: int) -> str:
    """Return the `lopt sft` command line of a plan, with `prefetch` bytes where it offloads."""
    return command_of(plan.setting, args, args.num_processes, prefetch)


def command_of(setting: Setting, args: PlanArguments, processes: int, prefetch: int) -> str:
    """Return the command line of a setting, for so many processes."""
    values = asdict(args) | {name: getattr(setting, name) for name in CHOSEN}
    values |= {"gradient_checkpointing": setting.checkpointing, "prefetch_gib": f"{prefetch / GIB:g}"}
    if setting.pipeline_size == setting.num_blocks:
        values["pipeline_size"] = None
    defaults = asdict(PlanArguments())
    left_out = {"method": setting.method == "lopt", "num_blocks": setting.method in ONE_BLOCK}
    names = [name for name in ALWAYS if not left_out.get(name)]
    changeable = (*IF_CHANGED, *OF_METHOD.get(setting.method, ()))
    names += [name for name in changeable if values[name] != defaults[name]]
    names += ["prefetch_gib"] if setting.offload != "none" else []
    flags = {name: values[name] for name in names}
    flags |= {"train_file": "data.jsonl", "output_dir": "outputs/run"}
    words = {name: value if isinstance(value, (list, tuple)) else [value] for name, value in flags.items()}
    lines = [f"--{name} {shlex.join(map(str, values))}" for name, values in words.items()]
    launch = f"torchrun --nproc_per_node {processes} --no-python " * (processes > 1)
    if args.fsdp2:
        launch = (
            f"accelerate launch --config_file examples/fsdp2.yaml --num_processes {processes} --no_python "
        )
    return launch + f"lopt {args.command} " + " \\\n    ".join(lines)


def _machine(args: PlanArguments, run: Run) -> Machine:
    given = args.device_name, args.tflops, args.bandwidth
    links = args.link_gbps, args.latency_ms
    return machine_of(*given, args.host_gbps, *links, on_gpu=run.device == "cuda")


def _run(args: PlanArguments) -> Run:
    on_gpu = not (args.use_cpu or (args.calibrate and not torch.cuda.is_available()))
    return Run(
        config=model_config(str(args.model_name_or_path), args.model_revision, args.trust_remote_code),
        batch=args.per_device_train_batch_size * (2 if args.command == "dpo" else 1),
        tokens=args.max_length,
        accumulation=args.gradient_accumulation_steps,
        dtype=DTYPES[args.param_dtype],
        autocast=on_gpu if args.bf16 is None else args.bf16,
        optimizer=args.optim,
        state_dtype=DTYPES[args.state_dtype],
        masters=args.master_weights,
        prefetch=int(args.prefetch_gib * GIB),
        local_every=args.local_every,
        frozen_blocks=args.frozen_blocks,
        aux_loss=args.aux_loss,
        tied_embeddings=args.tied_embeddings,
        reference=args.command == "dpo" and not args.precompute_ref_log_probs,
        processes=args.num_processes,
        fsdp2=args.fsdp2,
        adapters=_adapters(args),
        clip=args.clip,
        device="cuda" if on_gpu else "cpu",
    )


def _adapters(args: PlanArguments) -> Any:
    if "lora" not in args.method:
        return None
    from lopt.trainers.lora import lora_config

    return lora_config(args.lora_r, args.lora_alpha, args.lora_target_modules)


def _blocks(args: PlanArguments, layers: int) -> list[int]:
    name, frozen = args.model_name_or_path, args.frozen_blocks
    check(layers >= 2, "model_name_or_path", name, "a model of two layers or more, which can be cut")
    rule = f"<= {layers - 2}, which leaves an earlier block that learns in {layers} layers"
    check(frozen <= layers - 2, "frozen_blocks", frozen, rule)
    for k in args.num_blocks or ():
        check(2 <= k <= layers, "num_blocks", k, f">= 2 and <= {layers}, the model's layers")
        rule = f"<= {k - 2}, which leaves an earlier block of {k} that learns, with `num_blocks` {k}"
        check(frozen <= k - 2, "frozen_blocks", frozen, rule)
    return args.num_blocks or [k for k in BLOCKS if frozen + 2 <= k <= layers] or [frozen + 2]


def _methods(args: PlanArguments) -> list[Method]:
    return cast(list[Method], args.method)  # as `check_arguments` has found


def _calibrated_setting(args: PlanArguments, blocks: int) -> Setting:
    """Return what `--calibrate` runs: the first of everything.

    Raises:
        ValueError: a combination that does not exist.
    """
    method = _methods(args)[0]
    return Setting(
        method,
        1 if method in ONE_BLOCK else blocks,
        args.schedule,
        args.gradient_checkpointing,
        args.offload,
        stages=args.stages[0] if args.stages else None,
        stage_layers=args.stage_layers[0] if args.stage_layers else None,
        optimizer_device=args.optimizer_device,
    )


# -- what is printed -------------------------------------------------------------------------------


def _headline(args: PlanArguments, planner: Planner) -> str:
    run, layers = planner.run, len(planner.sizes.layers)
    numbers = args.param_dtype + (", bfloat16 autocast" if run.autocast else "")
    cut = f", the first {run.frozen_blocks} blocks frozen" if run.frozen_blocks else ""
    cut += ", earlier blocks predict the next token" if run.aux_loss == "next_token" else ""
    device = "GPU" if run.device == "cuda" else "CPU"
    how = "FSDP2" if run.fsdp2 else "DDP"
    several = (
        f"({run.processes} processes by {how}: host is all of theirs, tokens are of one; times are with\n"
        "averaged gradients and with steps of all in host memory, without others on the bus)\n"
    )
    pairs = ", 2 rows a pair" * (args.command == "dpo")
    pairs += ", with a reference model" * (run.reference and args.method != ["lora"])
    size = f"{planner.sizes.model / 1e9:.2f} B weights in {layers} layers"
    return (
        f"{args.model_name_or_path}: {size}, {numbers}, {args.optim}{cut}\n"
        f"{run.batch} x {run.tokens:,} tokens a micro-batch{pairs}, {run.accumulation} a step. "
        f"Peak on the {device} in GiB:\n"
    ) + several * (run.processes > 1)


def _proposal(planner: Planner, blocks: list[int], limit: int, args: PlanArguments, machine: Machine) -> str:
    where = "cpu" if args.optimizer_device == "cpu" else None
    host = None if args.host_memory is None else size_in_bytes(args.host_memory, "host_memory")

    def found(methods: list[Method]) -> Plan:
        return search(planner, blocks, limit, machine, methods, args.stages, where, host)

    def described(plan: Plan) -> str:
        need = f"{format_bytes(plan.total)} on the device"
        if plan.host:
            need += f", {format_bytes(plan.host)} of host memory"
        return f"{plan.setting}\n({need}; predicted: {report.speed(plan, machine)})"

    best = found(_methods(args))
    lines = [f"The fastest that fits into {format_bytes(limit)}: {described(best)}"]
    for method in _methods(args):
        if method != best.setting.method:
            with suppress(ValueError):  # nothing fits
                lines.append(f"Of {method} the fastest is {described(found([method]))}")
    return "\n".join([*lines, "", command(best, args, best.prefetch)])


def _calibrated(planner: Planner, setting: Setting) -> str:
    """Return predicted beside measured bytes and time, on this machine's device.

    Raises:
        ValueError: this machine has not enough memory.
    """
    from lopt.trainers import LoPTSFTTrainer
    from lopt.trainers.config import LoPTSFTConfig

    plan, have = planner.plan(setting), free_memory(torch.device(planner.run.device))
    if (need := plan.total + rates_bytes(planner.run, planner.sizes)) > have:
        raise ValueError(
            f"`calibrate` would run {setting} on this machine, which needs {format_bytes(need)} of "
            f"{format_bytes(have)}: use a smaller model, `per_device_train_batch_size` or `max_length`"
        )
    found = measured(planner.run, setting, LoPTSFTTrainer, LoPTSFTConfig, TIMED)
    machine, peak, bytes_ = typical(found.machines), plan.peak, found.peak
    lines = [f"{setting} on this machine's {planner.run.device}, {TIMED} steps between measurements of it:"]
    lines += [*report.rates(found.product, machine), "memory:"]
    if isinstance(bytes_, MemoryPeak):
        activations = peak.activations + peak.head_and_loss + peak.stash
        lines.append(_compared("weights", peak.weights, bytes_.parameters))
        lines.append(_compared("gradients", peak.gradients, bytes_.gradients))
        lines.append(_compared("optimizer", peak.optimizer, bytes_.optimizer))
        lines.append(_compared("activations", activations, bytes_.activations))
        bytes_ = bytes_.total
    lines += [_compared("total", plan.total, bytes_), "time:"]
    around = [plan.time(machine).seconds for machine in found.machines]
    predicted = [(before + after) / 2 for before, after in pairwise(around)]
    off = median(one / real - 1 for one, real in zip(predicted, found.seconds, strict=True))
    seconds = f"predicted {median(predicted):>8.3g} s, measured {median(found.seconds):>8.3g} s"
    lines.append(f"  {'a step':12} {seconds} ({off:+.1%}, the median of {len(predicted)})")
    return "\n".join([*lines, f"To plan with these rates: {report.flags_of(machine)}"])


def _compared(name: str, predicted: int, real: int) -> str:
    off = f" ({predicted / real - 1:+.1%})" if real else ""
    return f"  {name:12} predicted {format_bytes(predicted):>10}, measured {format_bytes(real):>10}{off}"
