"""The HTML reports: escaped, well formed, the same bytes every time, and honest in their first sentence."""

from __future__ import annotations

import copy
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


def _results(**changes: Any) -> dict[str, Any]:
    side = {"loss": 2.0, "accuracy": 2 / 64, "correct": 2, "total": 64, "retention_loss": 3.2}
    steps = [
        {
            "step": i,
            "loss": 2.0 / i,
            "local_loss": [0.5 / i],
            "gradient_share": [0.1, 0.9],
            "seconds": 4.0,
            "tokens_per_second": 700.0,
        }
        for i in (1, 2, 3)
    ]
    sample = {"question": "1 + 1?", "reference": "2", "before": "", "after": "\n 2"}
    return {
        "title": "LoPT demo",
        "model": "tiny",
        "task": "sums",
        "method": "lopt",
        "num_blocks": 2,
        "blocks": ["layers 0-8", "layers 9-17"],
        "settings": {"learning_rate": 2e-5},
        "versions": {"torch": "2.13"},
        "date": "2026-01-15",
        "device": "cpu",
        "before": side,
        "after": {**side, "loss": 0.6, "accuracy": 47 / 64, "correct": 47, "retention_loss": 3.22},
        "samples": [{**sample, "before_correct": False, "after_correct": True}],
        "train": steps,
        "curve": [{"step": i, "loss": 2.0 - i / 10, "retention_loss": 3.2} for i in (0, 5, 10)],
        "head_warmup": [{"step": i, "local_loss": [1.0 / i]} for i in (1, 2, 3)],
        "memory": {"parameters": 2**30, "gradients": 2**29, "optimizer": 3 * 2**20, "activations": 100},
        "seconds_per_step": 4.6,
        "total_seconds": 340.0,
        **changes,
    }


def _sentence(correct: tuple[int, int], retention: tuple[float, float], total: int = 64) -> str:
    results = copy.deepcopy(_results())
    for side, count, loss in zip(("before", "after"), correct, retention, strict=True):
        share = count / total if total else 0.0
        results[side] |= {"correct": count, "total": total, "accuracy": share, "retention_loss": loss}
    return report.result_sentence(results)


def test_sentence_better_and_worse() -> None:
    assert _sentence((2, 47), (3.2, 3.22)) == (
        "In 5 min 40 s on this machine (cpu), held-out exact answers improved from 2 of 64 to 47 of 64, "
        "while loss on unrelated text got worse, from 3.20 to 3.22."
    )
    worse = _sentence((47, 2), (3.22, 3.2))
    assert "exact answers got worse, from 47 of 64 to 2 of 64" in worse
    assert "unrelated text improved from 3.22 to 3.20" in worse


def test_sentence_equal_and_unknown() -> None:
    same = _sentence((5, 5), (3.2, 3.2))
    assert "answers stayed at 5 of 64, while loss on unrelated text stayed at 3.20." in same
    assert "stayed at about 3.20." in _sentence((5, 5), (3.2, 3.201))
    assert "went from 3.20 to nan" in _sentence((5, 5), (3.2, float("nan")))
    assert "no held-out answers were checked" in _sentence((0, 0), (3.2, 3.2), total=0)


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.05, "0.05 s"),
        (4.62, "4.6 s"),
        (9.96, "10 s"),
        (59.7, "1 min 00 s"),
        (340, "5 min 40 s"),
        (3660, "1 h 01 min"),
    ],
)
def test_durations(seconds: float, shown: str) -> None:
    results = _results(total_seconds=seconds)
    assert report.result_sentence(results).startswith(f"In {shown} on")


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # Brown, Cai, DasGupta 2001; z² / (n + z²)
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (81, 263, 0.255289, 0.366210),  # Newcombe 1998, table 1, method 3: .2553 to .3662
        (1, 29, 0.006113, 0.171755),  # same table: .0061 to .1718
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert report.wilson_interval(correct, total) == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize(("correct", "total"), [(1, 0), (0, 0), (3, 2), (-1, 5)])
def test_wilson_interval_refuses(correct: int, total: int) -> None:
    with pytest.raises(ValueError, match="is not a share"):
        report.wilson_interval(correct, total)


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


def test_demo_page() -> None:
    pytest.importorskip("matplotlib")
    results = _results()
    source = report.demo_page(results)
    page = _Page(source)
    assert page.tags.count("svg") == 6
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "url(http" not in source and "@import" not in source
    assert report.result_sentence(results) in page.seen
    for shown in (
        "−1.400 better",
        "+0.020 worse",
        "0.9–10.7\u00a0%",
        "+70.3 points better",
        "1.00 GiB",
        "1.50 GiB",
    ):
        assert shown in page.seen
    assert source == report.demo_page(copy.deepcopy(results))


def test_demo_page_without_the_optional_parts() -> None:
    pytest.importorskip("matplotlib")
    results = _results(method="e2e", num_blocks=1, blocks=["layers 0-17"], head_warmup=[])
    del results["curve"]
    for step in results["train"]:
        step |= {"local_loss": [], "gradient_share": [1.0]}
    page = _Page(report.demo_page(results))
    assert page.tags.count("svg") == 3
    assert "1 block:" in page.seen and "reconstructing" not in page.seen


def test_demo_page_says_when_the_numbers_do_not_settle_it() -> None:
    pytest.importorskip("matplotlib")
    close = _results(after={**_results()["before"], "correct": 4, "accuracy": 4 / 64})
    assert "do not settle" in report.demo_page(close)
    assert "do not settle" not in report.demo_page(_results())


def _poison(value: Any) -> Any:
    """Every text field, names included where they are free, replaced by a hostile string."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [_poison(item) for item in value]
    if isinstance(value, dict):
        return {key: _poison(item) for key, item in value.items()}
    return value


def test_demo_page_escapes_every_text() -> None:
    pytest.importorskip("matplotlib")
    results = _poison(_results())
    for part in ("settings", "versions"):
        results[part] = {HOSTILE: HOSTILE}
    results["memory"] = {HOSTILE: 1024}
    source = report.demo_page(results)
    assert "<script" not in source and "<img" not in source
    page = _Page(source)
    assert not {"script", "img"} & set(page.tags)
    assert page.seen.count("<script>alert(1)</script>") >= 15


def test_write_demo_report_writes_one_file(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = report.write_demo_report(_results(), tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "report.html"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == report.demo_page(_results())


def test_the_drawing_of_the_method_is_well_formed() -> None:
    drawing = Path(__file__).parents[1] / "docs" / "method.svg"
    root = ET.parse(drawing).getroot()
    assert (root.findtext("{*}title") or "").strip() and (root.findtext("{*}desc") or "").strip()
    assert "<script" not in drawing.read_text(encoding="utf-8")
