"""The page and the terminal table of `lopt compare`: findings first, then every number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from lopt.evaluation.compare.summary import COSTS
from lopt.files import write_text
from lopt.instruments.memory import format_bytes
from lopt.reports.compare_plots import estimate, pareto, reach, unit
from lopt.reports.lines import line_plot
from lopt.reports.page import figure, figures, page, paragraph, table
from lopt.reports.plots import bar_plot, interval_plot, standalone
from lopt.reports.text import columns, number, setting_text

Results = Mapping[str, Any]
"""What `lopt.evaluation.compare.study.Study.run` returns, or a part of it."""


ABOUT_REACH = "Layers below are frozen; where all learn it is end to end. Means over seeds."


def write_report(results: Results, folder: Path) -> Path:
    """Write `report.html`, `pareto.svg` and, where reaches differ, `reach.svg`; return the page's path."""
    finding, more = findings(results)
    opening = [
        paragraph(finding, "lede"),
        *map(paragraph, more),
        paragraph(_about_intervals(results), "note"),
    ]
    plots, reached = pareto(results), reach(results)
    caption = (
        "Means over seeds with 95 % intervals; joined are the learning rates of one method, lowest first."
    )
    sections = [
        ("", "".join(opening)),
        ("Adaptation against retention", figures(figure(svg, caption) for svg in plots)),
        ("Reach", figure(reached, ABOUT_REACH) if reached else ""),
        ("All figures", _all_figures(results)),
        ("Against other methods, paired by seed", _against(results)),
        ("Benchmark by benchmark", _by_benchmark(results)),
        ("What it costs", _cost(results)),
        ("Training loss", _training_loss(results)),
        ("Drift", _drift(results)),
        ("How this was made", _setting(results)),
    ]  # fmt: skip
    arm_runs = results["cells"]
    dates = sorted({run["date"] for run in arm_runs})
    when = dates[0] if len(dates) < 2 else f"{dates[0]} to {dates[-1]}"
    subtitle = f"{results['setting']['model']}, {arm_runs[0]['device']}, {when}"
    path = folder / "report.html"
    count = len(results["arms"])
    title = "One way to train" if count == 1 else f"{count} ways to train, side by side"
    write_text(path, page(title, sections, subtitle))
    for name, svg in (("pareto.svg", plots[0] if plots else None), ("reach.svg", reached)):
        if svg:
            write_text(folder / name, standalone(svg) + "\n")
    return path


def summary_table(results: Results) -> str:
    """Return the main figures of every arm as a table for a terminal."""
    summary = results["summary"]
    titles = {
        "loss": "task loss",
        "token_accuracy": "accuracy",
        "pair_accuracy": "accuracy",
        "forgetting": "forgetting",
        "retained": "scores kept",
        "drift": "drift",
    }
    keys = [key for key in titles if key in summary["measures"]]
    rows = [["", *(titles[key] for key in keys), "peak GiB", "s/step", "TFLOP"]]
    for name, measured in summary["arms"].items():
        cost = summary["cost"].get(name)
        costs = ["", "", ""] if cost is None else [
            f"{cost['peak_bytes'] / 2**30:.2f}",
            f"{cost['seconds_per_step']:.2f}",
            f"{cost['flops_per_step'] / 1e12:.2f}",
        ]  # fmt: skip
        rows.append([name, *(_with_interval(measured[key]) for key in keys), *costs])
    return columns(rows)


def findings(results: Results) -> tuple[str, list[str]]:
    """Return who adapted best and forgot least, and a statement on each difference beyond the noise."""
    summary = results["summary"]
    best = [_best(summary, "loss", "had the lowest held-out task loss", min)]
    if "forgetting" in summary["measures"]:
        best.append(_best(summary, "forgetting", "forgot least (rise of the losses elsewhere)", min))
    elif "retained" in summary["measures"]:
        best.append(_best(summary, "retained", "kept most (change of the scores elsewhere)", max))
    # Text compares with the first arm of each method only; the tables have the others.
    firsts = {reference.split()[0]: reference for reference in reversed(summary["against"])}
    more = [_beyond(summary["measures"], r, a) for r, a in summary["against"].items() if r in firsts.values()]
    if summary["failed"]:
        more.append(f"Ended in a number that is not finite, or diverged: {', '.join(summary['failed'])}.")
    return " ".join(filter(None, best)), list(filter(None, more))


def _best(summary: Results, key: str, what: str, pick: Any) -> str:
    values = {n: f[key]["value"] for n, f in summary["arms"].items() if f[key]["value"] is not None}
    if not values:
        return ""
    name = pick(values, key=values.__getitem__)
    return f"{name} {what}: {_with_interval(summary['arms'][name][key])}."


def _beyond(measures: Results, reference: str, arms: Results) -> str:
    """Return what differs from `reference` by more than the seeds do."""
    parts = []
    names = {"loss": "task loss", "forgetting": "losses elsewhere", "retained": "scores elsewhere"}
    for key in filter(measures.__contains__, names):
        lower = measures[key]["higher_is_better"] is False
        sides: dict[str, list[str]] = {"better": [], "worse": []}
        for arm, measured in arms.items():
            value, low, high = (measured[key][end] for end in ("value", "low", "high"))
            if low is not None and not low <= 0 <= high:
                sides["better" if (value < 0) == lower else "worse"].append(arm)
        found = [f"{side} with {', '.join(arms_)}" for side, arms_ in sides.items() if arms_]
        if found:
            parts.append(f"{names[key]} {' and '.join(found)}")
    return f"Beyond the seeds' noise, compared with {reference}: {'; '.join(parts)}." if parts else ""


def _about_intervals(results: Results) -> str:
    count = len(results["seeds"])
    if count < 2:
        return "One seed: there are no intervals, and differences may be noise."
    return (
        f"± is half of a 95 % Student-t interval over {count} seeds, which draw the order of the rows and "
        "the heads; it does not contain the noise of a benchmark's few items, which is shown further down. "
        "All arms saw the same rows in the same order for the same number of steps."
    )


def _with_interval(measured: Results, digits: int = 3) -> str:
    """Return a mean over seeds as "0.807 ± 0.012"."""
    if measured["value"] is None:
        return "–"
    digits = digits if abs(measured["value"]) < 10 else 1
    text = number(measured["value"], f".{digits}f")
    if measured["low"] is None:
        return text
    return f"{text}\u00a0±\u00a0{(measured['high'] - measured['low']) / 2:.{digits}f}"


def _arms_table(
    results: Results,
    measured: Mapping[str, Results],
    keys: list[str],
    caption: str,
    digits: Callable[[str], int],
    first: Iterable[list[str]] = (),
) -> str:
    """Return a table of arms × measures."""
    labels = [results["summary"]["measures"][key]["label"] for key in keys]
    rows = [[name, *(_with_interval(m[key], digits(key)) for key in keys)] for name, m in measured.items()]
    return table(["", *labels], [*first, *rows], caption, numeric=range(1, len(keys) + 1))


def _all_figures(results: Results) -> str:
    """Return every measure of every arm, in one table per kind: one table would be too wide."""
    measures, parts = results["summary"]["measures"], []
    for kind in ("adaptation", "retention", "drift"):
        keys = [key for key, measure in measures.items() if measure["kind"] == kind]
        if keys:
            base = [_with_interval({"value": measures[key]["base"], "low": None}) for key in keys]
            parts.append(
                _arms_table(
                    results,
                    results["summary"]["arms"],
                    keys,
                    f"{kind.capitalize()}, mean over seeds.",
                    lambda key: 5 if key == "weights" else 3,
                    [["base model", *base]],
                )
            )
    return "".join(parts)


def _against(results: Results) -> str:
    summary = results["summary"]
    keys = [
        k
        for k in ("loss", "token_accuracy", "pair_accuracy", "forgetting", "retained")
        if k in summary["measures"]
    ]
    return "".join(
        _arms_table(results, arms, keys, f"Minus {reference} with the same seed.", lambda _: 4)
        for reference, arms in summary["against"].items()
    )


def _by_benchmark(results: Results) -> str:
    """Return plots of differences to the base with intervals over items: losses and scores apart."""
    items, found = results["base"]["items"], results["summary"]["items"]
    parts = []
    for title, losses, label in (
        ("Scores against the base", False, "difference of the score (right is better)"),
        ("Losses against the base", True, "difference of the loss, nats (left is better)"),
    ):
        keys = [key for key, item in items.items() if (item["metric"] == "loss") == losses]
        if keys:
            series = {name: [estimate(own[key]) for key in keys] for name, own in found.items()}
            sizes = ", ".join(f"{key}: {len(items[key]['values'])}" for key in keys)
            caption = f"Every item against itself, averaged over seeds; 95 % intervals over items ({sizes})."
            parts.append(figure(interval_plot(keys, series, title=title, x_label=label), caption))
    return figures(parts)


def _cost(results: Results) -> str:
    costs: Mapping[str, Mapping[str, float]] = results["summary"]["cost"]
    if not costs:
        return ""
    write: dict[str, Callable[[float], str]] = {
        "trained_parameters": "{:,}".format,
        "head_parameters": "{:,}".format,
        "peak_bytes": lambda value: format_bytes(round(value)),
        "seconds_per_step": "{:.2f}".format,
        "flops_per_step": lambda value: f"{number(value / 1e12)} T",
    }
    plots = [
        bar_plot(list(costs), {key: [cost[key] for cost in costs.values()]}, title=title, value=write[key])
        for key, title in (
            ("peak_bytes", "Peak memory of training"),
            ("seconds_per_step", "Seconds per optimizer step"),
            ("flops_per_step", "Operations per optimizer step"),
        )
    ]
    rows = [[name, *(write[key](cost[key]) for key in COSTS)] for name, cost in costs.items()]
    caption = (
        "Medians over seeds. Memory counts weights, gradients, optimizer state and activations (live bytes "
        "on a CPU, the allocator's peak on a GPU). Seconds depend on what else the machine does, operations "
        "do not."
    )
    return figures(map(figure, plots)) + table(["", *COSTS.values()], rows, caption, numeric=range(1, 6))


def _by_arm(results: Results, values: Callable[[Results], list[float]]) -> dict[str, list[list[float]]]:
    """Return one list of `values` per seed of every arm that has any; arm runs that failed have none."""
    whole = [run for run in results["cells"] if "failed" not in run]
    found = {name: [values(run) for run in whole if run["arm"] == name] for name in results["arms"]}
    return {name: lists for name, lists in found.items() if lists and lists[0]}


def _means(lists: list[list[float]], start: int) -> list[tuple[float, float]]:
    return [(i, mean(values)) for i, values in enumerate(zip(*lists, strict=True), start=start)]


def _training_loss(results: Results) -> str:
    series = {n: _means(lists, 1) for n, lists in _by_arm(results, lambda run: run["curve"]["loss"]).items()}
    label = f"{unit(results)}, mean over seeds"
    return figure(line_plot(series, title="Training loss", x_label="optimizer step", y_label=label))


def _drift(results: Results) -> str:
    """Return a plot of how far hidden states are from the base model's, layer by layer."""

    def distances(run: Results) -> list[float]:
        return [layer["relative_l2"] for layer in run["drift"]["layers"]] if run["drift"] else []

    series = {name: _means(lists, 0) for name, lists in _by_arm(results, distances).items()}
    if not series:
        return ""
    starts = {start for run in results["cells"] for start, _ in run.get("blocks", ())[1:]}
    svg = line_plot(
        series,
        title="Relative distance of hidden states to the base model's",
        x_label="after layer (0: the embedding)",
        place="after layer",
        y_label="relative L2 distance, mean over seeds",
        marks=dict.fromkeys(sorted(starts), ""),
    )
    return figure(svg, "Dotted: where a block ends in one of the arms.")


def _setting(results: Results) -> str:
    rows = [[key, setting_text(value, "")] for key, value in results["setting"].items()]
    rows.append(["seeds", setting_text(results["seeds"], "")])
    rows.append(["versions", setting_text(results["cells"][0]["versions"], "")])
    return table(["", "value"], rows, "What all arms share; `lopt compare` with these flags makes it again.")
