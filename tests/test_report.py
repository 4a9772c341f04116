"""The HTML reports: escaped, well formed, the same bytes every time, and honest in their first sentence."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

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


def test_plots_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=r'pip install "lopt\[demo\]"'):
        report.bar_plot(["a"], {"b": [1]}, title="t", alt="a")


# --- with matplotlib ---


def _line(series: dict[str, Any] | None = None, title: str = "Loss", **options: Any) -> str:
    pytest.importorskip("matplotlib")
    series = series or {"a": [(0, 1.0), (1, 2.0)], "b": [(0, 2.0), (1, float("nan"))]}
    labels = {"x_label": "step", "y_label": "nats", "alt": "two lines", **options}
    return report.line_plot(series, title=title, **labels)


def _check_svg(svg: str) -> ET.Element:
    root = ET.fromstring(svg)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("role") == "img" and root.get("aria-label")
    assert root.find("{*}title") is not None
    assert root.get("viewBox") and root.get("width") == "100%" and root.get("height") is None
    assert root.find(".//{*}style") is None and root.find(".//{*}metadata") is None
    assert "currentColor" in svg and "#010203" not in svg
    ids = {e.get("id") for e in root.iter() if e.get("id")}
    links = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    assert links == ids
    return root


def test_line_plot() -> None:
    root = _check_svg(_line())
    words = [e.text for e in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Loss", "step", "nats"} <= set(words)
    assert any((word or "").strip() == "b" for word in words)


def test_log_plot_leaves_out_what_has_no_logarithm() -> None:
    _check_svg(_line({"a": [(0, 0.0), (1, 0.5), (2, 50.0), (3, -1.0)], "empty": []}, log_y=True))
    _check_svg(_line({"a": [(1, 0.47), (2, 0.46)]}, log_y=True))


@pytest.mark.parametrize("stacked", [False, True])
def test_bar_plot(stacked: bool) -> None:
    pytest.importorskip("matplotlib")
    series = {"weights": [1.0, 2.0], "activations": [3.0, 4.5]}
    svg = report.bar_plot(["e2e", HOSTILE], series, title="Memory", alt="bars", stacked=stacked)
    words = "".join(_check_svg(svg).itertext())
    assert ("6.5" in words) == stacked
    assert ("4.5" in words) != stacked
    assert "weights" in words and "activations" in words


def test_hostile_plot_texts_stay_text() -> None:
    svg = _line({HOSTILE: [(0, 1)], "_b": [(0, 2)]}, HOSTILE, x_label=HOSTILE, y_label=HOSTILE, alt=HOSTILE)
    root = _check_svg(svg)
    assert "<script" not in svg and "<img" not in svg
    assert {e.tag.split("}")[-1] for e in root.iter()} <= {
        "svg", "title", "g", "path", "text", "tspan", "defs", "use", "clipPath", "rect",
    }  # fmt: skip


def test_plots_are_the_same_bytes_and_ids_do_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    first = _line()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    assert _line() == first
    assert matplotlib.rcParams["font.size"] == 30
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, _line(title="Other"))]
    assert ids[0] and not ids[0] & ids[1]


def test_plots_leave_pyplot_alone() -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys\nfrom lopt.report import line_plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "line_plot({'a': [(0, 1)]}, title='t', x_label='x', y_label='y', alt='a')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_drawing_of_the_method_is_well_formed() -> None:
    drawing = Path(__file__).parents[1] / "docs" / "method.svg"
    root = ET.parse(drawing).getroot()
    assert (root.findtext("{*}title") or "").strip() and (root.findtext("{*}desc") or "").strip()
    assert "<script" not in drawing.read_text(encoding="utf-8")
