"""A plan as text for the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from lopt.planning.plan import HOST_BANDWIDTH, Plan
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


def table(plans: Sequence[Plan], tflops: float, bandwidth: float) -> str:
    """Return a row per plan: GiB by part, GiB of host and disk, FLOPs, copies and seconds of a step."""
    heads = ["weight", "grads", "optim.", "activ.", "head", "stash", "total", "host", "disk"]
    names = _columns(plans)
    lines = [" " * names + "".join(f"{head:>7}" for head in [*heads, "PFLOP", "bus GB", "s/step"])]
    for plan in plans:
        sizes = [*_parts(plan).values(), plan.total, plan.host, plan.checkpoint]
        numbers = [f"{size / GIB:7.1f}" if size else f"{'-':>7}" for size in sizes]
        numbers += [f"{plan.flops / 1e15:7.2f}", f"{plan.bus / 1e9:7.0f}" if plan.bus else f"{'-':>7}"]
        lines.append(f"{plan.setting!s:{names}}{''.join(numbers)}{plan.seconds(tflops, bandwidth):7.1f}")
    note = "(head: with the loss; stash: with transfers; disk: one checkpoint; bus: each way; "
    note += f"s/step: at {tflops:g} TFLOP/s and {bandwidth:g} GB/s"
    if any(plan.host_traffic for plan in plans):
        note += f", host steps at {HOST_BANDWIDTH:g} GB/s of host memory"
    note += ")"
    return "\n".join([*lines, note, ""])


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


def hiding(plans: Sequence[Plan], step_tokens: int, tflops: float, bandwidth: float) -> str:
    """Return from how many tokens a step on offloading costs no time, whatever k is.

    Args:
        step_tokens: tokens per optimizer step of the plans.
    """
    where = f"at {bandwidth:g} GB/s and {tflops:g} TFLOP/s"
    lines = [f"Copies hide behind compute, {where} (here: {step_tokens:,} tokens a step)"]
    for offload in ("optimizer", "block"):
        those = [plan for plan in plans if plan.setting.offload == offload]
        if not those:
            continue
        tokens = max(plan.hidden_from(step_tokens, tflops, bandwidth) for plan in those)
        how = "never" if tokens == float("inf") else f"from {tokens:,.0f} tokens a step on"
        lines.append(f"  --offload {offload:{NAMES - 12}}{how}")
    return "\n".join(lines) + "\n"


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
