"""Drift as text for a terminal, as figures and as a page."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from lopt.evaluation.drift.reference import Drift, LayerDrift
from lopt.reports.page import figure, page, paragraph, table
from lopt.reports.plots import Points, line_plot

EXPLAINED = (
    "Base and tuned model read the same text; every number is over its tokens, without the special token "
    "that starts a window. Relative L2 is the distance between their hidden states relative to the length of "
    "the base's, cosine is the mean over tokens, and linear CKA compares the geometry of the tokens: it is 1 "
    "for states that were only rotated or rescaled. A few channels that are much larger than all others "
    "dominate the first two; they are part of the model. Variance is over tokens, mean of the channels; norm "
    "is the mean over tokens. Change of weights: of the matrices, relative to the length of the base's; "
    "norms and biases apart. The last layer's state is the one before the final norm."
)


def drift_table(drifts: Mapping[str, Drift], width: int = 20) -> str:
    """Per model one block of lines for a terminal."""
    lines = []
    for name, drift in drifts.items():
        lines += ["", f"{name}, {drift.tokens:,} tokens"]
        heads = ("rel. L2", "cosine", "CKA", "norm", "base's", "variance", "base's", "weights")
        lines.append(" " * width + "".join(f"{head:>10}" for head in heads))
        for layer in drift.layers:
            pairs = (layer.norm_tuned, layer.norm_base, layer.variance_tuned, layer.variance_base)
            cells = [f"{layer.relative_l2:10.4f}", f"{layer.cosine:10.5f}", f"{layer.cka:10.5f}"]
            cells += [f"{value:10.4g}" for value in pairs]
            cells.append(f"{_weight(drift, layer.name):>10}")
            lines.append(f"{_place(layer.name, drift):{width}}{''.join(cells)}")
        rest = [key for key in drift.weights if key not in {layer.name for layer in drift.layers}]
        lines += [f"{key:{width}}{' ' * 70}{_weight(drift, key):>10}" for key in rest]
    return "\n".join([*lines, ""])


def drift_figures(drifts: Mapping[str, Drift]) -> str:
    """Every measure over the depth, all models in one plot, boundaries marked."""
    first = next(iter(drifts.values()))

    def measured(key: str) -> dict[str, Points]:
        return {n: [(x, getattr(s, key)) for x, s in enumerate(d.layers)] for n, d in drifts.items()}

    def ratio(key: str) -> dict[str, Points]:
        def of(layer: LayerDrift) -> float:
            base = getattr(layer, f"{key}_base")
            return getattr(layer, f"{key}_tuned") / base if base else math.nan

        return {n: [(x, of(s)) for x, s in enumerate(d.layers)] for n, d in drifts.items()}

    weights: dict[str, Points] = {
        name: [(x, d.weights[s.name]) for x, s in enumerate(d.layers) if s.name in d.weights]
        for name, d in drifts.items()
    }
    base: dict[str, Points] = {"base": [(x, s.mean_base) for x, s in enumerate(first.layers)]}
    plots: list[tuple[dict[str, Points], str, str]] = [
        (measured("relative_l2"), "Relative L2 distance of hidden states", ""),
        (measured("cosine"), "Cosine of hidden states", ""),
        (measured("cka"), "Linear CKA of hidden states", ""),
        (weights, "Change of weights", "relative to the base's"),
        (ratio("norm"), "Norm of hidden states", "tuned / base"),
        (ratio("variance"), "Variance of hidden states over tokens", "tuned / base"),
        (measured("mean_tuned") | base, "Mean of hidden states", ""),
    ]
    figures = "".join(_figure(series, title, label, drifts) for series, title, label in plots)
    return f'<div class="figures">\n{figures}</div>'


def drift_page(
    drifts: Mapping[str, Drift], base: str, texts: Sequence[str], facts: Mapping[str, object]
) -> str:
    """The report of `lopt probe` as a whole HTML page."""
    tables = "".join(_layers(name, drift) for name, drift in drifts.items())
    settings = table(["Setting", "Value"], facts.items(), "What was compared, with what")
    kind = "lede" if len(drifts) == 1 else ""
    sections = [
        ("", "".join(paragraph(_sentence(name, d), kind) for name, d in drifts.items())),
        ("", paragraph(EXPLAINED, "note")),
        ("By depth", drift_figures(drifts)),
        ("Numbers", _summary(drifts) + tables),
        ("Settings and versions", settings),
    ]
    tokens = next(iter(drifts.values())).tokens
    return page(
        f"Drift from {base}", sections, f"{', '.join(drifts)} · {', '.join(texts)} · {tokens:,} tokens"
    )


def _sentence(name: str, drift: Drift) -> str:
    if not any(layer.relative_l2 for layer in drift.layers) and not drift.weights["all"]:
        return f"{name} has not moved: its hidden states and weights are the base's."
    last = drift.layers[-1]
    still = list(itertools.takewhile(lambda layer: layer.relative_l2 == 0, drift.layers))
    unmoved = f" Nothing has moved up to the {still[-1].name}'s states." if still else ""
    unmoved = unmoved.replace("the layer", "layer")
    return (
        f"{name}: after the last layer hidden states are {_number(last.relative_l2)} of their length away "
        f"from the base's (cosine {last.cosine:.4f}, CKA {last.cka:.4f}); weights changed by "
        f"{_number(drift.weights['all'])} of theirs.{unmoved}"
    )


def _figure(series: Mapping[str, Points], title: str, label: str, drifts: Mapping[str, Drift]) -> str:
    series = {name: points for name, points in series.items() if points}
    told = "; ".join(f"{n} from {p[0][1]:.3g} to {p[-1][1]:.3g} at the last layer" for n, p in series.items())
    marks, caption = _marks(drifts)
    svg = line_plot(
        series, title=title, x_label="layers passed", y_label=label, alt=f"{title}: {told}.", marks=marks
    )  # fmt: skip
    return figure(svg, caption)


def _marks(drifts: Mapping[str, Drift]) -> tuple[dict[float, str], str]:
    """Where blocks start; models that are cut in different places have marks without a word."""
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
    rows = []
    for name, d in drifts.items():
        end = d.layers[-1]
        numbers = [_number(end.relative_l2), f"{end.cosine:.4f}", f"{end.cka:.4f}"]
        rows.append([name, *numbers, *(_number(d.weights[k]) if k in d.weights else "" for k in keys)])
    heads = ["Model", "Relative L2", "Cosine", "CKA", *(f"Weights, {key}" for key in keys)]
    caption = "Hidden states after the last layer, and the relative change of weights."
    return table(heads, rows, caption, numeric=range(1, len(heads)))


def _layers(name: str, drift: Drift) -> str:
    heads = ["Place", "Relative L2", "Cosine", "CKA", "Norm, base", "tuned", "Variance, base", "tuned"]
    heads += ["Mean, base", "tuned", "Weights"]
    rows = [[_place(layer.name, drift), *_cells(layer), _weight(drift, layer.name)] for layer in drift.layers]
    return table(heads, rows, f"{name}, place by place", numeric=range(1, len(heads)))


def _cells(layer: LayerDrift) -> list[str]:
    pairs = (
        (layer.norm_base, layer.norm_tuned),
        (layer.variance_base, layer.variance_tuned),
        (layer.mean_base, layer.mean_tuned),
    )
    compared = [_number(layer.relative_l2), f"{layer.cosine:.5f}", f"{layer.cka:.5f}"]
    return compared + [_number(value) for pair in pairs for value in pair]


def _place(name: str, drift: Drift) -> str:
    """A layer's name, and the block that starts with it."""
    starts = {f"layer {start}": block for block, start in enumerate(drift.boundaries, start=2)}
    return f"{name} (block {starts[name]})" if name in starts else name


def _weight(drift: Drift, key: str) -> str:
    return _number(drift.weights[key]) if key in drift.weights else ""


def _number(value: float) -> str:
    return "0" if value == 0 else f"{value:{',.0f' if abs(value) >= 1000 else '.3g'}}".replace("-", "−")
