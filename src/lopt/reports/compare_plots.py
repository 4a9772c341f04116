"""Plots of `lopt compare` over several arms: adaptation against retention, and what a reach brings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lopt.evaluation.statistics import Estimate
from lopt.reports.lines import Points, line_plot
from lopt.reports.plots import scatter_plot

Results = Mapping[str, Any]
RETENTION = {
    "forgetting": "rise of the losses elsewhere, nats (lower is better)",
    "retained": "change of the scores elsewhere (higher is better)",
}


def pareto(results: Results) -> list[str]:
    """Return plots of adaptation against retention: by losses and by scores, as far as there are any.

    Arms that differ in nothing but the learning rate are one series, joined from the lowest rate on.
    """
    summary = results["summary"]
    x_label = f"held-out task loss, {unit(results)} (lower is better)"
    plots = []
    for key, y_label in RETENTION.items():
        if key not in summary["measures"]:
            continue
        points: dict[str, list[tuple[Estimate, Estimate]]] = {}
        for series, names in _over_rates(results).items():
            measured = [(summary["arms"][name]["loss"], summary["arms"][name][key]) for name in names]
            found = [(x, y) for x, y in measured if None not in (x["value"], y["value"])]
            if found:
                points[series] = [(estimate(x), estimate(y)) for x, y in found]
        plots.append(
            scatter_plot(points, title="Adaptation against retention", x_label=x_label, y_label=y_label)
        )
    return plots


def reach(results: Results) -> list[str]:
    """Return plots of the task and of retention over the layers that the task gradient passes.

    The arms are those whose layers below are frozen, and end to end, with the study's own settings; there is
    no plot if there are fewer than three.
    """
    summary = results["summary"]
    layers = {
        run["arm"]: run["blocks"][-1][1] - run["blocks"][-1][0]
        for run in results["cells"]
        if "failed" not in run and not run["changes"] and _is_plain(run["config"])
    }
    if len(set(layers.values())) < 3:
        return []
    depth = max(layers.values())
    measures = {"loss": ("Reach: the task", f"held-out task loss, {unit(results)}")}
    measures |= {key: ("Reach: what is kept", label) for key, label in RETENTION.items()}
    plots = []
    for key, (title, label) in measures.items():
        if key not in summary["measures"]:
            continue
        line: Points = sorted((layers[name], summary["arms"][name][key]["value"]) for name in layers)
        base: Points = [(at, summary["measures"][key]["base"]) for at in (min(layers.values()), depth)]
        series = {"after training": line, "the base model": base}
        x_label = f"layers that learn, of {depth}, counted from the top"
        plots.append(line_plot(series, title=title, x_label=x_label, y_label=label, place="at a reach of"))
    return plots


def estimate(measured: Results) -> Estimate:
    """Return what a plot draws: without an interval, a dot."""
    value = measured["value"]
    return Estimate(value, *(value if measured[end] is None else measured[end] for end in ("low", "high")))


def unit(results: Results) -> str:
    """Return the unit of the task loss."""
    return "nats per pair" if "pair_accuracy" in results["base"]["adaptation"] else "nats per token"


def _is_plain(config: Results) -> bool:
    return config["method"] in ("frozen", "e2e") and not config.get("frozen_top")


def _over_rates(results: Results) -> dict[str, list[str]]:
    """Return the arms of each series, those with several in the order of their learning rates."""
    rate = results["setting"]["training"].get("learning_rate", 2e-5)
    found: dict[str, dict[str, float]] = {}
    for run in results["cells"]:
        changes = dict(run.get("changes") or {})
        own = changes.pop("learning_rate", None)
        # The name without its rate, as another setting may follow it.
        name = " ".join(word for word in run["arm"].split(" ") if own is None or not word.startswith("lr="))
        found.setdefault(name, {})[run["arm"]] = rate if own is None else own
    return {name: sorted(arms, key=arms.__getitem__) for name, arms in found.items()}
