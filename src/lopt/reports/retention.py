"""The curves of retention in the course of a run: `retention.html` and `retention.svg`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lopt.evaluation.retention_callback import CHANGE, PREFIX, TASKS_CHANGE
from lopt.files import write_text
from lopt.reports.lines import line_plot
from lopt.reports.page import figure, figures, page, paragraph, table
from lopt.reports.plots import standalone
from lopt.reports.text import number

Row = Mapping[str, Any]
"""A row of a trainer's log."""


def write_curves(history: Sequence[Row], folder: Path, stopped: str | None = None) -> str:
    """Write both files; returns the outcome of the run and where its curves are, in words.

    Args:
        history: the trainer's log.
        stopped: why the run ended early, if it did.
    """
    rows = [row for row in history if any(key.startswith(PREFIX) for key in row)]
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith(PREFIX))
    measures = [key for key in keys if key not in (CHANGE, TASKS_CHANGE)]
    texts = [key for key in measures if key.endswith("_loss")]
    tasks = [key for key in measures if key not in texts]
    plots = [
        _plot(rows, shown, title, label)
        for shown, title, label in (
            (texts, "Loss on retention text since the start", "nats per token, higher is worse"),
            (tasks, "Benchmark scores since the start", "share of items"),
        )
        if shown
    ]
    write_text(folder / "retention.svg", standalone(plots[0]) + "\n")
    numbers = []
    for key in measures:
        values = [row[key] for row in rows if key in row]
        first, last = values[0], values[-1]
        ends = number(first, ".4f"), number(last, ".4f"), number(last - first, "+.4f")
        numbers.append([key.removeprefix(PREFIX), *ends])
    caption = "Losses are in nats per token, on the beginning of each text; scores are shares of items."
    outcome = stopped or _outcome(rows[-1])
    sections = [
        ("", paragraph(outcome, "lede")),
        ("In the course of the run", figures(map(figure, plots))),
        ("Start and end", table(["Measure", "Start", "End", "Change"], numbers, caption, numeric=(1, 2, 3))),
    ]
    write_text(folder / "retention.html", page("Retention in training", sections))
    return f"{outcome} The curve is {folder / 'retention.html'}"


def _plot(rows: Sequence[Row], keys: Sequence[str], title: str, label: str) -> str:
    series = {}
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if key in row]
        name = key.removeprefix(PREFIX).removesuffix("_loss")
        series[name] = [(step, value - points[0][1]) for step, value in points]
    if len(keys) > 1 and keys[0].endswith("_loss"):
        series["mean"] = [(row["step"], row[CHANGE]) for row in rows if CHANGE in row]
    return line_plot(series, title=title, x_label="step", y_label=label)


def _outcome(last: Row) -> str:
    parts = []
    if CHANGE in last:
        verb = "risen" if last[CHANGE] > 0 else "fallen" if last[CHANGE] < 0 else "changed"
        parts.append(f"the loss on retention text has {verb} by {abs(last[CHANGE]):.4f} nats per token")
    if TASKS_CHANGE in last:
        change = number(100 * last[TASKS_CHANGE], "+.1f")
        parts.append(f"benchmark scores have changed by {change} points")
    return f"By step {last['step']} {' and '.join(parts)}."
