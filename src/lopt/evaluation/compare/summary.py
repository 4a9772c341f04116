"""Cells summed up: means and intervals over seeds, differences between arms of one seed, and to the base.

Two kinds of noise are kept apart. Over seeds (order of rows, heads): the mean with a Student-t interval, for
differences between arms paired by seed. Over the items of a benchmark: every item's outcome, averaged over
seeds, minus the base model's, with a paired interval over items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from lopt.evaluation.statistics import Estimate, mean_interval, paired_difference

REFERENCES = ("e2e", "frozen")
"""Methods that every arm is compared with, if they are in the study."""

ANSWERS = ", right answer"
"""End of the names of losses of right answers."""

COSTS = {
    "trained_parameters": "trained parameters",
    "head_parameters": "of heads, not saved",
    "peak_bytes": "peak memory",
    "seconds_per_step": "seconds per step",
    "flops_per_step": "operations per step",
}


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """Figures of every arm, from `base` and `cells`; see the keys of what is returned.

    Returns:
        measures: label, kind (`adaptation`, `retention`, `drift`), direction and base value by key.
        arms: by arm and measure, the mean over seeds with its interval, and the value of every seed.
        against: by reference arm, arm and measure, the mean difference paired by seed.
        items: by arm and measure, the mean difference to the base with an interval over items.
        cost: by arm, medians over seeds.
        failed: arms with cells that ended in a number that is not finite.
    """
    base = results["base"]
    good = [cell for cell in results["cells"] if "failed" not in cell]
    cells = {name: [c for c in good if c["arm"] == name] for name in results["arms"]}
    measures = _measures(base, good)
    figures = {name: {c["seed"]: _figures(c, base) for c in own} for name, own in cells.items()}
    references = [n for n in results["arms"] if n.split()[0] in REFERENCES]
    return {
        "measures": measures,
        "arms": {
            name: {key: _over_seeds([f[key] for f in own.values()]) for key in measures}
            for name, own in figures.items()
        },
        "against": {
            r: {n: _paired(own, figures[r], measures) for n, own in figures.items() if n != r}
            for r in references
        },
        "items": {name: _items(own, base) for name, own in cells.items() if own},
        "cost": {name: _costs(own) for name, own in cells.items() if own},
        "failed": {c["arm"]: c["failed"] for c in results["cells"] if "failed" in c},
    }


def _measures(base: Mapping[str, Any], cells: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    def measure(label: str, kind: str, higher: bool | None, value: float | None) -> dict[str, Any]:
        return {"label": label, "kind": kind, "higher_is_better": higher, "base": value}

    made = {
        "loss": measure("held-out task loss", "adaptation", False, base["adaptation"]["loss"]),
        "token_accuracy": measure(
            "held-out token accuracy", "adaptation", True, base["adaptation"]["token_accuracy"]
        ),
    }
    for key, item in base["items"].items():
        metric = item["metric"].removesuffix(",none")
        label = key if key.endswith(ANSWERS) else f"{key}, {metric}"
        made[key] = measure(label, item["kind"], item["higher_is_better"], mean(item["values"]))
    losses, scores = _elsewhere(base)
    if losses:
        of = "the right answers" if losses[0].endswith(ANSWERS) else "the texts"
        made["forgetting"] = measure(f"forgetting: mean rise of the losses of {of}", "retention", False, 0.0)
    if scores:
        made["retained"] = measure("mean change of the scores elsewhere", "retention", True, 0.0)
    if cells and cells[0]["drift"]:
        made["drift"] = measure("drift: mean relative distance of hidden states", "drift", None, 0.0)
        made["weights"] = measure("relative change of weights", "drift", None, 0.0)
    return made


def _figures(cell: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """One number per measure of one cell."""
    figures = dict(cell["adaptation"])
    figures |= {key: mean(item["values"]) for key, item in cell["items"].items()}
    for name, keys in zip(("forgetting", "retained"), _elsewhere(base), strict=True):
        if keys:
            figures[name] = mean(figures[key] - mean(base["items"][key]["values"]) for key in keys)
    if cell["drift"]:
        figures["drift"] = mean(layer["relative_l2"] for layer in cell["drift"]["layers"])
        figures["weights"] = cell["drift"]["weights"]["all"]
    return figures


def _elsewhere(base: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Retention measures that are losses, of one unit (nats per token, else nats per answer), and scores."""
    kept = {key: item for key, item in base["items"].items() if item["kind"] == "retention"}
    losses = [key for key, item in kept.items() if item["metric"] == "loss"]
    texts = [key for key in losses if not key.endswith(ANSWERS)]
    return texts or losses, [key for key in kept if key not in losses]


def _over_seeds(values: list[float]) -> dict[str, Any]:
    return {**_interval(values), "seeds": values}


def _interval(values: list[float]) -> dict[str, float | None]:
    """With one seed there is no interval, and JSON has no nan."""
    if len(values) < 2:
        return {"value": values[0] if values else None, "low": None, "high": None}
    return mean_interval(values)._asdict()


def _paired(
    own: Mapping[int, Mapping[str, float]],
    reference: Mapping[int, Mapping[str, float]],
    measures: Mapping[str, Any],
) -> dict[str, Any]:
    """Differences between two arms by measure, seed by seed."""
    shared = [seed for seed in own if seed in reference]
    return {key: _over_seeds([own[s][key] - reference[s][key] for s in shared]) for key in measures}


def _items(cells: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    found = {}
    for key, item in base["items"].items():
        outcomes = [cell["items"][key]["values"] for cell in cells]
        tuned = [mean(values) for values in zip(*outcomes, strict=True)]
        found[key] = paired_difference(item["values"], tuned)._asdict()
    return found


def _costs(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {key: sorted(cell["cost"][key] for cell in cells)[len(cells) // 2] for key in COSTS}


def estimate(figures: Mapping[str, Any]) -> Estimate | None:
    """What a plot draws; without an interval, a dot. None if there is no value."""
    value = figures["value"]
    if value is None:
        return None
    low, high = (value if figures[end] is None else figures[end] for end in ("low", "high"))
    return Estimate(value, low, high)
