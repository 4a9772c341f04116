"""Self-contained HTML pages: tables, sample answers and figures.

A page is one file that runs and fetches nothing, follows the reader's light or dark mode, fits a phone,
prints, and is the same bytes for the same input. Text from data or a model is escaped here: callers pass
plain text, and only the strings that these functions return are HTML. Plots are in `lopt.reports.plots`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

# The last two groups are marks that turn the order of the text around them, beyond their own end.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff\u202a-\u202e\u2066-\u2069]"
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
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
h2,h3,caption,thead{break-after:avoid} tr,thead,.sample{break-inside:avoid}
.figures{grid-template-columns:1fr 1fr} .wide{overflow:visible} table{font-size:7.5pt}
th,td{min-width:0;padding-right:.4rem} .panes{grid-template-columns:repeat(3,1fr)}}
"""


def text(value: object) -> str:
    """Return `value` as HTML text: escaped, with characters that no document may hold replaced."""
    return html.escape(clean(value))


def paragraph(value: object, kind: str = "") -> str:
    """Return a paragraph of plain text; `kind` is '', 'lede' (the result, in large type) or 'note'."""
    return f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>"


def table(
    headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str, numeric: Collection[int] = ()
) -> str:
    """Return a table whose first column names its rows; `numeric` columns are aligned to the right."""

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
    """Return texts beside each other (below each other on a phone), line breaks and spaces kept."""

    def verbatim(value: str) -> str:
        # An HTML parser drops the first line break of a <pre>: this one, so that the text keeps its own.
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
    """Return a plot with a line of plain text below it."""
    return f"<figure>{svg}<figcaption>{text(caption)}</figcaption></figure>\n"


def figures(parts: Iterable[str]) -> str:
    """Return a grid of figures, as many beside each other as fit; '' if there are none."""
    body = "".join(parts)
    return f'<div class="figures">\n{body}</div>' if body else ""


def page(title: str, sections: Iterable[tuple[str, str]], subtitle: str = "") -> str:
    """Return a whole HTML document of (heading, HTML) sections; empty headings and sections are left out."""
    blocks = [
        f"<section>{f'<h2>{text(heading)}</h2>' if heading else ''}\n{body}\n</section>\n"
        for heading, body in sections
        if body
    ]
    below = f'<p class="subtitle">{text(subtitle)}</p>' if subtitle else ""
    # The policy is a second lock behind the escaping: a browser runs and fetches nothing.
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
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


def clean(value: object) -> str:
    """Return `value` as text without characters that no document may hold."""
    return _UNPRINTABLE.sub("\ufffd", str(value))
