"""A comparison in figures: means and intervals over seeds, differences between arms and to the base model.

Two kinds of noise are kept apart. Over seeds (order of rows, heads): the mean with a Student-t interval, for
differences between arms paired by seed. Over the items of a benchmark: every item's outcome, averaged over
seeds, minus the base model's, with a paired interval over items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median_high
from typing import Any

from lopt.evaluation.statistics import mean_interval, paired_difference
from lopt.files import finite

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
    """Return the figures of every arm, from `base` and the arm runs in `cells`.

    The items are those that the base and all arm runs have: see `shared_items`.

    Returns:
        measures: label, kind (`adaptation`, `retention`, `drift`), direction and base value by key.
        arms: by arm and measure, the mean over seeds with its interval, and the value of every seed.
        against: by reference arm, arm and measure, the mean difference paired by seed.
        items: by arm and measure, the mean difference to the base with an interval over items.
        cost: by arm, medians over seeds.
        failed: messages by arm, where a run ended in a number that is not finite or has diverged.
    """
    base, *whole = _weighted([results["base"], *(r for r in results["cells"] if "failed" not in r)])
    runs = {name: [run for run in whole if run["arm"] == name] for name in results["arms"]}
    measures = _measures(base, whole)
    figures = {name: {run["seed"]: _figures(run, base) for run in own} for name, own in runs.items()}
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
        "items": {name: _items(own, base) for name, own in runs.items() if own},
        "cost": {name: _costs(own) for name, own in runs.items() if own},
        "failed": {run["arm"]: run["failed"] for run in results["cells"] if "failed" in run},
    }


def shared_items(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return runs with the measures of `items` that all have; a run of another version may have others.

    Runs that failed have no `items` and stay as they are.
    """
    whole = [run["items"] for run in runs if "items" in run]
    shared = [key for key in whole[0] if all(key in items for items in whole)]
    return [
        {**run, "items": {key: run["items"][key] for key in shared}} if "items" in run else dict(run)
        for run in runs
    ]


def _weighted(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return runs with the items that all have; those of a text weigh as their tokens do.

    All runs have the same windows of a text. The runs of older versions do not say how many tokens these
    have: then another run does, or all windows weigh the same.
    """
    tokens = {k: item["tokens"] for run in runs for k, item in run["items"].items() if "tokens" in item}
    weighted = shared_items(runs)
    for run in weighted:
        for key in run["items"].keys() & tokens.keys():
            item, average = run["items"][key], mean(tokens[key])
            values = [v * n / average for v, n in zip(item["values"], tokens[key], strict=True)]
            run["items"][key] = {**item, "values": values}
    return weighted


def _measures(base: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    def measure(label: str, kind: str, higher: bool | None, value: float | None) -> dict[str, Any]:
        return {"label": label, "kind": kind, "higher_is_better": higher, "base": value}

    made = {
        "loss": measure("held-out task loss", "adaptation", False, base["adaptation"]["loss"]),
    }
    for key in (key for key in ("token_accuracy", "pair_accuracy") if key in base["adaptation"]):
        label = f"held-out {key.replace('_', ' ')}"
        made[key] = measure(label, "adaptation", True, base["adaptation"][key])
    for key, item in base["items"].items():
        metric = item["metric"].removesuffix(",none")
        label = key if key.endswith(ANSWERS) else f"{key}, {metric}"
        made[key] = measure(label, item["kind"], item["higher_is_better"], mean(item["values"]))
    losses, scores = _elsewhere(base)
    if losses:
        rows = any(key.startswith("rows:") for key in losses)
        of = "the right answers" if losses[0].endswith(ANSWERS) else "texts and rows" if rows else "the texts"
        made["forgetting"] = measure(f"forgetting: mean rise of the losses of {of}", "retention", False, 0.0)
    if scores:
        made["retained"] = measure("mean change of the scores elsewhere", "retention", True, 0.0)
    if runs and runs[0]["drift"]:
        made["drift"] = measure("drift: mean relative distance of hidden states", "drift", None, 0.0)
        made["weights"] = measure("relative change of weights", "drift", None, 0.0)
    return made


def _figures(run: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Return one number per measure of one arm run."""
    figures = dict(run["adaptation"])
    figures |= {key: mean(item["values"]) for key, item in run["items"].items()}
    change = {key: figures[key] - mean(item["values"]) for key, item in base["items"].items()}
    losses, scores = _elsewhere(base)
    if losses:
        figures["forgetting"] = mean(change[key] for key in losses)
    if scores:  # a score that is better when it is lower counts with the other sign
        better = {key: base["items"][key]["higher_is_better"] for key in scores}
        figures["retained"] = mean(change[key] if better[key] else -change[key] for key in scores)
    if run["drift"]:
        figures["drift"] = mean(layer["relative_l2"] for layer in run["drift"]["layers"])
        figures["weights"] = run["drift"]["weights"]["all"]
    return figures


def _elsewhere(base: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return retention measures that are losses, of one unit (nats per token or per answer), and scores."""
    kept = {key: item for key, item in base["items"].items() if item["kind"] == "retention"}
    losses = [key for key, item in kept.items() if item["metric"] == "loss"]
    texts = [key for key in losses if not key.endswith(ANSWERS)]
    return texts or losses, [key for key in kept if key not in losses]


def _over_seeds(values: list[float]) -> dict[str, Any]:
    interval: dict[str, Any] = {"value": None, "low": None, "high": None}
    if values:
        interval = finite(mean_interval(values)._asdict())  # one seed has no interval, and JSON no NaN
    return {**interval, "seeds": values}


def _paired(
    own: Mapping[int, Mapping[str, float]],
    reference: Mapping[int, Mapping[str, float]],
    measures: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the differences between two arms by measure, seed by seed."""
    shared = [seed for seed in own if seed in reference]
    return {key: _over_seeds([own[s][key] - reference[s][key] for s in shared]) for key in measures}


def _items(runs: Sequence[Mapping[str, Any]], base: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    found = {}
    for key, item in base["items"].items():
        outcomes = [run["items"][key]["values"] for run in runs]
        tuned = [mean(values) for values in zip(*outcomes, strict=True)]
        found[key] = finite(paired_difference(item["values"], tuned)._asdict())  # one item has no interval
    return found


def _costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {key: median_high(run["cost"][key] for run in runs) for key in COSTS}
