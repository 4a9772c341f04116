"""`lopt plan`: what a run will need, from the model's config alone, before anyone rents a GPU."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from lopt.cli.arguments import PlanArguments
from lopt.cli.parsing import parse
from lopt.core.config import LoPTConfig
from lopt.files import write_text
from lopt.instruments.memory import MemoryPeak, format_bytes
from lopt.planning.plan import Plan, Planner, Run, Setting
from lopt.planning.search import candidates, fit
from lopt.planning.shapes import SHAPES, model_config
from lopt.reports.plots import bar_plot, standalone

GIB = 2**30
NAMES = 24  # columns
BLOCKS = (2, 4, 8)
# A letter for the bars, the name of the part and the fields of `Bytes` that it sums.
PARTS = {
    "W": ("weights", ("weights",)),
    "G": ("gradients", ("gradients",)),
    "O": ("optimizer", ("optimizer",)),
    "A": ("activations", ("activations",)),
    "H": ("head and loss", ("head_and_loss",)),
    "S": ("stash, transfers", ("stash", "transfers")),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str]) -> None:
    """Check the flags, measure the parts, print the table and what was asked for beside it."""
    (args,) = parse("plan", arguments)
    limit = check(args)
    planner = Planner(_run(args))
    blocks = _blocks(args, len(planner.sizes.layers))
    if args.calibrate:
        setting = Setting("lopt", blocks[0], args.schedule, args.gradient_checkpointing, args.offload)
        print(_calibrated(planner, setting))
        return
    plans = [planner.plan(setting) for setting in settings(blocks)]
    print(_headline(args, planner))
    print(table(plans, args.tflops, args.bandwidth), bars(plans), _hiding(plans, planner.run, args), sep="\n")
    if args.json:
        rows = [asdict(plan) | {"name": str(plan.setting), "total": plan.total} for plan in plans]
        write_text(Path(args.json), json.dumps({"arguments": asdict(args), "plans": rows}, indent=1) + "\n")
    if args.svg:
        write_text(Path(args.svg), picture(plans, args) + "\n")
    if limit is not None:
        print(_proposal(fit(planner, blocks, limit, args.tflops, args.bandwidth), limit, args))


def check(args: PlanArguments) -> int | None:
    """Refuse what means nothing; returns the bytes of --fit.

    Raises:
        ValueError: a flag's value is not possible.
    """
    if args.model_name_or_path is None:
        raise ValueError(
            f"--model_name_or_path is missing: give a folder, a hub id or one of {', '.join(SHAPES)}"
        )
    for name in ("param_dtype", "state_dtype"):
        if getattr(args, name) not in DTYPES:
            value = getattr(args, name)
            raise ValueError(f"--{name} {value} is not possible: use one of {', '.join(DTYPES)}")
    for name, least in (
        ("per_device_train_batch_size", 1),
        ("gradient_accumulation_steps", 1),
        ("max_length", 2),
        ("local_every", 1),
    ):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} is not possible: use {least} or more")
    names = ("schedule", "offload", "prefetch_gib", "aux_loss", "frozen_blocks")
    LoPTConfig(**{name: getattr(args, name) for name in names})
    for name in ("bandwidth", "tflops"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ValueError(f"--{name} {getattr(args, name)} is not possible: use a number above 0")
    for name in ("json", "svg"):
        value = getattr(args, name)
        if value is not None and not Path(value).absolute().parent.is_dir():
            raise ValueError(f"--{name} {value}: its folder does not exist: make it first")
        if value is not None and Path(value).is_dir():
            raise ValueError(f"--{name} {value} is a folder: name a file")
    return None if args.fit is None else size_in_bytes(args.fit)


def size_in_bytes(text: str) -> int:
    """Bytes of "24GiB", "24GB" or "24" (GiB).

    Raises:
        ValueError: not a size.
    """
    number = text.strip().lower()
    unit = GIB
    for ending, size in (("gib", GIB), ("gb", 10**9), ("g", GIB)):
        if number.endswith(ending):
            number, unit = number.removesuffix(ending), size
            break
    try:
        value = float(number) * unit
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(f"--fit {text} is not a size: write it like 24GiB, 80GB or 24")
    return int(value)


def settings(blocks: Iterable[int]) -> list[Setting]:
    """The rows of the table."""
    rows = [Setting("e2e", 1), Setting("e2e", 1, checkpointing=True)]
    for k in blocks:
        rows += [s for s in candidates(k) if s.schedule == "eager" or not s.checkpointing]
    return rows


def command(plan: Plan, args: PlanArguments, prefetch: int) -> str:
    """The `lopt sft` command line of a plan."""
    setting = plan.setting
    flags: dict[str, object] = {
        "model_name_or_path": args.model_name_or_path,
        "param_dtype": args.param_dtype,
        "num_blocks": setting.num_blocks,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "max_length": args.max_length,
        "optim": args.optim,
    }
    if args.model_revision:
        flags["model_revision"] = args.model_revision
    if args.state_dtype != "float32":
        flags["state_dtype"] = args.state_dtype
    if args.master_weights:
        flags["master_weights"] = True
    for name, default in (("frozen_blocks", 0), ("aux_loss", "recon"), ("local_every", 1)):
        if getattr(args, name) != default:
            flags[name] = getattr(args, name)
    if args.bf16 is not None:
        flags["bf16"] = args.bf16
    if args.use_cpu:
        flags["use_cpu"] = True
    if setting.checkpointing:
        flags["gradient_checkpointing"] = True
    if setting.schedule != "eager":
        flags["schedule"] = setting.schedule
    if setting.offload != "none":
        flags |= {"offload": setting.offload, "prefetch_gib": f"{prefetch / GIB:g}"}
    flags |= {"train_file": "data.jsonl", "output_dir": "outputs/run"}
    lines = [f"--{name} {shlex.quote(str(value))}" for name, value in flags.items()]
    return "lopt sft " + " \\\n    ".join(lines)


def _run(args: PlanArguments) -> Run:
    on_gpu = not (args.use_cpu or (args.calibrate and not torch.cuda.is_available()))
    return Run(
        config=model_config(str(args.model_name_or_path), args.model_revision, args.trust_remote_code),
        batch=args.per_device_train_batch_size,
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
        device="cuda" if on_gpu else "cpu",
    )


def _blocks(args: PlanArguments, layers: int) -> list[int]:
    if layers < 2:
        raise ValueError(f"--model_name_or_path {args.model_name_or_path} has one layer: nothing to cut")
    least = args.frozen_blocks + 2
    if least > layers:
        raise ValueError(
            f"--frozen_blocks {args.frozen_blocks} leaves no earlier block that learns: the model has "
            f"{layers} layers, use {layers - 2} or fewer"
        )
    if args.num_blocks is None:
        return [k for k in BLOCKS if least <= k <= layers] or [least]
    for k in args.num_blocks:
        LoPTConfig(num_blocks=k)
        if not 2 <= k <= layers:
            raise ValueError(f"--num_blocks {k} is not possible: use 2 to {layers}, the model's layers")
        if k < least:  # as `lopt.core.blocks.split` refuses it, but there is no --method to name here
            raise ValueError(
                f"--frozen_blocks {args.frozen_blocks} of {k} blocks leaves no earlier block that learns: "
                f"use {k - 2} or fewer, or --num_blocks {least} or more"
            )
    return args.num_blocks


# -- what is printed -------------------------------------------------------------------------------


def _parts(plan: Plan) -> dict[str, int]:
    return {k: sum(getattr(plan.peak, name) for name in names) for k, (_, names) in PARTS.items()}


def _headline(args: PlanArguments, planner: Planner) -> str:
    run, layers = planner.run, len(planner.sizes.layers)
    numbers = args.param_dtype + (", bfloat16 autocast" if run.autocast else "")
    cut = f", the first {run.frozen_blocks} blocks frozen" if run.frozen_blocks else ""
    cut += ", earlier blocks predict the next token" if run.aux_loss == "next_token" else ""
    device = "GPU" if run.device == "cuda" else "CPU"
    size = f"{planner.sizes.model / 1e9:.2f} B weights in {layers} layers"
    return (
        f"{args.model_name_or_path}: {size}, {numbers}, {args.optim}{cut}\n"
        f"{run.batch} x {run.tokens:,} tokens a micro-batch, {run.accumulation} a step. "
        f"Peak on the {device} in GiB:\n"
    )


def table(plans: Sequence[Plan], tflops: float, bandwidth: float) -> str:
    """One row per setting, GiB by part, what host and disk must hold, work, copies and time of a step."""
    heads = ["weight", "grads", "optim.", "activ.", "head", "stash", "total", "host", "disk"]
    lines = [" " * NAMES + "".join(f"{head:>7}" for head in [*heads, "PFLOP", "bus GB", "s/step"])]
    for plan in plans:
        sizes = [*_parts(plan).values(), plan.total, plan.host, plan.checkpoint]
        numbers = [f"{size / GIB:7.1f}" if size else f"{'-':>7}" for size in sizes]
        numbers += [f"{plan.flops / 1e15:7.2f}", f"{plan.bus / 1e9:7.0f}" if plan.bus else f"{'-':>7}"]
        lines.append(f"{plan.setting!s:{NAMES}}{''.join(numbers)}{plan.seconds(tflops, bandwidth):7.1f}")
    note = "(head: with the loss; stash: with transfers; disk: one checkpoint; bus: each way; "
    note += f"s/step: at {tflops:g} TFLOP/s and {bandwidth:g} GB/s)"
    return "\n".join([*lines, note, ""])


def bars(plans: Sequence[Plan], width: int = 64) -> str:
    """A picture of the totals: a letter per part, in proportion."""
    scale = width / max(plan.total for plan in plans)
    lines = []
    for plan in plans:
        ends, bar = 0.0, ""
        for letter, size in _parts(plan).items():
            ends += size * scale
            bar += letter * (round(ends) - len(bar))
        lines.append(f"{plan.setting!s:{NAMES}}{bar} {plan.total / GIB:.1f}")
    legend = ", ".join(f"{letter} {name}" for letter, (name, _) in PARTS.items())
    return "\n".join(lines) + f"\n({legend})\n"


def _hiding(plans: Sequence[Plan], run: Run, args: PlanArguments) -> str:
    """From how many tokens a step on offloading costs no time, whatever k is."""
    where = f"at {args.bandwidth:g} GB/s and {args.tflops:g} TFLOP/s"
    lines = [f"Copies hide behind compute, {where} (here: {run.step_tokens:,} tokens a step)"]
    for offload in ("optimizer", "block"):
        staged = [plan for plan in plans if plan.setting.offload == offload]
        tokens = max(plan.hidden_from(run.step_tokens, args.tflops, args.bandwidth) for plan in staged)
        how = "never" if tokens == float("inf") else f"from {tokens:,.0f} tokens a step on"
        lines.append(f"  --offload {offload:{NAMES - 12}}{how}")
    return "\n".join(lines) + "\n"


def _proposal(plan: Plan, limit: int, args: PlanArguments) -> str:
    seconds = plan.seconds(args.tflops, args.bandwidth)
    need = f"{format_bytes(plan.total)} on the device"
    if plan.host:
        need += f", {format_bytes(plan.host)} of host memory"
    head = (
        f"The fastest that fits into {format_bytes(limit)}: {plan.setting} ({need}, {seconds:.1f} s a step)"
    )
    return f"{head}\n\n{command(plan, args, plan.prefetch)}"


def picture(plans: Sequence[Plan], args: PlanArguments) -> str:
    """The bars as SVG."""
    shown = {name: [_parts(plan)[letter] / GIB for plan in plans] for letter, (name, _) in PARTS.items()}
    what = f"{args.per_device_train_batch_size} x {args.max_length} tokens, {args.param_dtype}"
    svg = bar_plot(
        [str(plan.setting) for plan in plans],
        {name: sizes for name, sizes in shown.items() if any(sizes)},
        title=f"{args.model_name_or_path}: peak memory",
        x_label=f"GiB on the device, {what}",
        alt="; ".join(f"{plan.setting}: {plan.total / GIB:.1f} GiB" for plan in plans),
        stacked=True,
        value="{:.1f}".format,
    )
    return standalone(svg)


def _calibrated(planner: Planner, setting: Setting) -> str:
    """Predicted beside measured, on the device that is there.

    Raises:
        ValueError: this machine has not enough memory.
    """
    from lopt.planning.calibrate import calibrate, machine_memory  # the trainers take seconds to import

    plan, have = planner.plan(setting), machine_memory(planner.run.device)
    if plan.total > have:
        raise ValueError(
            f"--calibrate would run {setting} on this machine, which needs {format_bytes(plan.total)} of "
            f"{format_bytes(have)}: use a smaller model, --per_device_train_batch_size or --max_length"
        )
    measured = calibrate(planner.run, setting)
    lines = [f"{setting}, two real steps on this machine's {planner.run.device}:"]
    peak = plan.peak
    if isinstance(measured, MemoryPeak):
        activations = peak.activations + peak.head_and_loss + peak.stash
        lines.append(_compared("weights", peak.weights, measured.parameters))
        lines.append(_compared("gradients", peak.gradients, measured.gradients))
        lines.append(_compared("optimizer", peak.optimizer, measured.optimizer))
        lines.append(_compared("activations", activations, measured.activations))
        measured = measured.total
    return "\n".join([*lines, _compared("total", plan.total, measured)])


def _compared(name: str, predicted: int, measured: int) -> str:
    off = f" ({predicted / measured - 1:+.1%})" if measured else ""
    return f"  {name:12} predicted {format_bytes(predicted):>10}, measured {format_bytes(measured):>10}{off}"
