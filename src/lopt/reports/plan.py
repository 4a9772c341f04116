"""A plan as text for the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lopt.planning.devices import Machine
from lopt.planning.plan import Plan
from lopt.reports.plots import bar_plot, standalone

GIB = 2**30
NAMES = 24  # columns, at least
# A letter for the bars, the name of the part and the fields of `Bytes` that it sums.
PARTS = {
    "W": ("weights", ("weights",)),
    "G": ("gradients", ("gradients",)),
    "O": ("optimizer", ("optimizer",)),
    "A": ("activations", ("activations",)),
    "H": ("head and loss", ("head_and_loss",)),
    "S": ("stash, transfers", ("stash", "transfers")),
}


def table(plans: Sequence[Plan]) -> str:
    """Return a row per plan: GiB by part, and GiB of host and disk."""
    heads = ["weight", "grads", "optim", "activ", "head", "stash", "total", "host", "disk"]
    names = _columns(plans)
    lines = [" " * names + "".join(f"{head:>7}" for head in heads)]
    for plan in plans:
        sizes = [*_parts(plan).values(), plan.total, plan.host, plan.checkpoint]
        lines.append(f"{plan.setting!s:{names}}" + "".join(f"{gib(size):>7}" for size in sizes))
    return "\n".join([*lines, "(head: with the loss; stash: with transfers; disk: one checkpoint)", ""])


def times(plans: Sequence[Plan], machine: Machine) -> str:
    """Return a row per plan: operations, traffic, and the predicted time of a step."""
    names = _columns(plans)
    rates = "/".join(f"{rate:.3g}" for rate in dict.fromkeys(machine.tflops))
    ways = "{:g} GB/s to the device and {:g} back".format(*machine.bandwidth)
    where = f"{rates} TFLOP/s, {ways}, {machine.host_gbps:.3g} GB/s of host memory"
    lines = [f"Predicted time of a step, at {where}:"]
    several = any(plan.processes > 1 for plan in plans)
    between = ["sent GB", "ranks"] if several else []
    heads = ["PFLOP", "bus GB", "s", "tokens/s", "copies", "host", *between, "bound by"]
    lines.append(" " * names + "".join(f"{head:>9}" for head in heads))
    for plan in plans:
        time = plan.time(machine)
        cells = [f"{plan.flops / 1e15:.2f}", f"{plan.bus / 1e9:.0f}" if plan.bus else "-"]
        cells += [f"{time.seconds:.{1 if time.seconds >= 10 else 2}f}", f"{plan.tokens / time.seconds:,.0f}"]
        waits = (time.copies / time.seconds, time.host / time.seconds)
        cells += [f"{wait:.0%}" if plan.bus else "-" for wait in waits]
        cells += [f"{plan.sent / 1e9:.3g}", f"{time.ranks / time.seconds:.0%}"] if several else []
        lines.append(f"{plan.setting!s:{names}}" + "".join(f"{cell:>9}" for cell in [*cells, time.bound]))
    notes = (
        "(bus: to the device; copies, host: share of the time in which the device waits for them;",
        "bound by host: optimizer steps in host memory take longer than the device's work; wait: they are",
        "quicker, but the next step begins with the layers that the host steps last, and waits for them)",
    )
    ranks = (
        "(sent: by each process to the others; ranks: the same of waiting for that, at "
        f"{machine.link_gbps:g} GB/s each way)"
    )
    return "\n".join([*lines, *notes, *[ranks] * several, ""])


def speed(plan: Plan, machine: Machine) -> str:
    """Return the predicted time of a step in words."""
    time = plan.time(machine)
    return f"{time.seconds:.3g} s a step, {plan.tokens / time.seconds:,.0f} tokens/s, bound by {time.bound}"


def rates(product: float, machine: Machine) -> list[str]:
    """Return the measured rates of a machine, one a line; `product` is that of a plain matrix product."""
    names = ("layers with a graph", "layers without one", "LM head and loss", "a matrix product")
    lines = [f"  {n:22}{r:8.3g} TFLOP/s" for n, r in zip(names, (*machine.tflops, product), strict=True)]
    ways = dict(zip(("copies to the device", "copies from the device"), machine.bandwidth, strict=True))
    for name, rate in (ways | {"steps in host memory": machine.host_gbps}).items():
        lines.append(f"  {name:22}{rate:8.3g} GB/s")
    return lines


def flags_of(machine: Machine) -> str:
    """Return the flags of `lopt plan` that describe a machine."""
    tflops, ways = (" ".join(f"{rate:.3g}" for rate in pair) for pair in (machine.tflops, machine.bandwidth))
    return f"--tflops {tflops} --bandwidth {ways} --host_gbps {machine.host_gbps:.3g}"


def as_row(plan: Plan, machine: Machine) -> dict[str, Any]:
    """Return a plan for JSON; all that is about time is under "predicted"."""
    time = plan.time(machine)
    row = {name: value for name, value in vars(plan).items() if name != "work"}
    return row | {
        "sent": plan.sent,
        "setting": asdict(plan.setting),
        "peak": asdict(plan.peak),
        "name": str(plan.setting),
        "total": plan.total,
        "predicted": asdict(time) | {"tokens_per_second": plan.tokens / time.seconds, "bound": time.bound},
    }


def bars(plans: Sequence[Plan], width: int = 64) -> str:
    """Return a bar per plan, of the largest `width` letters long, with a letter per part in proportion."""
    scale = width / max(plan.total for plan in plans)
    lines = []
    for plan in plans:
        ends, bar = 0.0, ""
        for letter, size in _parts(plan).items():
            ends += size * scale
            bar += letter * (round(ends) - len(bar))
        lines.append(f"{plan.setting!s:{_columns(plans)}}{bar} {plan.total / GIB:.1f}")
    legend = ", ".join(f"{letter} {name}" for letter, (name, _) in PARTS.items())
    return "\n".join(lines) + f"\n({legend})\n"


def hiding(plans: Sequence[Plan], machine: Machine) -> str:
    """Return from how many tokens a step on offloading costs no time, whatever k is; nothing without any."""
    tokens = plans[0].tokens
    lines = [f"Copies can hide behind compute (here: {tokens:,} tokens a step)"]
    for offload in ("optimizer", "block"):
        those = [plan for plan in plans if plan.setting.offload == offload]
        if not those:
            continue
        least = max(plan.hidden_from(machine) for plan in those)
        how = "never" if least == float("inf") else f"from {least:,.0f} tokens a step on"
        lines.append(f"  --offload {offload:{NAMES - 12}}{how}")
    return "\n".join(lines) + "\n" if len(lines) > 1 else ""


def picture(plans: Sequence[Plan], title: str, x_label: str) -> str:
    """Return the bars as an SVG file.

    Raises:
        ImportError: matplotlib is not installed.
    """
    shown = {name: [_parts(plan)[letter] / GIB for plan in plans] for letter, (name, _) in PARTS.items()}
    svg = bar_plot(
        [str(plan.setting) for plan in plans],
        {name: sizes for name, sizes in shown.items() if any(sizes)},
        title=title,
        x_label=x_label,
        alt="; ".join(f"{plan.setting}: {plan.total / GIB:.1f} GiB" for plan in plans),
        stacked=True,
        value="{:.1f}".format,
    )
    return standalone(svg)


def _columns(plans: Sequence[Plan]) -> int:
    return max(NAMES, *(len(str(plan.setting)) + 1 for plan in plans))


def _parts(plan: Plan) -> dict[str, int]:
    return {k: sum(getattr(plan.peak, name) for name in names) for k, (_, names) in PARTS.items()}


def gib(size: int) -> str:
    """Return bytes in GiB with one decimal, a dash for none."""
    return f"{size / GIB:.{0 if size >= 1000 * GIB else 1}f}" if size else "-"
