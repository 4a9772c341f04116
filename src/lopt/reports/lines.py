"""Line plots and histograms as inline SVG, drawn here in a millisecond.

A page of a run is written at every checkpoint, with a dozen of them, and wherever lopt is installed:
matplotlib, which draws the other plots (`lopt.reports.plots`), takes a second for that and is an extra. Both
look alike; what is said there of titles, text alternatives and hostile names holds here.
"""

from __future__ import annotations

import itertools
import math
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence

from lopt.reports.page import clean
from lopt.validation import number_text

Points = Sequence[tuple[float, float]]

# Each colour has a contrast of 3:1 or more on the light and on the dark page, and neighbours differ for
# every common kind of colour blindness; dashes say the same again.
PALETTE = ("#2a7fd4", "#d55e00", "#0b9a73", "#b9519f", "#94790a", "#7d7f88")
_DASHES = ("", "7 3", "7 3 1.5 3", "1.5 3")
_WIDTH, _HEIGHT, _RIGHT = 360.0, 150.0, 8.0  # of the plot; the height without titles and legend
_LETTER = 6.0  # about as wide as a letter is at the size of 9.5


def short(name: str, width: int) -> str:
    """Return a name without what no document may hold, cut to `width` characters."""
    name = clean(name)
    return name if len(name) <= width else name[: width - 1] + "…"


def text_alternative(title: str, values: Iterable[str]) -> str:
    """Return what a reader who does not see a plot is told."""
    return f"{title}: {'; '.join(values)}."


def line_plot(
    series: Mapping[str, Points],
    *,
    title: str,
    x_label: str,
    y_label: str,
    alt: str = "",
    log_y: bool = False,
    marks: Mapping[float, str] | None = None,
    place: str = "",
) -> str:
    """Draw lines over a common x axis.

    Args:
        series: (x, y) points by name. Points that cannot be drawn (not finite, or not positive on a
            logarithmic axis) are left out.
        title: the heading above the plot.
        alt: the text alternative. Default: the title and the ends of every line.
        marks: labels by their place on the x axis, each beside a thin vertical line: boundaries, say.
        place: what precedes an x value in the default text alternative. Default: "at" and `x_label`.
    """
    place = place or f"at {x_label}"
    ends = [(name, *points[0], *points[-1]) for name, points in series.items() if points]
    ranges = (
        f"{n} from {y:.3g} {place} {number_text(x)} to {v:.3g} {place} {number_text(u)}"
        for n, x, y, u, v in ends
    )
    shown = {
        name: [p for p in points if all(map(math.isfinite, p)) and (p[1] > 0 or not log_y)]
        for name, points in series.items()
    }
    every = [p for points in shown.values() for p in points] or [(0.0, 1.0)]
    axis = _Scale([y for _, y in every], log=log_y, room=0.12 if marks else 0.05)
    plot = _Plot(title, alt or text_alternative(title, ranges), y_label, axis, [x for x, _ in every])
    for number, points in enumerate(shown.values()):
        plot.line(points, number)
    for position, label in (marks or {}).items():
        plot.mark(position, label)
    return plot.end(x_label, list(series))


def histogram_plot(
    counts: Sequence[float],
    width: float,
    *,
    title: str,
    x_label: str,
    y_label: str,
    alt: str = "",
    marks: Mapping[float, str] | None = None,
) -> str:
    """Draw bars from 0 on, each `width` wide; the other arguments are those of `line_plot`."""
    most = max(counts, default=0)
    where = counts.index(most) * width if counts else 0
    told = f"most, {number_text(most)}, from {number_text(where)} on; the last end at {len(counts) * width:g}"
    ends = [0.0, len(counts) * width, *(marks or {})]
    axis = _Scale([0.0, float(most or 1)], log=False, room=0.12 if marks else 0.05, floor=0.0)
    plot = _Plot(title, alt or text_alternative(title, [told]), y_label, axis, ends)
    for number, count in enumerate(counts):
        plot.bar(number * width, (number + 1) * width, count)
    for position, label in (marks or {}).items():
        plot.mark(position, label)
    return plot.end(x_label, [])


class _Scale:
    """From values to places between 0 and 1, and the values that an axis names."""

    def __init__(
        self, values: Sequence[float], *, log: bool = False, room: float = 0.0, floor: float | None = None
    ) -> None:
        self._log = log
        low, high = self._to(min(values)), self._to(max(values))
        if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):  # a line that does not move
            low, high = (
                (low - 0.5, high + 0.5) if log else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
            )
        edge = room * (high - low)
        self._low, self._high = low - (0 if floor is not None else edge), high + edge

    def _to(self, value: float) -> float:
        return math.log10(value) if self._log else value

    def place(self, value: float) -> float:
        return (self._to(value) - self._low) / (self._high - self._low)

    def ticks(self, count: int, *, whole: bool = False) -> list[float]:
        if self._log and self._high - self._low > 0.9:
            return self._decades(count)
        low, high = (10**self._low, 10**self._high) if self._log else (self._low, self._high)
        rough = (high - low) / count
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(s * size for s in (1, 2, 5, 10) if s * size > 0.8 * rough)
        step = max(step, 1.0) if whole else step
        first = math.ceil(low / step - 1e-9)
        return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]

    def _decades(self, count: int) -> list[float]:
        first, last = math.floor(self._low), math.ceil(self._high)
        within = (1, 2, 5) if last - first <= 3 else (1,)
        skip = max(1, (last - first) // (2 * count))
        made = [m * 10.0**e for e in range(first, last + 1, skip) for m in within]
        return [value for value in made if self._low <= math.log10(value) <= self._high]


class _Plot:
    """An SVG that grows from top to bottom."""

    def __init__(self, title: str, alt: str, y_label: str, axis: _Scale, across: Sequence[float]) -> None:
        self._root = ET.Element("svg", {
            "xmlns": "http://www.w3.org/2000/svg", "width": "100%", "role": "img", "aria-label": clean(alt),
            "stroke-linejoin": "round",
        })  # fmt: skip
        ET.SubElement(self._root, "title").text = clean(title)
        self._y = 0.0
        for line in textwrap.wrap(short(title, 200), 50):
            self._y += 13
            self._text(0, self._y, line, "font-size:10.5px;font-weight:bold")
        self._y += 15
        self._text(0, self._y, short(y_label, 70), "opacity:.8")
        self._axis, self._across = axis, _Scale(across)
        ticks = axis.ticks(5)
        names = [_tick(value, ticks) for value in ticks]
        self._left = 6 + _LETTER * max(map(len, names), default=1)
        self._top = self._y + 8
        self._bottom = self._top + _HEIGHT
        for value, name in zip(ticks, names, strict=True):
            y = self._up(value)
            self._text(self._left - 5, y + 3.2, name, "text-anchor:end")
            self._path(f"M{self._left:.1f} {y:.1f}H{_WIDTH - _RIGHT}", "stroke:currentColor;opacity:.14")
        self._path(
            f"M{self._left:.1f} {self._bottom:.1f}H{_WIDTH - _RIGHT}", "stroke:currentColor;opacity:.6"
        )

    def _text(self, x: float, y: float, words: str, style: str = "") -> None:
        style = f"fill:currentColor;font-family:system-ui,sans-serif;font-size:9.5px;{style}"
        ET.SubElement(self._root, "text", {"x": f"{x:.1f}", "y": f"{y:.1f}", "style": style}).text = words

    def _path(self, d: str, style: str) -> None:
        style = style if style.startswith("fill") else f"fill:none;{style}"
        ET.SubElement(self._root, "path", {"d": d, "style": style})

    def _right(self, x: float) -> float:
        return self._left + 4 + self._across.place(x) * (_WIDTH - _RIGHT - self._left - 8)

    def _up(self, y: float) -> float:
        return self._bottom - self._axis.place(y) * _HEIGHT

    def line(self, points: Points, number: int) -> None:
        """Draw a line, with dots where there are few points."""
        places = [(self._right(x), self._up(y)) for x, y in points]
        if places:
            d = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
            self._path(d, _stroke(number))
        if len(places) <= 25:
            dots = "".join(f"M{x - 2:.1f} {y:.1f}a2 2 0 1 0 4 0a2 2 0 1 0 -4 0" for x, y in places)
            self._path(dots, f"fill:{PALETTE[number % len(PALETTE)]}")

    def bar(self, start: float, stop: float, height: float) -> None:
        """Draw a bar up to `height`."""
        if height:
            x, end, y = self._right(start) + 0.5, self._right(stop) - 0.5, self._up(height)
            self._path(
                f"M{x:.1f} {self._bottom:.1f}V{y:.1f}H{end:.1f}V{self._bottom:.1f}Z", f"fill:{PALETTE[0]}"
            )

    def mark(self, position: float, label: str) -> None:
        """Draw a thin vertical line with a label."""
        x, words = self._right(position), short(label, 40)
        self._path(
            f"M{x:.1f} {self._top:.1f}V{self._bottom:.1f}",
            "stroke:currentColor;opacity:.45;stroke-dasharray:2 2",
        )
        left = x + 3 + _LETTER * len(words) > _WIDTH
        self._text(
            x - 3 if left else x + 3,
            self._top + 8,
            words,
            f"opacity:.8;text-anchor:{'end' if left else 'start'}",
        )

    def end(self, x_label: str, names: Sequence[str]) -> str:
        """Draw the x axis and the legend; returns the SVG."""
        ticks = self._across.ticks(7, whole=True)
        for value in ticks:
            name = _tick(value, ticks)
            x = min(self._right(value), _WIDTH - _LETTER * len(name) / 2)
            self._text(x, self._bottom + 13, name, "text-anchor:middle")
        self._text((self._left + _WIDTH) / 2, self._bottom + 27, short(x_label, 60), "text-anchor:middle")
        self._y = self._bottom + 30
        if len(names) > 1:
            self._legend([short(name, 40) for name in names])
        self._root.set("viewBox", f"0 0 {_WIDTH:g} {self._y + 5:g}")
        return ET.tostring(self._root, encoding="unicode")

    def _legend(self, names: Sequence[str]) -> None:
        longest = max(map(len, names))
        columns = 3 if longest < 14 else 2 if longest < 26 else 1
        for number, name in enumerate(names):
            x = number % columns * _WIDTH / columns
            self._y += 0 if number % columns else 14
            self._path(f"M{x:.1f} {self._y - 3:.1f}h20", _stroke(number))
            self._text(x + 25, self._y, name)


def _stroke(number: int) -> str:
    dashes = _DASHES[number % len(_DASHES)]
    return f"stroke:{PALETTE[number % len(PALETTE)]};stroke-width:1.8" + (
        f";stroke-dasharray:{dashes}" if dashes else ""
    )


def _tick(value: float, ticks: Sequence[float]) -> str:
    """Return the name of a tick, with as many digits as tell it from its neighbours."""
    gaps = [b - a for a, b in itertools.pairwise(ticks)]
    size = max(map(abs, ticks), default=1.0)
    if size >= 1e6 or 0 < size < 1e-3 or (gaps and max(gaps) > 1.5 * min(gaps)):  # decades
        return f"{value:g}" if 1e-4 <= value < 1e6 else f"{value:.3g}"
    digits = max(0, -math.floor(math.log10(min(gaps)) + 1e-9)) if gaps else 3
    return f"{value:,.{digits}f}"
