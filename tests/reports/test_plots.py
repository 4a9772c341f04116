"""Plots: well-formed SVG that scales, hostile names stay text, the same bytes every time."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from math import nan
from typing import Any

import pytest

from lopt.reports import lines, plots
from lopt.reports.plots import Estimate
from pages import HOSTILE


def test_plots_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(ImportError, match=r'pip install "lopt\[demo\]"'):
        plots.bar_plot(["a"], {"b": [1]}, title="t", alt="a")


# --- with matplotlib ---


def _line(series: dict[str, Any] | None = None, title: str = "Loss", **options: Any) -> str:
    series = series or {"a": [(0, 1.0), (1, 2.0)], "b": [(0, 2.0), (1, float("nan"))]}
    labels = {"x_label": "step", "y_label": "nats", "alt": "two lines", **options}
    return lines.line_plot(series, title=title, **labels)


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
    svg = plots.bar_plot(["e2e", HOSTILE], series, title="Memory", alt="bars", stacked=stacked)
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


def test_default_text_alternatives_name_places_and_measures() -> None:
    series = {"lopt": [(1, 6.283), (40, 5.1)]}
    root = ET.fromstring(_line(series, alt=""))
    assert root.get("aria-label") == "Loss: lopt from 6.28 at step 1 to 5.1 at step 40."
    root = ET.fromstring(_line({"lopt": [(0, 0.0), (4, 0.25)]}, "Distance", alt="", place="after layer"))
    assert root.get("aria-label") == "Distance: lopt from 0 after layer 0 to 0.25 after layer 4."
    points = {"e2e": [(Estimate(6.283, 6, 7), Estimate(-0.01, -0.02, 0))]}
    labels = {
        "x_label": "task loss, nats (lower is better)",
        "y_label": "change of scores (higher is better)",
    }
    root = ET.fromstring(plots.scatter_plot(points, title="Both", **labels))
    assert root.get("aria-label") == "Both: e2e task loss 6.283, change of scores -0.01."


def test_plots_are_the_same_bytes_and_ids_do_not_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    point = {"a": [(Estimate(1, 0, 2), Estimate(1, 0, 2))]}

    def made(title: str = "Loss") -> str:
        return plots.scatter_plot(point, title=title, x_label="x", y_label="y")

    first = made()
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 30)
    assert made() == first
    assert matplotlib.rcParams["font.size"] == 30
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, made("Other"))]
    assert ids[0] and not ids[0] & ids[1]


def test_plots_leave_pyplot_alone_and_lines_need_no_matplotlib() -> None:
    pytest.importorskip("matplotlib")
    code = (
        "import sys\nfrom lopt.reports.lines import line_plot\nfrom lopt.reports.plots import bar_plot\n"
        "line_plot({'a': [(0, 1)]}, title='t', x_label='x', y_label='y', alt='a')\n"
        "assert not {'matplotlib', 'scipy'} & sys.modules.keys()\n"
        "bar_plot(['a'], {'b': [1]}, title='t', alt='a')\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interval_plot_leaves_gaps_and_shows_every_series() -> None:
    pytest.importorskip("matplotlib")
    series = {"lopt": [Estimate(0.1, -0.1, 0.3), None], HOSTILE: [Estimate(0.2, nan, 0.3), Estimate(1, 1, 1)]}
    root = _check_svg(plots.interval_plot(["mmlu", HOSTILE], series, title="t", x_label="x", alt="a"))
    words = "".join(root.itertext())
    assert "lopt" in words and "mmlu" in words


def test_scatter_plot_names_every_point() -> None:
    pytest.importorskip("matplotlib")
    points = {f"m{i}": [(Estimate(i, i - 1, i + 1), Estimate(1, 0.5, 1.5))] * 2 for i in range(9)}
    root = _check_svg(plots.scatter_plot(points, title="t", x_label="x", y_label="y", alt="a"))
    assert all(f"m{i}" in "".join(root.itertext()) for i in range(9))


def test_marks_are_beside_the_lines_and_not_in_the_legend() -> None:
    words = "".join(_check_svg(_line(marks={0.5: "block 2"})).itertext())
    assert words.count("block 2") == 1
