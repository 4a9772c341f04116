"""Self-contained HTML reports: figures, tables and sample answers, ready to be put on a page.

A page is one file that runs and fetches nothing, follows the reader's light or dark mode, fits a phone,
prints, and is the same bytes for the same input. Text from data or a model is escaped here: callers hand
over plain text, and only the strings these functions return are HTML. Plots need `lopt[demo]` (matplotlib).
"""

from __future__ import annotations

import html
import io
import math
import re
import textwrap
import xml.etree.ElementTree as ET
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

Points = Sequence[tuple[float, float]]

# Each colour has a contrast of 3:1 or more on the light and on the dark page, and neighbours differ for
# every common kind of colour blindness; dashes and markers say the same again.
PALETTE = ("#2a7fd4", "#d55e00", "#0b9a73", "#b9519f", "#94790a", "#7d7f88")
_INK = "#010203"  # stands for `currentColor`, which matplotlib does not know
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

_CSS = """
:root{color-scheme:light dark;--bg:#fdfcfa;--ink:#1d1f22;--soft:#5d6167;--line:#d9d6cf;--card:#f5f3ee;
--good:#0a6b50;--bad:#a8400a}
@media screen and (prefers-color-scheme:dark){:root{--bg:#15171a;--ink:#e7e5e0;--soft:#a2a5ab;
--line:#363a40;--card:#1d2024;--good:#4fc79f;--bad:#f0935a}}
*{box-sizing:border-box} html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);overflow-wrap:anywhere;
font:1.0625rem/1.55 Charter,"Iowan Old Style","Source Serif 4",Georgia,serif}
main{max-width:60rem;margin:0 auto;padding:2.5rem clamp(1rem,4vw,2.5rem) 4rem}
h1,h2,h3,table,figcaption,.subtitle{font-family:system-ui,sans-serif}
h1{font-size:1.375rem;line-height:1.3;margin:0;text-wrap:balance}
h2{font-size:1.0625rem;margin:3rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--line)}
h3{font-size:.8125rem;margin:0 0 .35rem;color:var(--soft);font-weight:600}
p{max-width:42rem;margin:.75rem 0} .note{color:var(--soft);font-size:.9375rem}
.subtitle{margin:.35rem 0 0;color:var(--soft);font-size:.875rem}
.lede{font-size:clamp(1.25rem,1rem + 1.3vw,1.625rem);line-height:1.4;max-width:48rem;
margin:2rem 0 1rem;text-wrap:pretty}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));
gap:1rem 2.5rem;align-items:start}
figure{margin:1rem 0;max-width:29rem;break-inside:avoid} figure svg{display:block;width:100%;height:auto}
figcaption,caption{color:var(--soft);font-size:.8125rem;line-height:1.45;margin-top:.5rem}
.wide{overflow-x:auto;margin:1.25rem 0} caption{text-align:left;padding-bottom:.6rem}
table{border-collapse:collapse;width:100%;font-size:.875rem;line-height:1.4}
th,td{text-align:left;vertical-align:baseline;padding:.4rem .75rem .4rem 0;min-width:3.5rem;
border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600;border-color:var(--soft)} tbody th{font-weight:500}
th{overflow-wrap:break-word}
tr>:last-child{padding-right:0} .num{text-align:right;overflow-wrap:normal;font-variant-numeric:tabular-nums}
.sample{margin:1.5rem 0 2.25rem} .sample>pre{margin:0 0 .9rem;max-width:48rem}
.panes{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,15rem),1fr));gap:.75rem}
.panes>div{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.7rem .85rem;
min-width:0;break-inside:avoid} .panes p{margin:0}
pre{margin:0;font:.8125rem/1.5 ui-monospace,"Cascadia Code",Menlo,Consolas,monospace;white-space:pre-wrap}
.mark{white-space:nowrap} .yes{color:var(--good)} .no{color:var(--bad)}
@media print{:root{color-scheme:light;--bg:#fff} body{font-size:10.5pt} main{max-width:none;padding:0}
h2,h3{break-after:avoid} tr,.sample{break-inside:avoid} .figures{grid-template-columns:1fr 1fr}
.panes{grid-template-columns:repeat(3,1fr)}}
"""


def text(value: object) -> str:
    """`value` as HTML text: escaped, with characters that no document may hold replaced."""
    return html.escape(_clean(value))


def paragraph(value: object, kind: str = "") -> str:
    """A paragraph of plain text; `kind` is '', 'lede' or 'note'."""
    return f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>"


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str, numeric: Collection[int] = ()
) -> str:
    """A table whose first column names its rows; `numeric` columns are aligned to the right."""

    def cells(row: Sequence[object], tags: Sequence[str]) -> str:
        kinds = [' class="num"' if i in numeric else "" for i in range(len(row))]
        parts = [f"<{t}{k}>{text(v)}</{t[:2]}>" for t, k, v in zip(tags, kinds, row, strict=True)]
        return f"<tr>{''.join(parts)}</tr>"

    head = cells(headers, ['th scope="col"'] * len(headers))
    body = "\n".join(cells(row, ['th scope="row"'] + ["td"] * (len(row) - 1)) for row in rows)
    return (
        f'<div class="wide"><table><caption>{text(caption)}</caption>\n'
        f"<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
    )


class Pane(NamedTuple):
    """One of several texts shown beside each other; `correct` adds a mark, None adds none."""

    heading: str
    content: str
    correct: bool | None = None


def side_by_side(panes: Iterable[Pane], *, heading: str = "", prompt: str = "") -> str:
    """Texts beside each other (below each other on a phone), line breaks and spaces kept."""

    def verbatim(value: str) -> str:
        # An HTML parser drops the first line break of a <pre>: give it one to drop.
        return f'<pre dir="auto">\n{text(value)}</pre>' if value.strip() else paragraph("(nothing)", "note")

    marks = {True: "✓ correct", False: "✗ not correct"}
    parts = [f"<h3>{text(heading)}</h3>" if heading else "", verbatim(prompt) if prompt else ""]
    parts.append('<div class="panes">')
    for pane in panes:
        kind = "yes" if pane.correct else "no"
        mark = "" if pane.correct is None else f' <span class="mark {kind}">{marks[pane.correct]}</span>'
        parts.append(f"<div><h3>{text(pane.heading)}{mark}</h3>{verbatim(pane.content)}</div>")
    return '<div class="sample">' + "\n".join([*parts, "</div></div>\n"])


def figure(svg: str, caption: str = "") -> str:
    """A plot with a line of plain text below it."""
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>\n"


def standalone(svg: str) -> str:
    """A plot for a file of its own, which has no page to inherit its text's colour from."""
    return svg.replace("currentColor", "#7a7f87")


def page(title: str, sections: Iterable[tuple[str, str]], subtitle: str = "") -> str:
    """A whole HTML document of (heading, HTML) sections; an empty heading is left out."""
    blocks = [
        f"<section>{f'<h2>{text(heading)}</h2>' if heading else ''}\n{body}\n</section>\n"
        for heading, body in sections
    ]
    below = f'<p class="subtitle">{text(subtitle)}</p>' if subtitle else ""
    # The policy is a second lock behind the escaping: a browser runs and fetches nothing.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<main>
<header><h1>{text(title)}</h1>{below}</header>
{"".join(blocks)}</main>
</body>
</html>
"""


def _clean(value: object) -> str:
    return _UNPRINTABLE.sub("\ufffd", str(value))


def _short(name: str, width: int) -> str:
    name = _clean(name)
    return name if len(name) <= width else name[: width - 1] + "…"


def line_plot(
    series: Mapping[str, Points], *, title: str, x_label: str, y_label: str, log_y: bool = False, alt: str
) -> str:
    """Lines over a common x axis, as inline SVG.

    Args:
        series: (x, y) points by name. Points that cannot be drawn (not finite, or not positive on a
            logarithmic axis) are left out.
        alt: what the figure shows, for who does not see it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    with _canvas(title, alt, height=3.1) as (fig, axes):
        for i, points in enumerate(series.values()):
            shown = [p for p in points if all(map(math.isfinite, p)) and (p[1] > 0 or not log_y)]
            look = {"color": PALETTE[i % len(PALETTE)], "linestyle": ("-", "--", "-.", ":")[i % 4]}
            marker = "os^Dvx"[i % 6] if len(shown) <= 25 else None
            axes.plot([x for x, _ in shown], [y for _, y in shown], lw=1.8, marker=marker, ms=4, **look)
        axes.set_xlabel(_clean(x_label))
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=7)
        if log_y:
            _log_axis(axes)
        axes.grid(axis="y", color=_INK, alpha=0.14, lw=0.7)
        _label(fig, axes, y_label, axes.lines, series)
        return _to_svg(fig, title, alt)


def bar_plot(
    groups: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    title: str,
    x_label: str = "",
    alt: str,
    stacked: bool = False,
    value: Callable[[float], str] = "{:.3g}".format,
) -> str:
    """Horizontal bars, as inline SVG: one row per group, one bar or stacked part per series.

    Args:
        groups: names of the rows, top to bottom.
        series: one length per group, by name; a legend is drawn if there are several.
        value: writes a bar's length (the sum, if stacked) at its end.

    Raises:
        ImportError: matplotlib is not installed.
    """
    slots = 1 if stacked else max(1, len(series))
    thick = 0.62 if slots == 1 else 0.8 / slots
    height = 1.1 + 0.34 * len(groups) * max(1.0, 0.7 * slots) + (0.3 if len(series) > 1 else 0)
    left = [0.0] * len(groups)
    with _canvas(title, alt, height) as (fig, axes):
        for i, lengths in enumerate(series.values()):
            rows = [g + (0 if stacked else (i - (slots - 1) / 2) * thick) for g in range(len(groups))]
            bars = axes.barh(rows, lengths, thick * 0.94, left=left, color=PALETTE[i % len(PALETTE)])
            ends = [a + b for a, b in zip(left, lengths, strict=True)]
            left = ends if stacked else left
            if not stacked or i == len(series) - 1:
                axes.bar_label(bars, [_clean(value(end)) for end in ends], padding=4)
        axes.set_yticks(range(len(groups)), [_short(group, 24) for group in groups])
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.xaxis.set_visible(False)  # every bar carries its number
        axes.spines["bottom"].set_visible(False)
        _label(fig, axes, x_label, axes.containers, series)
        return _to_svg(fig, title, alt)


@contextmanager
def _canvas(title: str, alt: str, height: float) -> Iterator[tuple[Any, Any]]:
    """A bare figure and axes under settings that no user's matplotlibrc can change."""
    try:
        import matplotlib.style
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "lopt[demo]"') from error
    inked = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    bare = ("axes.spines.top", "axes.spines.right", "axes.spines.left", "text.parse_math")
    rc = dict.fromkeys(inked, _INK) | dict.fromkeys(bare, False) | {"svg.fonttype": "none", "font.size": 9.5}
    # matplotlib makes ids from this salt: the same for the same figure, others for another figure.
    rc["svg.hashsalt"] = f"{_clean(title)} {_clean(alt)}"
    with matplotlib.style.context(rc, after_reset=True):
        # 360 units wide, so that 9.5 units of text stay readable where a phone shows the figure.
        fig = Figure(figsize=(5.0, height), layout="constrained")
        heading = "\n".join(textwrap.wrap(_clean(title), 50))
        fig.suptitle(heading, x=0.0, ha="left", fontsize=10.5, fontweight="bold")
        axes = fig.subplots()
        axes.tick_params(axis="y", which="both", length=0)
        yield fig, axes


def _label(fig: Any, axes: Any, label: str, handles: Sequence[Any], names: Iterable[str]) -> None:
    # Above the axis and level, so that nobody has to turn their head.
    axes.set_title(_clean(label), loc="left", fontsize=9.5, alpha=0.8)
    # matplotlib leaves out names that start with an underscore: the space keeps them.
    shown = [" " + _short(name, 40) for name in names]
    if len(shown) > 1:
        longest = max(map(len, shown))
        columns = 3 if longest < 14 else 2 if longest < 26 else 1
        fig.legend(handles, shown, loc="outside lower left", ncols=columns, frameon=False, handlelength=2.4)


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    decades = LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=12)
    axes.yaxis.set_major_locator(decades if high > 8 * low else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _to_svg(fig: Any, title: str, alt: str) -> str:
    """The figure as an SVG element that scales, takes the page's colour and leaves the page's style alone."""
    file = io.BytesIO()
    no_date = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    fig.savefig(file, format="svg", transparent=True, metadata=no_date)
    linked = set(re.findall(r'(?:href="|url\()#([^")]+)', file.getvalue().decode()))
    root = ET.fromstring(file.getvalue())
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
    root.attrib |= {"role": "img", "aria-label": _clean(alt), "stroke-linejoin": "round"}
    name = ET.Element("title")
    name.text = _clean(title)
    root.insert(0, name)
    return ET.tostring(root, encoding="unicode")


def _attribute(value: str) -> str:
    value = re.sub("'DejaVu Sans'[^;]*", "system-ui, sans-serif", " ".join(value.split()))
    return value.replace(_INK, "currentColor")
