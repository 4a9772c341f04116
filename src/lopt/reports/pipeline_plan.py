"""The plan of a pipeline as text for the terminal, as a picture and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lopt.planning.devices import Machine
from lopt.planning.end_to_end import Rival
from lopt.planning.pipeline import PipelinePlan, Rank
from lopt.planning.run import Bytes
from lopt.planning.schedules import Steady
from lopt.reports.plan import GIB, gib
from lopt.reports.plots import bar_plot, standalone

DEPTHS = (4, 8, 16, 32)
"""Values of `pipeline_depth` that are named where a larger one would hide a link."""
COLUMNS = {
    "weight": ("weights",), "grads": ("gradients",), "optim": ("optimizer",), "activ": ("activations",),
    "loss": ("head_and_loss",), "queue": ("stash",),
}  # fmt: skip


def ranks(plan: PipelinePlan, machine: Machine) -> str:
    """Return a row per process of a pipeline: what it has, its memory, its time and how busy it is."""
    steady, count, unit = plan.time(machine), plan.micro_batches, _unit(plan)
    heads = ["rank", "blocks", "layers", *COLUMNS, "total", "ms", "s", "busy"]
    widths = [4, 8, 8, *[8] * len(COLUMNS), 8, 9, 8, 7]
    lines = ["".join(f"{head:>{width}}" for head, width in zip(heads, widths, strict=True))]
    for number, rank in enumerate(plan.ranks):
        seconds = rank.seconds(machine, count)
        cells = [
            str(number * plan.replicas) if plan.replicas == 1 else _ranks(number, plan.replicas),
            _span(rank.blocks[0] + 1, rank.blocks[-1] + 1),
            _span(rank.layers[0], rank.layers[1] - 1),
            *(_size(size, unit) for size in _sizes(rank.peak)),
            _size(rank.peak.total, unit),
            f"{1e3 * sum(t.forward + t.rest for t in rank.times(machine, count)):,.4g}",
            f"{seconds:.3g}",
            f"{seconds / steady.seconds:.0%}",
        ]
        lines.append("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
    lines += [
        f"({unit} at the peak; weight: with those of the local head; loss: local or task, at that moment;",
        "queue: hidden states that links hold, or that wait between a rank's blocks; ms: computing a",
        "micro-batch; s: a step, averaging and the optimizer's included; busy: its share of a step of the",
        "full pipeline)",
    ]
    return "\n".join([*lines, ""])


def summary(plan: PipelinePlan, even: PipelinePlan | None, machine: Machine) -> str:
    """Return what a step takes and what bounds it, what the links carry, and how the model is cut.

    Args:
        even: The same run with blocks of as many layers each, if the boundaries were chosen.
    """
    steady, count = plan.time(machine), plan.micro_batches
    lines = [
        f"A step takes {_seconds(steady.seconds)} ({plan.tokens / steady.seconds:,.0f} tokens/s), "
        f"{_bound(plan, machine)}; the first one {_seconds(steady.fill)} more.",
        f"A link carries {_bytes(plan.boundary)} a micro-batch and {_bytes(count * plan.boundary)} a step, "
        f"one way, at {machine.link_gbps:.3g} GB/s and {1e3 * machine.latency:g} ms.",
        *_hiding(plan, machine),
    ]
    starts = " ".join(map(str, plan.setting.block_boundaries or ()))
    if even is not None:
        other = even.time(machine).seconds
        last = plan.setting.num_blocks
        blocks = "block 2 begins" if last == 2 else f"blocks 2 to {last} begin"
        chosen = f"Boundaries by cost: {blocks} at layer{'s' * (' ' in starts)} {starts}"
        lines.append(f"{chosen}; split evenly, a step would take {_seconds(other)}.")
    reach = plan.ranks[-1].layers[1] - (plan.setting.block_boundaries or (0,))[-1]
    lines.append(f"The task loss reaches the last block, {reach} of {plan.ranks[-1].layers[1]} layers.")
    return "\n".join([*lines, ""])


def comparison(plan: PipelinePlan, others: Sequence[Rival], machine: Machine) -> str:
    """Return the pipeline beside the same model end to end on as many devices."""
    devices = len(plan.ranks) * plan.replicas
    unit = _unit(plan)
    heads = [unit, "activ", "s", "tokens/s", "sent GB", "held"]
    lines = [f"Beside it, end to end on {devices} devices (predicted; the device that needs most):"]
    lines.append(" " * 24 + "".join(f"{head:>10}" for head in heads))
    peak = max((rank.peak for rank in plan.ranks), key=lambda peak: peak.total)
    rows = [(str(plan.setting), peak, plan.time(machine).seconds, plan.tokens, plan.sent, 1)]
    rows += [(r.name, r.peak, r.seconds, r.tokens, r.sent, r.held) for r in others]
    for name, most, time, tokens, passed, held in rows:
        activations = most.activations + most.head_and_loss
        cells = [_size(most.total, unit), _size(activations, unit), f"{time:.3g}", f"{tokens / time:,.0f}"]
        cells += [f"{passed / 1e9:.3g}", str(held)]
        lines.append(f"{name:24}" + "".join(f"{cell:>10}" for cell in cells))
    lines.append("(held: micro-batches whose activations a device holds; sent: by a device in a step)")
    if any(r.tokens != plan.tokens for r in others):
        lines.append(
            "(FSDP2 has a whole micro-batch on each device, so its step is another: compare tokens/s)"
        )
    return "\n".join([*lines, ""])


def as_json(plan: PipelinePlan, others: Sequence[Rival], machine: Machine) -> dict[str, Any]:
    """Return the plan for JSON; all that is about time is under "predicted"."""
    steady = plan.time(machine)
    return {
        "setting": asdict(plan.setting),
        "boundary": plan.boundary,
        "link_bytes": plan.micro_batches * plan.boundary,
        "tokens": plan.tokens,
        "replicas": plan.replicas,
        "ranks": [_rank_json(plan, n, rank, steady, machine) for n, rank in enumerate(plan.ranks)],
        "predicted": {
            "seconds": steady.seconds,
            "tokens_per_second": plan.tokens / steady.seconds,
            "fill_seconds": steady.fill,
            "bound": plan.bound(machine),
            "hidden_from_gbps": None if math.isinf(rate := plan.hidden_from(machine)) else rate,
        },
        "end_to_end": [asdict(other) | {"total": other.peak.total} for other in others],
    }


def picture(plan: PipelinePlan, title: str, x_label: str) -> str:
    """Return a bar per process as an SVG file."""
    names = [f"rank {_ranks(n, plan.replicas)}" for n in range(len(plan.ranks))]
    columns = zip(*(_sizes(rank.peak) for rank in plan.ranks), strict=True)
    series = {name: [size / GIB for size in sizes] for name, sizes in zip(COLUMNS, columns, strict=True)}
    series = {name: sizes for name, sizes in series.items() if any(sizes)}
    alt = "; ".join(f"{n}: {r.peak.total / GIB:.1f} GiB" for n, r in zip(names, plan.ranks, strict=True))
    svg = bar_plot(names, series, title=title, x_label=x_label, alt=alt, stacked=True, value="{:.1f}".format)
    return standalone(svg)


def _rank_json(
    plan: PipelinePlan, number: int, rank: Rank, steady: Steady, machine: Machine
) -> dict[str, Any]:
    times, seconds = rank.times(machine, plan.micro_batches), rank.seconds(machine, plan.micro_batches)
    return {
        "ranks": [number * plan.replicas + n for n in range(plan.replicas)],
        "blocks": [*rank.blocks],
        "layers": rank.layers,
        "peak": asdict(rank.peak),
        "total": rank.peak.total,
        "local_head": rank.head,
        "queue": rank.queue,
        "predicted": {
            "micro_batch_seconds": sum(t.forward + t.rest for t in times),
            "step_seconds": seconds,
            "busy_share": seconds / steady.seconds,
            "input_wait_seconds": steady.input_waits[number],
            "output_wait_seconds": steady.output_waits[number],
        },
    }


def _bound(plan: PipelinePlan, machine: Machine) -> str:
    if (bound := plan.bound(machine)) != "compute":
        return "bound by the link" if bound == "link" else "bound by replicas, which average gradients"
    times = [rank.seconds(machine, plan.micro_batches) for rank in plan.ranks]
    return f"bound by compute, of rank {_ranks(times.index(max(times)), plan.replicas)}"


def _hiding(plan: PipelinePlan, machine: Machine) -> list[str]:
    """Return whether the links hide, and from which rate on they do."""
    depth, rate = plan.setting.pipeline_depth, plan.hidden_from(machine)
    cost = "cost no time" if plan.hides(machine) else "cost time"
    if math.isfinite(rate):
        none = f"they cost none from {rate:.2g} GB/s on at this latency (--pipeline_depth {depth})"
        return [f"The links {cost}: {none}."]
    for deeper in (d for d in DEPTHS if d > depth):
        if math.isfinite(rate := plan.hidden_from(machine, deeper)):
            more = f"with --pipeline_depth {deeper} they cost none from {rate:.2g} GB/s on"
            return [
                f"The links {cost} at any rate, as the latency is long for --pipeline_depth {depth}: {more}."
            ]
    return [f"The links {cost} at any rate: the latency is long. More micro-batches a step help."]


def _unit(plan: PipelinePlan) -> str:
    """Return the unit of sizes: MiB if no process needs a GiB."""
    return "GiB" if max(rank.peak.total for rank in plan.ranks) >= GIB else "MiB"


def _size(nbytes: int, unit: str) -> str:
    return gib(nbytes if unit == "GiB" else 1024 * nbytes)


def _sizes(peak: Bytes) -> list[int]:
    return [sum(getattr(peak, name) for name in names) for names in COLUMNS.values()]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _ranks(position: int, replicas: int) -> str:
    return _span(position * replicas, position * replicas + replicas - 1)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _bytes(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.3g} MB" if nbytes < 1e9 else f"{nbytes / 1e9:,.3g} GB"
