"""The page of a comparison: what a person wants to see first, then every number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from lopt.evaluation.compare.summary import COSTS, estimate
from lopt.evaluation.statistics import Estimate
from lopt.files import write_text
from lopt.instruments.memory import format_bytes
from lopt.reports.page import figure, page, paragraph, table
from lopt.reports.plots import bar_plot, interval_plot, line_plot, scatter_plot

Results = Mapping[str, Any]


def write_page(results: Results, path: Path) -> Path:
    """Write the HTML page of what `Study.write` returns."""
    first, more = findings(results)
    opening = [paragraph(first, "lede"), *map(paragraph, more), paragraph(_intervals(results), "note")]
    sections = [
        ("", "".join(opening)),
        ("Adaptation against retention", _pareto(results)),
        ("All figures", _table(results)),
        ("Against other methods, paired by seed", _against(results)),
        ("Benchmark by benchmark", _items(results)),
        ("What it costs", _cost(results)),
        ("Training loss", _curves(results)),
        ("Drift", _drift(results)),
        ("How this was made", _setting(results)),
    ]
    cells = results["cells"]
    dates = sorted({cell["date"] for cell in cells})
    when = dates[0] if len(set(dates)) < 2 else f"{dates[0]} to {dates[-1]}"
    below = f"{results['setting']['model']}, {cells[0]['device']}, {when}"
    title = f"{len(results['arms'])} ways to train, side by side"
    write_text(path, page(title, [s for s in sections if s[1]], below))
    return path


def findings(results: Results) -> tuple[str, list[str]]:
    """Who adapted best and who forgot least, and a sentence on each difference beyond the noise."""
    summary = results["summary"]
    first = [_best(summary, "loss", "had the lowest held-out task loss", min)]
    if "forgetting" in summary["measures"]:
        first.append(_best(summary, "forgetting", "forgot least (rise of the losses elsewhere)", min))
    elif "retained" in summary["measures"]:
        first.append(_best(summary, "retained", "kept most (change of the scores elsewhere)", max))
    # In words against the first arm of each method; the tables have the others.
    firsts = {reference.split()[0]: reference for reference in reversed(summary["against"])}
    more = [_beyond(summary["measures"], r, a) for r, a in summary["against"].items() if r in firsts.values()]
    if summary["failed"]:
        more.append(f"Ended in a number that is not finite: {', '.join(summary['failed'])}.")
    return " ".join(filter(None, first)), list(filter(None, more))


def _best(summary: Results, key: str, what: str, pick: Any) -> str:
    values = {n: f[key]["value"] for n, f in summary["arms"].items() if f[key]["value"] is not None}
    if not values:
        return ""
    name = pick(values, key=values.__getitem__)
    return f"{name} {what}: {_written(summary['arms'][name][key])}."


def _beyond(measures: Results, reference: str, arms: Results) -> str:
    """What differs from `reference` by more than the seeds do."""
    told = []
    for key, words in (
        ("loss", "task loss"),
        ("forgetting", "losses elsewhere"),
        ("retained", "scores elsewhere"),
    ):
        if key not in measures:
            continue
        lower = measures[key]["higher_is_better"] is False
        sides: dict[str, list[str]] = {"better": [], "worse": []}
        for name, figures in arms.items():
            value, low, high = (figures[key][end] for end in ("value", "low", "high"))
            if low is not None and not low <= 0 <= high:
                sides["better" if (value < 0) == lower else "worse"].append(name)
        found = [f"{side} with {', '.join(names)}" for side, names in sides.items() if names]
        told += [f"{words} {' and '.join(found)}"] * bool(found)
    return f"Beyond the seeds' noise, compared with {reference}: {'; '.join(told)}." if told else ""


def _intervals(results: Results) -> str:
    count = len(results["seeds"])
    if count < 2:
        return "One seed: there are no intervals, and differences may be noise."
    return (
        f"± is half of a 95 % Student-t interval over {count} seeds, which draw the order of the rows and "
        "the heads; it does not hold the noise of a benchmark's few items, which is further down. All arms "
        "saw the same rows in the same order for the same number of steps."
    )


def _written(figures: Mapping[str, Any], digits: int = 3) -> str:
    if figures["value"] is None:
        return "–"
    digits = digits if abs(figures["value"]) < 10 else 1
    text = f"{figures['value']:.{digits}f}"
    if figures["low"] is None:
        return text
    return f"{text}\u00a0±\u00a0{(figures['high'] - figures['low']) / 2:.{digits}f}"


def pareto(results: Results) -> list[str]:
    """Plots of adaptation against retention: by losses and by scores, as far as there are any."""
    summary = results["summary"]
    plots = []
    for key, label in (
        ("forgetting", "rise of the losses elsewhere, nats (lower is better)"),
        ("retained", "change of the scores elsewhere (higher is better)"),
    ):
        if key not in summary["measures"]:
            continue
        pairs = {n: (estimate(f["loss"]), estimate(f[key])) for n, f in summary["arms"].items()}
        points = {n: (x, y) for n, (x, y) in pairs.items() if x is not None and y is not None}
        told = "; ".join(f"{n}: task loss {x.value:.3f}, {key} {y.value:.3f}" for n, (x, y) in points.items())
        plots.append(
            scatter_plot(
                points,
                title="Adaptation against retention",
                x_label="held-out task loss, nats per token (lower is better)",
                y_label=label,
                alt=f"Adaptation against retention: {told}.",
            )
        )
    return plots


def _pareto(results: Results) -> str:
    figures = "".join(figure(svg, "Means over seeds with 95 % intervals.") for svg in pareto(results))
    return f'<div class="figures">{figures}</div>' if figures else ""


def _table(results: Results) -> str:
    """Every measure of every arm; one table per kind, or it would be too wide."""
    summary = results["summary"]
    tables = []
    for kind in ("adaptation", "retention", "drift"):
        keys = [key for key, measure in summary["measures"].items() if measure["kind"] == kind]
        if not keys:
            continue
        rows = [["the model as it comes", *(_base(summary["measures"][key]) for key in keys)]]
        for name, figures in summary["arms"].items():
            rows.append([name, *(_written(figures[key], 5 if key == "weights" else 3) for key in keys)])
        labels = [summary["measures"][key]["label"] for key in keys]
        numeric = range(1, len(keys) + 1)
        tables.append(table(["", *labels], rows, f"{kind.capitalize()}, mean over seeds.", numeric=numeric))
    return "".join(tables)


def _base(measure: Mapping[str, Any]) -> str:
    return "–" if measure["base"] is None else f"{measure['base']:.3f}"


def _against(results: Results) -> str:
    summary, parts = results["summary"], []
    keys = [k for k in ("loss", "token_accuracy", "forgetting", "retained") if k in summary["measures"]]
    for reference, arms in summary["against"].items():
        rows = [[name, *(_written(figures[key], 4) for key in keys)] for name, figures in arms.items()]
        labels = [summary["measures"][key]["label"] for key in keys]
        caption = f"Minus {reference} with the same seed."
        parts.append(table(["", *labels], rows, caption, numeric=range(1, len(keys) + 1)))
    return "".join(parts)


def _items(results: Results) -> str:
    """Differences to the base with intervals over items: losses and scores apart."""
    summary, parts = results["summary"], []
    count = {key: len(item["values"]) for key, item in results["base"]["items"].items()}
    for losses in (False, True):
        keys = [k for k, item in results["base"]["items"].items() if (item["metric"] == "loss") == losses]
        if not keys:
            continue
        series = {n: [Estimate(**found[key]) for key in keys] for n, found in summary["items"].items()}
        what = "loss, nats (left is better)" if losses else "score (right is better)"
        told = "; ".join(
            f"{name}: " + ", ".join(f"{k} {e.value:+.3f}" for k, e in zip(keys, row, strict=True))
            for name, row in series.items()
        )
        title = "Losses against the base" if losses else "Scores against the base"
        svg = interval_plot(
            keys, series, title=title, x_label=f"difference of the {what}", alt=f"{title}: {told}."
        )
        sizes = ", ".join(f"{key}: {count[key]}" for key in keys)
        caption = f"Every item against itself, averaged over seeds; 95 % intervals over items ({sizes})."
        parts.append(figure(svg, caption))
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def _cost(results: Results) -> str:
    costs: Mapping[str, Mapping[str, float]] = results["summary"]["cost"]
    names = list(costs)
    if not names:
        return ""
    plots = []
    for key, title, write in (
        ("peak_bytes", "Peak memory of training", lambda v: format_bytes(round(v))),
        ("seconds_per_step", "Seconds per optimizer step", "{:.2f}".format),
        ("flops_per_step", "Operations per optimizer step, 10¹²", lambda v: f"{v / 1e12:.3g}"),
    ):
        values = [costs[name][key] for name in names]
        told = "; ".join(f"{n} {write(v)}" for n, v in zip(names, values, strict=True))
        svg = bar_plot(names, {key: values}, title=title, value=write, alt=f"{title}: {told}.")
        plots.append(figure(svg))
    rows = [
        [
            name,
            f"{cost['trained_parameters']:,}",
            f"{cost['head_parameters']:,}",
            format_bytes(round(cost["peak_bytes"])),
            f"{cost['seconds_per_step']:.2f}",
            f"{cost['flops_per_step'] / 1e12:.3g} T",
        ]
        for name, cost in costs.items()
    ]
    head = f'<div class="figures">{"".join(plots)}</div>'
    caption = (
        "Medians over seeds. Memory counts weights, gradients, optimizer state and activations (live bytes "
        "on a CPU, the allocator's peak on a GPU). Seconds depend on what else the machine does, operations "
        "do not."
    )
    return head + table(["", *COSTS.values()], rows, caption, numeric=range(1, 6))


def _curves(results: Results) -> str:
    """Training loss by step, the mean over seeds."""
    series = {}
    for name in results["arms"]:
        curves = [c["curve"]["loss"] for c in results["cells"] if c["arm"] == name and "failed" not in c]
        if curves:
            series[name] = [(i, mean(step)) for i, step in enumerate(zip(*curves, strict=True), start=1)]
    told = "; ".join(f"{n} from {p[0][1]:.2f} to {p[-1][1]:.2f}" for n, p in series.items())
    svg = line_plot(
        series,
        title="Training loss",
        x_label="optimizer step",
        y_label="nats per token, mean over seeds",
        alt=f"Training loss: {told}.",
    )
    return figure(svg)


def _drift(results: Results) -> str:
    """How far hidden states are from the base model's, layer by layer."""
    series: dict[str, Any] = {}
    marks: dict[float, str] = {}
    for name in results["arms"]:
        cells = [c for c in results["cells"] if c["arm"] == name and "failed" not in c and c["drift"]]
        if not cells:
            continue
        layers = zip(*([layer["relative_l2"] for layer in c["drift"]["layers"]] for c in cells), strict=True)
        series[name] = [(i, mean(values)) for i, values in enumerate(layers)]
        marks |= {start: "" for start, _ in cells[0]["blocks"][1:]}
    if not series:
        return ""
    told = "; ".join(f"{n} {p[-1][1]:.3f} after the last layer" for n, p in series.items())
    svg = line_plot(
        series,
        title="Relative distance of hidden states to the base model's",
        x_label="after layer (0: the embedding)",
        y_label="relative L2 distance, mean over seeds",
        alt=f"Relative distance of hidden states: {told}.",
        marks=marks,
    )
    return figure(svg, "Dotted: where a block ends in one of the arms.")


def _setting(results: Results) -> str:
    setting = results["setting"]
    rows = [[key, _plain(value)] for key, value in setting.items()]
    versions = ", ".join(f"{k} {v}" for k, v in results["cells"][0]["versions"].items())
    rows.append(["seeds", ", ".join(map(str, results["seeds"]))])
    rows.append(["versions", versions])
    return table(["", "value"], rows, "What all arms share; `lopt compare` with these flags makes it again.")


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_plain(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return str(value)
