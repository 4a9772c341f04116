"""The page and the terminal summary of `lopt demo`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
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
    """Return the report of a demo as a whole HTML page.

    Args:
        results: plain JSON values, of one method or several (`arms`). An arm's `curve` and `head_warmup` may
            be missing or empty; losses are in nats per token, memory in bytes.

    Raises:
        KeyError: a required part is missing.
        ImportError: matplotlib is not installed.
    """
    r, arms = results, results["arms"]
    methods = "".join(paragraph(f"{arm['name']}: {_described(arm)}") for arm in arms)
    sections = [
        ("", paragraph(outcome(r), "lede") + _caveats(r)),
        ("Adaptation and retention", _side_by_side(r)),
        ("Methods", methods),
        ("Training", _curves(arms)),
        ("Peak memory", _memory(arms)),
        ("Sample answers", "".join(_sample(i, s) for i, s in enumerate(r["samples"], start=1))),
        ("Settings and versions", _facts(r)),
    ]
    return page(r["title"], sections, f"{r['model']} · {r['task']} · {_names(arms)} · {r['date']}")


def summary(results: Results) -> str:
    """Return sample answers and the main figures as text for a terminal."""
    lines = []
    for sample in results["samples"]:
        width = 1 + max(len(answer["by"]) for answer in sample["answers"])
        lines += ["", sample["question"]]
        lines += [f"  {a['by'] + ':':{width}} {_one_line(a['text'])}" for a in sample["answers"]]
    return "\n".join([*lines, "", columns([["", "before", *_heads(results)], *_rows(results)])])


def _heads(results: Results) -> list[str]:
    return [arm["name"] for arm in results["arms"]]


def _rows(results: Results) -> list[list[str]]:
    """Return the figures, a column for the base model and for each method."""
    before, arms = results["before"], results["arms"]
    sides = [before, *(arm["after"] for arm in arms)]
    kept = [side["retention_loss"] for side in sides]
    memory = [sum(arm["memory"].values()) for arm in arms]
    rows = [
        ["held-out exact answers", *(f"{side['correct']}/{side['total']}" for side in sides)],
        ["95 % interval", *map(_interval, sides)],
        ["held-out loss", *(number(side["loss"], ".3f") for side in sides)],
        ["loss on unrelated text", *(number(loss, ".3f") for loss in kept)],
        ["forgotten: its rise", "", *(number(loss - kept[0], "+.3f") for loss in kept[1:])],
        ["seconds per step (median)", "", *(number(arm["seconds_per_step"], ".2f") for arm in arms)],
    ]
    if any(memory):
        rows.append(["peak of live bytes", "", *map(format_bytes, memory)])
    return rows


def _interval(side: Results) -> str:
    low, high = wilson_interval(side["correct"], side["total"]) if side["total"] else (0.0, 1.0)
    return f"{100 * low:.0f}–{100 * high:.0f}\u00a0%"


def _names(arms: Sequence[Results]) -> str:
    return ", ".join(arm["name"] for arm in arms)


def _described(arm: Results) -> str:
    count = "1 block" if len(arm["blocks"]) == 1 else f"{len(arm['blocks'])} blocks"
    named = "; ".join(
        f"block {i} is {layers}".replace("-", "\u2011") for i, layers in enumerate(arm["blocks"], start=1)
    )
    return f"{_METHODS.get(arm['method'], arm['method'])} {count}: {named}."


def _one_line(text: str) -> str:
    line = clean(" | ".join(text.splitlines()))  # generated text must not send commands to a terminal
    return line if len(line) <= 100 else line[:97] + "..."


def outcome(results: Results) -> str:
    """Return the outcome of a demo in one sentence, for better or worse."""
    before, arms = results["before"], results["arms"]
    where = f"In {duration(results['total_seconds'])} on this machine ({results['device']})"
    answers = "no held-out answers were checked"
    if before["total"]:
        found = [(f"{arm['after']['correct']} of {before['total']}", arm["name"]) for arm in arms]
        answers = (
            f"held-out exact answers went from {before['correct']} of {before['total']} to {_list(found)}"
        )
    losses = [(f"{arm['after']['retention_loss']:.2f}", arm["name"]) for arm in arms]
    start = f"{before['retention_loss']:.2f}"
    return f"{where}, {answers}, and the loss on unrelated text from {start} to {_list(losses)}."


def _list(found: Sequence[tuple[str, str]]) -> str:
    named = [f"{value} ({name})" for value, name in found]
    return named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"


def _caveats(r: Results) -> str:
    """Say which accuracies are too close to be told apart."""
    arms, total = r["arms"], r["before"]["total"]
    if not total:
        return ""
    unsettled = [arm["name"] for arm in arms if _close(r["before"], arm["after"])]
    pairs = [
        f"{a['name']} and {b['name']}"
        for a, b in itertools.combinations(arms, 2)
        if _close(a["after"], b["after"])
    ]
    notes = ""
    if unsettled:
        notes += f"Whether {_either(unsettled)} changed the accuracy is not settled. "
    if pairs:
        notes += f"Which of {'; of '.join(pairs)} answers more is not settled. "
    if not notes:
        return ""
    return paragraph(f"{notes}The 95 % intervals of {total} answers overlap.", "note")


def _either(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _close(a: Results, b: Results) -> bool:
    (low, high), (start, stop) = (wilson_interval(side["correct"], side["total"]) for side in (a, b))
    return low <= stop and start <= high


def _side_by_side(r: Results) -> str:
    caption = (
        "Adaptation is the gain on the task, here on questions held out from training. Retention is what is "
        "kept elsewhere, here the loss on Python's documentation. Losses: nats per token. Intervals: "
        "Wilson's. All methods start from the same weights and see the same problems in the same order."
    )
    heads = ["", "before", *_heads(r)]
    return table(heads, _rows(r), caption, numeric=range(1, len(heads)))


def _curves(arms: Sequence[Results]) -> str:
    nats, squares = "nats per token", "mean squared error"
    plots: list[tuple[dict[str, Points], str, str, str]] = [
        (
            *({arm["name"]: _column(arm["train"], "loss") for arm in arms}, "Task loss in training", nats),
            "On the training batches.",
        )
    ]
    for key, title, caption in (
        ("loss", "Held out: task loss", "On held-out questions; lower is better."),
        ("retention_loss", "Retention loss", "On unrelated text; lower is better."),
    ):
        series = {arm["name"]: _column(arm.get("curve") or [], key) for arm in arms}
        plots.append((series, title, nats, caption))
    for arm in arms:
        of = "" if len(arms) == 1 else f", {arm['name']}"
        blocks = arm["blocks"]
        warmup = _by_block(arm.get("head_warmup") or [], "local_loss", blocks)
        local = _by_block(arm["train"], "local_loss", blocks)
        plots += [
            (
                *(warmup, f"Local loss in the head warm-up{of}", squares),
                "Only the reconstruction heads learn here; the blocks stay as they are.",
            ),
            (
                *(local, f"Local loss in training{of}", squares),
                "The error of each earlier block in reconstructing its own input.",
            ),
        ]
        if local:
            share = _by_block(arm["train"], "gradient_share", blocks)
            plots.append(
                (share, f"Gradient share by block{of}", "share", "Each block's part of the gradient.")
            )
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


def _memory(arms: Sequence[Results]) -> str:
    kinds = list(dict.fromkeys(kind for arm in arms for kind, size in arm["memory"].items() if size))
    if not kinds:
        return ""
    sizes = {kind: [arm["memory"].get(kind, 0) for arm in arms] for kind in kinds}
    title = "Memory by category at the peak"
    names = [arm["name"] for arm in arms]
    svg = bar_plot(names, sizes, title=title, stacked=True, value=lambda size: format_bytes(round(size)))
    return figure(svg, "Live bytes of tensors during an optimizer step.")


def _sample(index: int, s: Results) -> str:
    panes = [Pane("Reference", s["reference"])]
    panes += [Pane(answer["by"], answer["text"], bool(answer["correct"])) for answer in s["answers"]]
    return side_by_side(panes, heading=f"Question {index}", prompt=s["question"])


def _facts(r: Results) -> str:
    run = [("Device", r["device"]), ("Date", r["date"]), ("Time in all", duration(r["total_seconds"]))]
    for arm in r["arms"]:
        rates = [row["tokens_per_second"] for row in arm["train"]]
        if rates:
            run.append((f"Tokens per second, mean, {arm['name']}", f"{sum(rates) / len(rates):,.0f}"))
    settings = table(["Setting", "Value"], r["settings"].items(), "Settings")
    own = [
        (f"{arm['name']}: {key}", value)
        for arm in r["arms"]
        for key, value in (arm.get("config") or {}).items()
    ]
    methods = table(["Setting", "Value"], own, "Settings of the methods that are no defaults") if own else ""
    versions = table(["Package", "Version"], r["versions"].items(), "Versions")
    return table(["Run", "Value"], run, "The run") + settings + methods + versions
