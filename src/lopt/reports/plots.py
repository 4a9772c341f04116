"""Plots as inline SVG for pages: they scale, take the page's colours and carry a text alternative.

The same input gives the same bytes. Names and titles are plain text and may come from data: nothing in them
is read as markup. matplotlib (`lopt[demo]` or `lopt[eval]`) draws; line plots are in `lopt.reports.lines`.

Arguments that all plots share:

- title: the heading above the plot.
- alt: the text alternative for readers who do not see the plot. Default: the title and the plotted values.

All raise ImportError if matplotlib is not installed.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lopt.evaluation.statistics import Estimate
from lopt.reports.lines import PALETTE, short, text_alternative
from lopt.reports.page import clean

_INK = "#010203"  # stands for `currentColor`, which matplotlib does not know


def bar_plot(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str = "",
    alt: str = "",
    stacked: bool = False,
    value: Callable[[float], str] = "{:.3g}".format,
) -> str:
    """Draw horizontal bars: one row per group, one bar or stacked part per series.

    Args:
        groups: names of the rows, top to bottom.
        series: one length per group, by name; a legend is drawn if there are several.
        value: formats a bar's length (the sum, if stacked), which is written at its end.
    """
    by_group = zip(groups, zip(*series.values(), strict=True), strict=True)
    alt = alt or text_alternative(
        title, (f"{group} {', '.join(map(value, lengths))}" for group, lengths in by_group)
    )
    slots = 1 if stacked else max(1, len(series))
    thick = 0.62 if slots == 1 else 0.8 / slots
    height = 1.1 + 0.34 * len(groups) * max(1.0, 0.7 * slots)
    left = [0.0] * len(groups)
    with _canvas(title, alt, height, series) as (fig, axes):
        for i, lengths in enumerate(series.values()):
            rows = [g + (0 if stacked else (i - (slots - 1) / 2) * thick) for g in range(len(groups))]
            bars = axes.barh(rows, lengths, thick * 0.94, left=left, color=PALETTE[i % len(PALETTE)])
            ends = [a + b for a, b in zip(left, lengths, strict=True)]
            left = ends if stacked else left
            if not stacked or i == len(series) - 1:
                axes.bar_label(bars, [short(value(end), 40) for end in ends], padding=4)
        axes.set_yticks(range(len(groups)), [short(group, 24) for group in groups])
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.xaxis.set_visible(False)  # every bar carries its number
        axes.spines["bottom"].set_visible(False)
        _label(fig, axes, x_label, axes.containers, series)
        return _to_svg(fig, title, alt)


def interval_plot(
    groups: Sequence[str],
    series: Mapping[str, Sequence[Estimate | None]],
    *,
    title: str,
    x_label: str,
    alt: str = "",
) -> str:
    """Draw dots with their intervals around a line at zero: one row per group, one dot per series.

    Args:
        groups: names of the rows, top to bottom.
        series: one estimate per group, by name; None (or a value that is not finite) leaves a gap.
    """
    dots = ((n, g, e) for n, row in series.items() for g, e in zip(groups, row, strict=True) if e)
    values = (f"{name}, {group} {e.value:+.3g}" for name, group, e in dots)
    alt = alt or text_alternative(f"{title}, {x_label}", values)
    slots = max(1, len(series))
    height = 1.2 + len(groups) * max(0.34, 0.17 * slots)
    with _canvas(title, alt, height, series) as (fig, axes):
        handles = []
        for i, estimates in enumerate(series.values()):
            offset = (i - (slots - 1) / 2) * 0.7 / slots
            rows = [(g + offset, e) for g, e in enumerate(estimates) if e and all(map(math.isfinite, e))]
            handles.append(_dots(axes, i, [(e, Estimate(y, y, y)) for y, e in rows]))
        axes.axvline(0, color=_INK, alpha=0.5, lw=0.9)
        axes.set_yticks(range(len(groups)), [short(group, 28) for group in groups])
        axes.set_ylim(len(groups) - 0.4, -0.6)
        axes.grid(axis="x", color=_INK, alpha=0.14, lw=0.7)
        axes.xaxis.get_major_locator().set_params(nbins=6)
        _label(fig, axes, x_label, handles, series)
        return _to_svg(fig, title, alt)


def scatter_plot(
    points: Mapping[str, Sequence[tuple[Estimate, Estimate]]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    alt: str = "",
) -> str:
    """Draw dots over two measures, each with its two intervals as a cross.

    Args:
        points: one or more (x, y) by name, joined in their order; what is not finite is left out.
    """
    # Without units and explanations, which follow the name of a measure.
    across, up = (re.split("[,(]", label)[0].strip() for label in (x_label, y_label))
    values = (
        f"{n} {across} {x.value:.4g}, {up} {y.value:.4g}" for n, several in points.items() for x, y in several
    )
    alt = alt or text_alternative(title, values)
    with _canvas(title, alt, 3.0, points) as (fig, axes):
        handles = []
        for i, several in enumerate(points.values()):
            finite = [(x, y) for x, y in several if all(map(math.isfinite, (*x, *y)))]
            handles.append(_dots(axes, i, finite))
            axes.plot(
                [x.value for x, _ in finite], [y.value for _, y in finite], lw=0.8, color=_style(i)["color"]
            )
        axes.set_xlabel(short(x_label, 120))
        axes.grid(color=_INK, alpha=0.14, lw=0.7)
        axes.margins(0.1)
        axes.xaxis.get_major_locator().set_params(nbins=6)
        _label(fig, axes, y_label, handles, points)
        return _to_svg(fig, title, alt)


def _dots(axes: Any, number: int, points: Sequence[tuple[Estimate, Estimate]]) -> Any:
    """Draw dots with crosses in the style of series `number`."""

    def reach(estimates: Iterable[Estimate]) -> list[list[float]]:
        pairs = [(max(0.0, e.value - e.low), max(0.0, e.high - e.value)) for e in estimates]
        return [[low for low, _ in pairs], [high for _, high in pairs]]

    return axes.errorbar(
        [x.value for x, _ in points],
        [y.value for _, y in points],
        xerr=reach(x for x, _ in points),
        yerr=reach(y for _, y in points),
        linestyle="none",
        ms=5,
        lw=1.4,
        **_style(number),
    )


def _style(number: int) -> dict[str, Any]:
    """Return colour and marker of series `number`; from the seventh on the markers are hollow."""
    fill = "full" if number < len(PALETTE) else "none"
    return {"color": PALETTE[number % len(PALETTE)], "marker": "os^Dvx"[number % 6], "fillstyle": fill}


@contextmanager
def _canvas(title: str, alt: str, height: float, names: Iterable[str]) -> Iterator[tuple[Any, Any]]:
    """Yield a bare figure and axes under settings that no user's matplotlibrc can change.

    Args:
        height: in inches, without the legend of the series called `names`.
    """
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "lopt[demo]"') from error
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    bare = ("axes.spines.top", "axes.spines.right", "axes.spines.left", "text.parse_math")
    rc = dict.fromkeys(inked, _INK) | dict.fromkeys(bare, False) | {"svg.fonttype": "none", "font.size": 9.5}
    # matplotlib makes ids from this salt: the same for the same figure, others for another figure.
    rc["svg.hashsalt"] = f"{clean(title)} {clean(alt)}"
    with matplotlib.style.context(rc, after_reset=True):
        # 360 units wide, so that 9.5 units of text stay readable where a phone shows the figure.
        shown, columns = _legend(names)
        rows = -(-len(shown) // columns) if len(shown) > 1 else 0
        fig = Figure(figsize=(5.0, height + 0.2 * rows), layout="constrained")
        heading = "\n".join(textwrap.wrap(short(title, 200), 50))
        fig.suptitle(heading, x=0.0, ha="left", fontsize=10.5, fontweight="bold")
        axes = fig.subplots()
        axes.tick_params(axis="y", which="both", length=0)
        yield fig, axes


def _label(fig: Any, axes: Any, label: str, handles: Sequence[Any], names: Iterable[str]) -> None:
    # Above the axis rather than beside it, where it would be turned by 90 degrees.
    axes.set_title(short(label, 120), loc="left", fontsize=9.5, alpha=0.8)
    shown, columns = _legend(names)
    if len(shown) > 1:
        fig.legend(handles, shown, loc="outside lower left", ncols=columns, frameon=False, handlelength=2.4)


def _legend(names: Iterable[str]) -> tuple[list[str], int]:
    """Return the labels of a legend and its number of columns."""
    # matplotlib leaves out names that start with an underscore: the space keeps them.
    shown = [" " + short(name, 40) for name in names]
    longest = max(map(len, shown), default=0)
    return shown, 3 if longest < 14 else 2 if longest < 26 else 1


def _to_svg(fig: Any, title: str, alt: str) -> str:
    """Return the figure as an SVG element that scales, takes the page's colour and sets no global style."""
    file = io.BytesIO()
    no_date = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    fig.savefig(file, format="svg", transparent=True, metadata=no_date)
    linked = set(re.findall(r'(?:href="|url\()#([^")]+)', file.getvalue().decode()))
    root = ET.fromstring(file.getvalue())  # noqa: S314  (what matplotlib has just made)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}style", "}metadata")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        element.attrib = {k.split("}")[-1]: _attribute(v) for k, v in element.attrib.items()}
        if element.get("id") not in linked:
            element.attrib.pop("id", None)
    root.attrib = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": root.attrib["viewBox"], "width": "100%"}
    root.attrib |= {"role": "img", "aria-label": clean(alt), "stroke-linejoin": "round"}
    name = ET.Element("title")
    name.text = clean(title)
    root.insert(0, name)
    return ET.tostring(root, encoding="unicode")


def _attribute(value: str) -> str:
    value = re.sub("'DejaVu Sans'[^;]*", "system-ui, sans-serif", " ".join(value.split()))
    return value.replace(_INK, "currentColor")


def standalone(svg: str) -> str:
    """Return a plot for a file of its own, which has no page to inherit its text's colour from."""
    return svg.replace("currentColor", "#7a7f87")
