"""The page and the terminal summary of `lopt demo`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt.evaluation.statistics import wilson_interval
from lopt.files import write_text
from lopt.instruments.memory import format_bytes
from lopt.reports.lines import Points, line_plot
from lopt.reports.page import Pane, clean, figure, figures, page, paragraph, side_by_side, table
from lopt.reports.plots import bar_plot
from lopt.reports.text import columns, duration, number

Results = Mapping[str, Any]
"""What `lopt.evaluation.demo.run_demo` measured, or a part of it."""

_METHODS = {
    "lopt": "The last block learns from the task loss; every earlier block learns from its local loss, the "
    "error of reconstructing its own input. No gradient crosses a boundary.",
    "e2e": "All blocks learn from the task loss, whose gradient runs through every layer.",
    "frozen": "The last block learns from the task loss; the earlier blocks are not trained.",
    "lora": "LoRA adapters learn from the task loss, whose gradient runs through every layer.",
}


def write_demo_report(results: Results, folder: Path) -> Path:
    """Write `demo_page(results)` to `folder/report.html` and return that path."""
    path = folder / "report.html"
    write_text(path, demo_page(results))
    return path


def demo_page(results: Results) -> str:
    """Return the report of one demo run as a whole HTML page.

    Args:
        results: plain JSON values. `curve` and `head_warmup` may be missing or empty; losses are in nats per
            token, memory in bytes.

    Raises:
        KeyError: a required part is missing.
        ImportError: matplotlib is not installed.
    """
    r = results
    count = "1 block" if r["num_blocks"] == 1 else f"{r['num_blocks']} blocks"
    named = "; ".join(
        f"block {i} is {layers}".replace("-", "\u2011") for i, layers in enumerate(r["blocks"], start=1)
    )
    method = f"{_METHODS.get(r['method'], r['method'])} This run has {count}: {named}."
    sections = [
        ("", paragraph(outcome(r), "lede") + _caveat(r) + paragraph(method)),
        ("Adaptation and retention", _before_after(r)),
        ("Training", _curves(r)),
        ("Peak memory", _memory(r["memory"])),
        ("Sample answers", "".join(_sample(i, s) for i, s in enumerate(r["samples"], start=1))),
        ("Settings and versions", _facts(r)),
    ]
    return page(r["title"], sections, f"{r['model']} · {r['task']} · {r['method']}, {count} · {r['date']}")


def summary(results: Results) -> str:
    """Return sample answers and the main figures as text for a terminal."""
    before, after = sides = results["before"], results["after"]
    lines = []
    for sample in results["samples"]:
        lines += ["", sample["question"]]
        lines += [f"  {key + ':':8}{_one_line(sample[key])}" for key in ("before", "after")]
    rows = [
        ["", "before", "after"],
        ["held-out loss", *(f"{side['loss']:.3f}" for side in sides)],
        ["held-out exact answers", *(f"{side['correct']}/{side['total']}" for side in sides)],
        ["retention loss", f"{before['retention_loss']:.3f}", f"{after['retention_loss']:.3f}"],
        ["seconds per step (median)", "", f"{results['seconds_per_step']:.2f}"],
        ["seconds in all", "", f"{results['total_seconds']:.0f}"],
    ]
    if results["memory"]:
        rows.append(["peak of live bytes", "", format_bytes(sum(results["memory"].values()))])
    return "\n".join([*lines, "", columns(rows)])


def _one_line(text: str) -> str:
    line = clean(" | ".join(text.splitlines()))  # generated text must not send commands to a terminal
    return line if len(line) <= 100 else line[:97] + "..."


def outcome(results: Results) -> str:
    """Return the outcome of a demo run in one sentence, for better or worse."""
    a, b = results["before"], results["after"]
    where = f"In {duration(results['total_seconds'])} on this machine ({results['device']})"
    answers = "no held-out answers were checked"
    if a["total"] and b["total"]:
        old, new = (f"{r['correct']} of {r['total']}" for r in (a, b))
        answers = f"held-out exact answers {_change(old, new, _share(b) - _share(a))}"
    losses = a["retention_loss"], b["retention_loss"]
    kept = _change(f"{losses[0]:.2f}", f"{losses[1]:.2f}", losses[0] - losses[1])
    return f"{where}, {answers}, while loss on unrelated text {kept}."


def _share(side: Results) -> float:
    return float(side["correct"] / side["total"])


def _change(old: str, new: str, gain: float) -> str:
    if old == new and math.isfinite(gain):
        return f"stayed at {new}" if gain == 0 else f"stayed at about {new}"
    verb = "improved" if gain > 0 else "got worse," if gain < 0 else "went"
    return f"{verb} from {old} to {new}"


def _caveat(r: Results) -> str:
    a, b = r["before"], r["after"]
    if not (a["total"] and b["total"]) or _share(a) == _share(b):
        return ""
    old, new = (wilson_interval(side["correct"], side["total"]) for side in (a, b))
    overlap = "The 95 % intervals overlap: these numbers do not settle whether the accuracy changed."
    return paragraph(overlap, "note") if old[0] <= new[1] and new[0] <= old[1] else ""


def _before_after(r: Results) -> str:
    sides = r["before"], r["after"]

    def row(name: str, values: Iterable[float], form: str, sign: int) -> list[str]:
        old, new = values
        gain = sign * (new - old)
        verdict = "better" if gain > 0 else "worse" if gain < 0 else ""
        change = f"{new - old:+{form}} {verdict}" if verdict else "same" if gain == 0 else "unknown"
        change = change.replace("%", " points").replace("-", "−")
        return [name, number(old, form), number(new, form), change]

    def interval(side: Results) -> str:
        low, high = wilson_interval(side["correct"], side["total"]) if side["total"] else (0.0, 1.0)
        return f"{100 * low:.1f}–{100 * high:.1f}\u00a0%"

    rows = [
        row("Task loss, held out", (s["loss"] for s in sides), ".3f", -1),
        ["Exact answers", *(f"{s['correct']} of {s['total']}" for s in sides), ""],
        row("Accuracy", (s["accuracy"] for s in sides), ".1%", 1),
        ["95 % interval", *map(interval, sides), ""],
        row("Retention loss", (s["retention_loss"] for s in sides), ".3f", -1),
        row("Retention perplexity", (math.exp(min(s["retention_loss"], 700)) for s in sides), ".2f", -1),
    ]
    caption = (
        "Adaptation is the gain on the task, here on questions held out from training. Retention is what is "
        "kept elsewhere, here the loss on unrelated text. Losses: nats per token. Intervals: Wilson's."
    )
    return table(["", "Before", "After", "Change"], rows, caption, numeric=(1, 2, 3))


def _curves(r: Results) -> str:
    train, curve, warmup = r["train"], r.get("curve") or [], r.get("head_warmup") or []
    held_out = {"task loss": _column(curve, "loss"), "retention loss": _column(curve, "retention_loss")}
    nats, squares = "nats per token", "mean squared error"
    plots: list[tuple[dict[str, Points], str, str, str]] = [
        ({"task loss": _column(train, "loss")}, "Task loss in training", nats, "On the training batches."),
        (
            *(held_out, "Held out: task loss and retention loss", nats),
            "On held-out questions and on unrelated text; lower is better for both.",
        ),
        (
            *(_by_block(warmup, "local_loss", r["blocks"]), "Local loss in the head warm-up", squares),
            "Only the reconstruction heads learn here; the blocks stay as they are.",
        ),
        (
            *(_by_block(train, "local_loss", r["blocks"]), "Local loss in training", squares),
            "The error of each earlier block in reconstructing its own input.",
        ),
        (
            *(_by_block(train, "gradient_share", r["blocks"]), "Gradient share by block", "share"),
            "Each block's part of the whole gradient.",
        ),
    ]
    shown = []
    for series, title, label, caption in plots:
        series = {name: points for name, points in series.items() if points}
        if series:
            svg = line_plot(series, title=title, x_label="step", y_label=label, log_y=label == squares)
            shown.append(figure(svg, caption))
    return figures(shown)


def _column(rows: Sequence[Results], key: str, i: int | None = None) -> Points:
    values = [(row["step"], row[key] if i is None else row[key][i]) for row in rows]
    return [(step, value) for step, value in values if value is not None]


def _by_block(rows: Sequence[Results], key: str, blocks: Sequence[str]) -> dict[str, Points]:
    width = min((len(row[key]) for row in rows), default=0)
    return {f"block {i + 1} ({layers})": _column(rows, key, i) for i, layers in enumerate(blocks[:width])}


def _memory(memory: Mapping[str, float]) -> str:
    sizes = {"bytes": list(memory.values())}
    title = "Memory by category at the peak"
    svg = bar_plot(list(memory), sizes, title=title, value=lambda size: format_bytes(round(size)))
    return figure(svg, f"Together {format_bytes(round(sum(memory.values())))}.")


def _sample(index: int, s: Results) -> str:
    panes = [Pane("Reference", s["reference"])]
    panes += [Pane(key.title(), s[key], bool(s[f"{key}_correct"])) for key in ("before", "after")]
    return side_by_side(panes, heading=f"Question {index}", prompt=s["question"])


def _facts(r: Results) -> str:
    rates = [row["tokens_per_second"] for row in r["train"]]
    run = [
        ("Device", r["device"]),
        ("Date", r["date"]),
        ("Records of training", len(rates)),
        ("Time per step", duration(r["seconds_per_step"])),
        ("Time in all", duration(r["total_seconds"])),
    ]
    if rates:
        run.append(("Tokens per second, mean", f"{sum(rates) / len(rates):,.0f}"))
    settings = table(["Setting", "Value"], r["settings"].items(), "Settings")
    versions = table(["Package", "Version"], r["versions"].items(), "Versions")
    return table(["Run", "Value"], run, "The run") + settings + versions
