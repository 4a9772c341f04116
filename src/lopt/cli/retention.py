"""From the retention flags of a training command to its callback and to the curves in its output folder."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from lopt.cli.arguments import RetentionArguments
from lopt.core.config import LoPTConfig
from lopt.evaluation.retention_callback import (
    CHANGE,
    PREFIX,
    TASKS_CHANGE,
    RetentionCallback,
    check_whole_model,
)
from lopt.evaluation.texts import read_texts
from lopt.files import write_text
from lopt.reports.page import figure, page, paragraph, table
from lopt.reports.plots import line_plot, standalone

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Retention:
    """Flags that were checked, and the texts they name."""

    args: RetentionArguments
    texts: dict[str, str]

    def callback(self, trainer: Any) -> RetentionCallback:
        """The callback for `trainer`."""
        return RetentionCallback(
            trainer,
            self.texts,
            tokens=self.args.retention_tokens,
            tasks=self.args.retention_tasks or (),
            data_dir=self.args.retention_data_dir,
            limit=self.args.retention_limit,
            every=self.args.retention_every,
            max_forgetting=self.args.max_forgetting,
        )


def check_retention(
    retention: RetentionArguments, config: LoPTConfig, args: TrainingArguments
) -> Retention | None:
    """Read texts and check benchmarks before any work; None if nothing is to be measured.

    Raises:
        ValueError: a text or a benchmark that is not there, a value out of range, flags without effect.
        ImportError: lm-evaluation-harness or matplotlib is missing.
    """
    r = retention
    numbers = (("--retention_tokens", r.retention_tokens, 2), ("--retention_limit", r.retention_limit, 1))
    for flag, value, least in (*numbers, ("--retention_every", r.retention_every, 1)):
        if value is not None and value < least:
            raise ValueError(f"{flag} {value} is not possible: use {least} or more")
    budget = r.max_forgetting
    if budget is not None and not (math.isfinite(budget) and budget >= 0):
        raise ValueError(f"--max_forgetting {budget} is not possible: use a finite number >= 0")
    if budget is not None and not r.retention_text:
        raise ValueError("--max_forgetting is in nats per token of text: add --retention_text")
    if r.retention_data_dir is not None and not r.retention_tasks:
        raise ValueError("--retention_data_dir holds rows for benchmarks: add --retention_tasks")
    if not r.retention_text and not r.retention_tasks:
        if r.retention_every is not None:
            raise ValueError("--retention_every: add --retention_text or --retention_tasks")
        return None
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the retention curve needs matplotlib: pip install "lopt[eval]"')
    if r.retention_tasks:
        from lopt.evaluation.harness import check_tasks

        check_whole_model(config.offload == "block", args)
        try:
            check_tasks(r.retention_tasks, r.retention_data_dir)
        except ValueError as error:  # it knows the flags of lopt eval
            named = re.sub("--(tasks|data_dir)", r"--retention_\1", str(error))
            raise ValueError(named) from error
    return Retention(r, read_texts(r.retention_text or [], r.retention_tokens, "--retention_text"))


def write_curves(history: Sequence[Row], folder: Path, stopped: str | None = None) -> str:
    """Write `retention.svg` and `retention.html` of a run's log; returns a sentence on how it ended.

    Args:
        stopped: why the run ended early, if it did.
    """
    rows = [row for row in history if any(key.startswith(PREFIX) for key in row)]
    keys = list(dict.fromkeys(key for row in rows for key in row if key.startswith(PREFIX)))
    measures = [key for key in keys if key not in (CHANGE, TASKS_CHANGE)]
    text = [key for key in measures if key.endswith("_loss")]
    tasks = [key for key in measures if key not in text]
    figures = []
    for chosen, title, label in (
        (text, "Loss on retention text since the start", "nats per token, higher is worse"),
        (tasks, "Benchmark scores since the start", "share of items"),
    ):
        if chosen:
            figures.append(_curve(rows, chosen, title, label))
    write_text(folder / "retention.svg", standalone(figures[0]) + "\n")
    numbers = []
    for key in measures:
        values = [row[key] for row in rows if key in row]
        ends = (f"{values[0]:.4f}", f"{values[-1]:.4f}", f"{values[-1] - values[0]:+.4f}".replace("-", "−"))
        numbers.append([key.removeprefix(PREFIX), *ends])
    caption = "Losses are in nats per token, on the beginning of each text; scores are shares of items."
    told = stopped or _ending(rows)
    shown = '<div class="figures">\n' + "".join(figure(svg) for svg in figures) + "</div>"
    sections = [
        ("", paragraph(told, "lede")),
        ("In the course of the run", shown),
        ("Start and end", table(["Measure", "Start", "End", "Change"], numbers, caption, numeric=(1, 2, 3))),
    ]
    write_text(folder / "retention.html", page("Retention in training", sections))
    return f"{told} The curve is {folder / 'retention.html'}"


def _curve(rows: Sequence[Row], keys: Sequence[str], title: str, label: str) -> str:
    series = {}
    for key in keys:
        points = [(row["step"], row[key]) for row in rows if key in row]
        name = key.removeprefix(PREFIX)
        series[name.removesuffix("_loss")] = [(step, value - points[0][1]) for step, value in points]
    if len(keys) > 1 and keys[0].endswith("_loss"):
        series["mean"] = [(row["step"], row[CHANGE]) for row in rows if CHANGE in row]
    told = "; ".join(
        f"{name} {points[-1][1]:+.3g} at step {points[-1][0]}" for name, points in series.items()
    )
    return line_plot(series, title=title, x_label="step", y_label=label, alt=f"{title}: {told}.")


def _ending(rows: Sequence[Row]) -> str:
    last = rows[-1]
    parts = []
    if CHANGE in last:
        word = "risen" if last[CHANGE] > 0 else "fallen" if last[CHANGE] < 0 else "changed"
        parts.append(f"the loss on retention text has {word} by {abs(last[CHANGE]):.4f} nats per token")
    if TASKS_CHANGE in last:
        points = 100 * last[TASKS_CHANGE]
        parts.append(f"benchmark scores have changed by {points:+.1f} points".replace("-", "−"))
    return f"By step {last['step']} {' and '.join(parts)}."
