"""The HTML reports: escaped, well formed, the same bytes every time, and honest in their first sentence."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

from lopt.reports import page as report
from pages import HOSTILE, ParsedPage


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
    shown = ParsedPage(page)
    assert not {"script", "img", "link", "iframe"} & set(shown.tags)
    assert shown.seen.count("<script>alert(1)</script>\"'><img src=x onerror=y>&amp; $x_1^$") == 14
    page.encode("utf-8")


def test_first_line_break_of_a_sample_is_kept() -> None:
    assert '<pre dir="auto">\n\n  two</pre>' in report.side_by_side([report.Pane("After", "\n  two")])
    assert "(nothing)" in report.side_by_side([report.Pane("After", " \n")])


def test_the_drawing_of_the_method_is_well_formed() -> None:
    drawing = Path(__file__).parents[2] / "docs" / "assets" / "method.svg"
    root = ET.parse(drawing).getroot()
    assert (root.findtext("{*}title") or "").strip() and (root.findtext("{*}desc") or "").strip()
    assert "<script" not in drawing.read_text(encoding="utf-8")
