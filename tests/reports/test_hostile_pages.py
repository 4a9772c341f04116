"""Every page with hostile names, prompts and answers: no element and no attribute came from the data."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lopt.evaluation.statistics import Estimate
from lopt.reports import lines, plots
from lopt.reports.page import page, paragraph, table
from report_pages import PAGES, Hurt, demo, evaluation, retention

HOSTILE = (
    "</title></svg></style><script>alert(1)</script><img src=x onerror=alert(2)>\"'><a href=javascript:x>"
    "<!-- ]]> &#60;b&#62; {{x}} $\\frac$ "
    "\x00\x07\x1b]0;x\x07\x9b31m\ud800\udfff\ufffe \u202eevil\u2066\u202a _end"
)
LONG = HOSTILE + "<b onclick=x>" + "x" * 1_000_000
FORBIDDEN = "\x00\x07\x1b\x9b\ud800\ufffe\u202e\u202a\u2066"


def hurtful(name: str) -> str:
    return f"{name} {HOSTILE}"


# All elements that pages are made of, with their attributes.
OURS = {
    "html": "lang", "meta": "charset content http-equiv name", "th": "class scope", "pre": "dir",
    "svg": "aria-label role stroke-linejoin viewbox width xmlns", "g": "clip-path", "clippath": "id",
    "path": "clip-path d id style", "rect": "height width x y", "text": "style transform x y",
    "tspan": "style x y", "use": "href style x y", "!": "DOCTYPE html",
    **dict.fromkeys(["body", "caption", "defs", "figcaption", "figure", "h1", "h2", "h3", "head"], ""),
    **dict.fromkeys(["header", "main", "section", "style", "table", "tbody", "thead", "title", "tr"], ""),
    **dict.fromkeys(["div", "p", "span", "td"], "class"),
}  # fmt: skip


class Seen(HTMLParser):
    """Tags and the names of their attributes; links; every value and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.markup: set[tuple[str, str]] = set()
        self.links: set[str] = set()
        self.content: dict[str, str] = {}
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.markup |= {(tag, ""), *((tag, name) for name, _ in attrs)}
        self.links |= {str(value) for name, value in attrs if name.endswith(("href", "src", "action"))}
        if tag == "meta":
            self.content |= {str(dict(attrs).get("http-equiv")): str(dict(attrs).get("content"))}

    def handle_decl(self, decl: str) -> None:
        self.markup.add(("!", decl))

    def handle_comment(self, data: str) -> None:
        self.markup.add(("!--", data))


@pytest.fixture(autouse=True, scope="module")
def _matplotlib() -> None:
    pytest.importorskip("matplotlib")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("make", PAGES)
def test_markup_is_ours(make: Callable[[Path, Hurt], Path], tmp_path: Path) -> None:
    source = make(tmp_path, hurtful).read_text(encoding="utf-8")
    seen = Seen(source)
    for tag, attribute in seen.markup:
        assert tag in OURS and (not attribute or attribute in OURS[tag]), (tag, attribute)
    assert all(link.startswith("#") for link in seen.links)
    assert not any(char in source for char in FORBIDDEN)
    assert "script" not in {tag for tag, _ in seen.markup} and "alert(1)" in source
    policy = seen.content["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'") and "script" not in policy


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("make", [demo, evaluation, retention])
def test_a_megabyte_of_text(make: Callable[[Path, Hurt], Path], tmp_path: Path) -> None:
    started = time.perf_counter()
    hit: list[str] = []

    def once(name: str) -> str:
        """The first name and the first answer are a megabyte long."""
        long = name not in hit and len(hit) < 2
        hit.extend([name] * long)
        return LONG + name if name in hit[:2] else name

    source = make(tmp_path, once).read_text(encoding="utf-8")
    assert len(source) > 1_000_000 and time.perf_counter() - started < 60
    assert {tag for tag, _ in Seen(source).markup} <= OURS.keys()


@pytest.mark.filterwarnings("ignore:Glyph")
def test_every_plot_is_well_formed_whatever_it_is_told() -> None:
    one = Estimate(1.0, 0.5, 1.5)
    words: dict[str, Any] = {"title": LONG, "x_label": LONG, "alt": LONG}
    made = [
        lines.line_plot({LONG: [(0, 1), (1, 2)], "b": [(0, 1)]}, y_label=LONG, marks={1.0: LONG}, **words),
        plots.bar_plot([LONG, "b"], {LONG: [1, 2], "c": [1, 2]}, value=lambda _: LONG, **words),
        plots.interval_plot([LONG, "b"], {LONG: [one, None], "c": [one, one]}, **words),
        plots.scatter_plot({LONG: [(one, one)], "b": [(one, one)]}, y_label=LONG, **words),
    ]
    for svg in made:
        root = ET.fromstring(svg)
        names = {element.tag.split("}")[-1] for element in root.iter()}
        assert names <= {"svg", "title", "g", "path", "text", "tspan", "defs", "use", "clipPath", "rect"}
        assert not any(name.startswith("on") for element in root.iter() for name in element.attrib)


def test_a_page_of_nothing_else() -> None:
    parts = paragraph(LONG) + table([LONG, LONG], [[LONG, LONG]], LONG)
    seen = Seen(page(LONG, [(LONG, parts)], LONG))
    plain = Seen(page("a", [("a", paragraph("a") + table(["a", "a"], [["a", "a"]], "a"))], "a"))
    assert seen.markup == plain.markup
