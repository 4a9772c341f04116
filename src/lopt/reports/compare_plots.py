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


def reach(results: Results) -> str | None:
    """Return a plot of what was learned and forgotten over the layers that the task gradient passes.

    The arms are those whose layers below are frozen, and end to end, with the study's own settings; None if
    they have fewer than three different reaches, or no loss elsewhere was measured.
    """
    summary = results["summary"]
    plain = [run for run in results["cells"] if "failed" not in run and not run["changes"] and _is_plain(run)]
    layers = {
        run["arm"]: run["blocks"][-1][1] - run["blocks"][-1][0]
        for run in plain
        if _beside_the_cut(run["config"]) == _beside_the_cut(plain[0]["config"])
    }
    if len(set(layers.values())) < 3 or "forgetting" not in summary["measures"]:
        return None
    base = summary["measures"]["loss"]["base"]

    def line(key: str, sign: int, start: float) -> Points:
        values = [(at, summary["arms"][name][key]["value"]) for name, at in layers.items()]
        return sorted((at, sign * (value - start)) for at, value in values if value is not None)

    series = {
        "learned: fall of the held-out task loss": line("loss", -1, base),
        "forgotten: rise of the losses elsewhere": line("forgetting", 1, 0.0),
    }
    x_label = f"layers that learn, of {max(layers.values())}, counted from the top"
    return line_plot(series, title="Reach", x_label=x_label, y_label="nats", place="with layers")


def estimate(measured: Results) -> Estimate:
    """Return what a plot draws: without an interval, a dot."""
    value = measured["value"]
    return Estimate(value, *(value if measured[end] is None else measured[end] for end in ("low", "high")))


def unit(results: Results) -> str:
    """Return the unit of the task loss."""
    return "nats per pair" if "pair_accuracy" in results["base"]["adaptation"] else "nats per token"


def _is_plain(run: Results) -> bool:
    return run["config"]["method"] in ("frozen", "e2e") and not run["config"].get("frozen_top")


def _beside_the_cut(config: Results) -> dict[str, Any]:
    return {key: v for key, v in config.items() if key not in ("method", "num_blocks", "block_boundaries")}


def _over_rates(results: Results) -> dict[str, list[str]]:
    """Return the arms of each series, those with several in the order of their learning rates."""
    found: dict[str, dict[str, float]] = {}
    shared = results["setting"]["training"].get("learning_rate", 2e-5)  # TRL's default for rows
    for run in results["cells"]:
        if "failed" in run:
            continue
        changed = (run.get("changes") or {}).get("learning_rate")
        words = run["arm"].split(" ")
        name = run["arm"] if changed is None else " ".join(w for w in words if not w.startswith("lr="))
        rate = run.get("learning_rate", shared if changed is None else changed)
        found.setdefault(name, {})[run["arm"]] = rate
    return {name: sorted(arms, key=arms.__getitem__) for name, arms in found.items()}
