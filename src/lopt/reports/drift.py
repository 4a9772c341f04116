"""Drift as text for a terminal and as a page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence

from lopt.evaluation.drift.reference import Drift, LayerDrift
from lopt.reports.lines import Points, line_plot
from lopt.reports.page import figure, figures, page, paragraph, table
from lopt.reports.text import columns, number

EXPLAINED = (
    "Base and tuned model read the same text; every number is over its tokens, without the special token "
    "that starts a window. Relative L2 is the distance between their hidden states relative to the length of "
    "the base's, cosine is the mean over tokens, and linear CKA compares the geometry of the tokens: it is 1 "
    "for states that were only rotated or rescaled. A few channels that are much larger than all others "
    "dominate the first two; they are part of the model. Variance is over tokens, mean of the channels; norm "
    "is the mean over tokens. Change of weights: of the matrices, relative to the length of the base's; "
    "norms and biases apart. The last layer's state is the one before the final norm."
)


def drift_table(drifts: Mapping[str, Drift]) -> str:
    """Return one table per model, layer by layer, as text for a terminal."""
    parts = []
    for name, drift in drifts.items():
        heads = ["", "rel. L2", "cosine", "CKA", "norm", "base's", "variance", "base's", "weights"]
        rows = []
        for layer in drift.layers:
            pairs = (layer.norm_tuned, layer.norm_base, layer.variance_tuned, layer.variance_base)
            compared = [f"{layer.relative_l2:.4f}", f"{layer.cosine:.5f}", f"{layer.cka:.5f}"]
            states = [*compared, *(f"{value:.4g}" for value in pairs)]
            rows.append([_place(layer.name, drift), *states, _weight(drift, layer.name)])
        rest = [key for key in drift.weights if key not in {layer.name for layer in drift.layers}]
        rows += [[key, *[""] * 7, _weight(drift, key)] for key in rest]
        parts.append(f"\n{name}, {drift.tokens:,} tokens\n{columns([heads, *rows])}\n")
    return "".join(parts)


def drift_page(
    drifts: Mapping[str, Drift], base: str, texts: Sequence[str], facts: Mapping[str, object]
) -> str:
    """Return the report of `lopt probe` as a whole HTML page.

    Args:
        drifts: by the names of the tuned models.
        base: name of the base model.
        texts: names of the texts that the models read.
        facts: settings and versions, shown in a table.
    """
    kind = "lede" if len(drifts) == 1 else ""
    sections = [
        ("", "".join(paragraph(_finding(name, d), kind) for name, d in drifts.items())),
        ("", paragraph(EXPLAINED, "note")),
        ("By depth", _by_depth(drifts)),
        ("Numbers", _summary(drifts) + "".join(_layers(name, drift) for name, drift in drifts.items())),
        ("Settings and versions", table(["Setting", "Value"], facts.items(), "What was compared, with what")),
    ]
    tokens = next(iter(drifts.values())).tokens
    return page(
        f"Drift from {base}", sections, f"{', '.join(drifts)} · {', '.join(texts)} · {tokens:,} tokens"
    )


def _finding(name: str, drift: Drift) -> str:
    if not any(layer.relative_l2 for layer in drift.layers) and not drift.weights["all"]:
        return f"{name} has not moved: its hidden states and weights are the base's."
    last = drift.layers[-1]
    still = list(itertools.takewhile(lambda layer: layer.relative_l2 == 0, drift.layers))
    unmoved = f" Nothing has moved up to the states of {still[-1].name}." if still else ""
    return (
        f"{name}: after the last layer hidden states are {_number(last.relative_l2)} of their length away "
        f"from the base's (cosine {last.cosine:.4f}, CKA {last.cka:.4f}); weights changed by "
        f"{_number(drift.weights['all'])} of theirs.{unmoved}"
    )


def _by_depth(drifts: Mapping[str, Drift]) -> str:
    """Return plots of every measure over the depth, all models in each, boundaries marked."""

    def measured(value: Callable[[LayerDrift], float]) -> dict[str, Points]:
        return {name: [(x, value(s)) for x, s in enumerate(d.layers)] for name, d in drifts.items()}

    def ratio(tuned: float, base: float) -> float:
        return tuned / base if base else math.nan

    first = next(iter(drifts.values()))
    base: dict[str, Points] = {"base": [(x, s.mean_base) for x, s in enumerate(first.layers)]}
    weights: dict[str, Points] = {
        name: [(x, d.weights[s.name]) for x, s in enumerate(d.layers) if s.name in d.weights]
        for name, d in drifts.items()
    }
    plots: list[tuple[dict[str, Points], str, str]] = [
        (measured(lambda s: s.relative_l2), "Relative L2 distance of hidden states", ""),
        (measured(lambda s: s.cosine), "Cosine of hidden states", ""),
        (measured(lambda s: s.cka), "Linear CKA of hidden states", ""),
        (weights, "Change of weights", "relative to the base's"),
        (measured(lambda s: ratio(s.norm_tuned, s.norm_base)), "Norm of hidden states", "tuned / base"),
        (
            measured(lambda s: ratio(s.variance_tuned, s.variance_base)),
            "Variance of hidden states over tokens",
            "tuned / base",
        ),
        (measured(lambda s: s.mean_tuned) | base, "Mean of hidden states", ""),
    ]
    marks, caption = _marks(drifts)

    def plot(series: Mapping[str, Points], title: str, label: str) -> str:
        return line_plot(
            series, title=title, x_label="layers passed", place="after layer", y_label=label, marks=marks
        )

    return figures(figure(plot(*arguments), caption) for arguments in plots)


def _marks(drifts: Mapping[str, Drift]) -> tuple[dict[float, str], str]:
    """Return labels of the boundaries by place, and a caption where the models' boundaries differ."""
    cuts = {tuple(drift.boundaries) for drift in drifts.values() if drift.boundaries}
    if len(cuts) == 1:
        return {float(at): f"block {b}" for b, at in enumerate(cuts.pop(), start=2)}, ""
    caption = "; ".join(
        f"{name}: boundaries at {', '.join(map(str, d.boundaries)) or 'none'}" for name, d in drifts.items()
    )
    return {float(at): "" for cut in cuts for at in cut}, caption if cuts else ""


def _summary(drifts: Mapping[str, Drift]) -> str:
    blocks = max((len(d.boundaries) + 1 for d in drifts.values()), default=1)
    names = [f"block {b}" for b in range(1, blocks + 1)] if blocks > 1 else []
    keys = ["all", *names, "embedding", "head"]
    rows = [
        [name, *_compared(d.layers[-1], 4), *(_weight(d, key) for key in keys)] for name, d in drifts.items()
    ]
    heads = ["Model", "Relative L2", "Cosine", "CKA", *(f"Weights, {key}" for key in keys)]
    caption = "Hidden states after the last layer, and the relative change of weights."
    return table(heads, rows, caption, numeric=range(1, len(heads)))


def _layers(name: str, drift: Drift) -> str:
    heads = ["Place", "Relative L2", "Cosine", "CKA", "Norm, base", "tuned", "Variance, base", "tuned"]
    heads += ["Mean, base", "tuned", "Weights"]
    rows = []
    for s in drift.layers:
        pairs = (s.norm_base, s.norm_tuned, s.variance_base, s.variance_tuned, s.mean_base, s.mean_tuned)
        states = [*_compared(s, 5), *map(_number, pairs)]
        rows.append([_place(s.name, drift), *states, _weight(drift, s.name)])
    return table(heads, rows, f"{name}, place by place", numeric=range(1, len(heads)))


def _compared(layer: LayerDrift, digits: int) -> list[str]:
    return [_number(layer.relative_l2), f"{layer.cosine:.{digits}f}", f"{layer.cka:.{digits}f}"]


def _place(name: str, drift: Drift) -> str:
    """Return a layer's name, and the block that starts with it."""
    starts = {f"layer {start}": block for block, start in enumerate(drift.boundaries, start=2)}
    return f"{name} (block {starts[name]})" if name in starts else name


def _weight(drift: Drift, key: str) -> str:
    return _number(drift.weights[key]) if key in drift.weights else ""


def _number(value: float) -> str:
    return number(value, ",.0f" if abs(value) >= 1000 else ".3g")
