"""A page of several training runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import mean

from lopt.evaluation.retention_callback import CHANGE
from lopt.files import write_text
from lopt.instruments.memory import format_bytes
from lopt.reports.page import figures, page, paragraph, table
from lopt.reports.run_data import OUTCOMES, PAGE, RunData
from lopt.reports.run_plots import cost_plots, learning_plots
from lopt.reports.text import number, setting_text

_PLACES = ("output_dir", "run_name", "config", "overwrite_output_dir")


def write_runs_page(folder: Path, runs: Sequence[RunData]) -> Path:
    """Write the page of several runs; returns its path."""
    path = folder / PAGE
    write_text(path, runs_page(runs))
    return path


def runs_page(runs: Sequence[RunData]) -> str:
    """Return a page with several runs side by side."""
    figures_of = {name: show for name, show in _figures().items() if any(show(run) for run in runs)}
    rows = [[run.name, *(show(run) or "–" for show in figures_of.values())] for run in runs]
    numeric = range(1, len(figures_of) + 1)
    results = table(["Run", *figures_of], rows, "As they were last measured.", numeric=numeric)
    differing = _differing(runs)
    settings = table(["Flag", *(run.name for run in runs)], differing, "Flags in which they differ.")
    sections = [
        ("", results),
        ("Learning", figures(learning_plots(runs))),
        ("Speed and memory", figures(cost_plots(runs))),
        ("Settings", settings if differing else paragraph("They have the same settings.")),
    ]
    return page(f"{len(runs)} runs, side by side", sections)


def _figures() -> dict[str, Callable[[RunData], str]]:
    """Return what is told of every run, by its heading: "" where a run has no such figure."""

    def last(key: str, show: Callable[[float], str]) -> Callable[[RunData], str]:
        return lambda run: show(points[-1][1]) if (points := run.points(key)) else ""

    def speed(run: RunData) -> str:
        values = [value for _, value in run.points("tokens_per_second")]
        return f"{mean(values):,.0f}" if values else ""

    return {
        "Steps": lambda run: f"{run.steps:,}",
        **{name.capitalize(): last(key, "{:.4g}".format) for key, name in OUTCOMES.items()},
        "Loss elsewhere": last(CHANGE, lambda change: number(change, "+.4f")),
        "Tokens/s": speed,
        "Peak memory": last("peak_memory_gib", lambda gib: format_bytes(round(gib * 2**30))),
    }


def _differing(runs: Sequence[RunData]) -> list[list[str]]:
    every = [run.record.get("settings", {}) for run in runs]
    names: Iterable[str] = dict.fromkeys(
        name for settings in every for name in settings if name not in _PLACES
    )
    rows = [[name, *(setting_text(settings.get(name, "–")) for settings in every)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]
