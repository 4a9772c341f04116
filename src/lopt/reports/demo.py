"""The page that `lopt demo` writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt.evaluation.statistics import wilson_interval
from lopt.files import write_text
from lopt.reports.page import Pane, figure, page, paragraph, side_by_side, table
from lopt.reports.plots import Points, bar_plot, line_plot


def result_sentence(results: Mapping[str, Any]) -> str:
    """The outcome of a demo run in one sentence, whichever way it went."""
    a, b = results["before"], results["after"]
    where = f"In {_duration(results['total_seconds'])} on this machine ({results['device']})"
    answers = "no held-out answers were checked"
    if a["total"] and b["total"]:
        old, new = (f"{r['correct']} of {r['total']}" for r in (a, b))
        answers = f"held-out exact answers {_went(old, new, _share(b) - _share(a))}"
    losses = a["retention_loss"], b["retention_loss"]
    kept = _went(f"{losses[0]:.2f}", f"{losses[1]:.2f}", losses[0] - losses[1])
    return f"{where}, {answers}, while loss on unrelated text {kept}."


def _share(side: Mapping[str, Any]) -> float:
    return float(side["correct"] / side["total"])


def _went(old: str, new: str, gain: float) -> str:
    if old == new and math.isfinite(gain):
        return f"stayed at {new}" if gain == 0 else f"stayed at about {new}"
    verb = "improved" if gain > 0 else "got worse," if gain < 0 else "went"
    return f"{verb} from {old} to {new}"


_METHODS = {
    "lopt": "The last block learns from the task loss; every earlier block learns from its local loss, the "
    "error of reconstructing its own input. No gradient crosses a boundary.",
    "e2e": "All blocks learn from the task loss, whose gradient runs through every layer.",
    "frozen": "The last block learns from the task loss; the earlier blocks are not trained.",
    "lora": "LoRA adapters learn from the task loss, whose gradient runs through every layer.",
}


def demo_page(results: Mapping[str, Any]) -> str:
    """The report of one demo run as a whole HTML page.

    Args:
        results: what `lopt demo` measured, as plain JSON values. `curve` and `head_warmup` may be missing
            or empty; losses are in nats per token, memory in bytes.

    Raises:
        KeyError: a required part is missing.
        ImportError: matplotlib is not installed.
    """
    r = results
    blocks = "1 block" if r["num_blocks"] == 1 else f"{r['num_blocks']} blocks"
    named = "; ".join(
        f"block {i} is {layers}".replace("-", "\u2011") for i, layers in enumerate(r["blocks"], start=1)
    )
    method = f"{_METHODS.get(r['method'], r['method'])} This run has {blocks}: {named}."
    sections = [
        ("", paragraph(result_sentence(r), "lede") + _caveat(r) + paragraph(method)),
        ("Adaptation and retention", _before_after(r)),
        ("Training", _figures(r)),
        ("Peak memory", _memory(r["memory"])),
        ("Sample answers", "".join(_sample(i, s) for i, s in enumerate(r["samples"], start=1))),
        ("Settings and versions", _facts(r)),
    ]
    return page(r["title"], sections, f"{r['model']} · {r['task']} · {r['method']}, {blocks} · {r['date']}")


def _caveat(r: Mapping[str, Any]) -> str:
    a, b = r["before"], r["after"]
    if not (a["total"] and b["total"]) or _share(a) == _share(b):
        return ""
    old, new = (wilson_interval(side["correct"], side["total"]) for side in (a, b))
    overlap = "The 95 % intervals overlap: these numbers do not settle whether the accuracy changed."
    return paragraph(overlap, "note") if old[0] <= new[1] and new[0] <= old[1] else ""


def _before_after(r: Mapping[str, Any]) -> str:
    sides = r["before"], r["after"]

    def row(name: str, values: Iterable[float], form: str, sign: int) -> list[str]:
        old, new = values
        gain = sign * (new - old)
        verdict = "better" if gain > 0 else "worse" if gain < 0 else ""
        change = f"{new - old:+{form}} {verdict}" if verdict else "same" if gain == 0 else "unknown"
        change = change.replace("%", " points")
        cells = (f"{old:{form}}", f"{new:{form}}", change)
        return [name, *(cell.replace("%", "\u00a0%").replace("-", "−") for cell in cells)]

    def interval(side: Mapping[str, Any]) -> str:
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


def _figures(r: Mapping[str, Any]) -> str:
    train, curve = r["train"], r.get("curve") or []
    held_out = {"task loss": _column(curve, "loss"), "retention loss": _column(curve, "retention_loss")}
    warmup, local = (
        _by_block(rows, "local_loss", r["blocks"]) for rows in (r.get("head_warmup") or [], train)
    )
    share = _by_block(train, "gradient_share", r["blocks"])
    learned, nats = "The error of each earlier block in reconstructing its own input.", "nats per token"
    heads = "Only the reconstruction heads learn here; the blocks stay as they are."
    both = "On held-out questions and on unrelated text; lower is better for both."
    plots = [
        _plot(
            {"task loss": _column(train, "loss")}, "Task loss in training", nats, "On the training batches."
        ),
        _plot(held_out, "Held out: task loss and retention loss", nats, both),
        _plot(warmup, "Local loss in the head warm-up", "mean squared error", heads, log_y=True),
        _plot(local, "Local loss in training", "mean squared error", learned, log_y=True),
        _plot(share, "Gradient share by block", "share", "Each block's part of the whole gradient."),
    ]
    return f'<div class="figures">\n{"".join(plots)}</div>'


def _column(rows: Sequence[Mapping[str, Any]], key: str, i: int | None = None) -> Points:
    values = [(row["step"], row[key] if i is None else row[key][i]) for row in rows]
    return [(step, value) for step, value in values if value is not None]


def _by_block(rows: Sequence[Mapping[str, Any]], key: str, blocks: Sequence[str]) -> dict[str, Points]:
    width = min((len(row[key]) for row in rows), default=0)
    return {f"block {i + 1} ({layers})": _column(rows, key, i) for i, layers in enumerate(blocks[:width])}


def _plot(series: Mapping[str, Points], title: str, y_label: str, caption: str, log_y: bool = False) -> str:
    """A captioned figure over steps; its alternative text tells where each line starts and ends."""
    series = {name: points for name, points in series.items() if points}
    ends = [(name, *points[0], *points[-1]) for name, points in series.items()]
    told = "; ".join(f"{n} from {y0:.3g} at step {x0} to {y1:.3g} at step {x1}" for n, x0, y0, x1, y1 in ends)
    if not series:
        return ""
    alt = f"{title}: {told}."
    svg = line_plot(series, title=title, x_label="step", y_label=y_label, alt=alt, log_y=log_y)
    return figure(svg, caption)


def _memory(memory: Mapping[str, float]) -> str:
    told = "; ".join(f"{name} {_size(value)}" for name, value in memory.items())
    names, sizes = list(memory), {"bytes": list(memory.values())}
    title = "Memory by category at the peak"
    svg = bar_plot(names, sizes, title=title, value=_size, alt=f"{title}: {told}.")
    return figure(svg, f"Together {_size(sum(memory.values()))}.")


def _sample(number: int, s: Mapping[str, Any]) -> str:
    panes = [Pane("Reference", s["reference"])]
    panes += [Pane(key.title(), s[key], bool(s[f"{key}_correct"])) for key in ("before", "after")]
    return side_by_side(panes, heading=f"Question {number}", prompt=s["question"])


def _facts(r: Mapping[str, Any]) -> str:
    rates = [row["tokens_per_second"] for row in r["train"]]
    run = [("Device", r["device"]), ("Date", r["date"]), ("Records of training", len(rates))]
    run += [
        ("Time per step", _duration(r["seconds_per_step"])),
        ("Time in all", _duration(r["total_seconds"])),
    ]
    if rates:
        run.append(("Tokens per second, mean", f"{sum(rates) / len(rates):,.0f}"))
    settings = table(["Setting", "Value"], r["settings"].items(), "Settings")
    versions = table(["Package", "Version"], r["versions"].items(), "Versions")
    return table(["Run", "Value"], run, "The run") + settings + versions


def _size(count: float) -> str:
    power = sum(count >= 1024**p for p in (1, 2, 3))
    value = count / 1024**power
    digits = 0 if power == 0 or value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"


def _duration(seconds: float) -> str:
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def write_demo_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write `demo_page(results)` to `folder/report.html` and return that path."""
    path = folder / "report.html"
    write_text(path, demo_page(results))
    return path
