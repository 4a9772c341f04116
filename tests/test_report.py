"""The HTML reports: escaped, well formed, the same bytes every time, and honest in their first sentence."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

from lopt import report

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=y>&amp; $x_1^$ ]]> --> \x00\x1b\ud800 _end"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class _Page(HTMLParser):
    """Checks that tags are balanced and ids unique, and collects tags and text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.seen = ""
        self.feed(source)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), (tag, name)
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.links.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.seen += data


def test_blocks_escape_and_keep_text() -> None:
    parts = [
        report.paragraph(HOSTILE),
        report.table([HOSTILE, "b"], [[HOSTILE, HOSTILE]], HOSTILE, numeric=(1,)),
        report.side_by_side([report.Pane(HOSTILE, HOSTILE, True)], heading=HOSTILE, prompt=HOSTILE),
        report.figure("<svg></svg>", HOSTILE),
    ]
    page = report.page(HOSTILE, [(HOSTILE, "".join(parts)), ("", "")], HOSTILE)
    assert "<script" not in page and "<img" not in page
    assert "\x00" not in page and "\ud800" not in page
    shown = _Page(page)
    assert not {"script", "img", "link", "iframe"} & set(shown.tags)
    assert shown.seen.count("<script>alert(1)</script>\"'><img src=x onerror=y>&amp; $x_1^$") == 14
    page.encode("utf-8")


def test_first_line_break_of_a_sample_is_kept() -> None:
    assert '<pre dir="auto">\n\n  two</pre>' in report.side_by_side([report.Pane("After", "\n  two")])
    assert "(nothing)" in report.side_by_side([report.Pane("After", " \n")])


def test_the_drawing_of_the_method_is_well_formed() -> None:
    drawing = Path(__file__).parents[1] / "docs" / "method.svg"
    root = ET.parse(drawing).getroot()
    assert (root.findtext("{*}title") or "").strip() and (root.findtext("{*}desc") or "").strip()
    assert "<script" not in drawing.read_text(encoding="utf-8")
