"""Every kind of page in a browser, on a phone and on a desktop: nothing sticks out, nothing is too small."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from lopt.compare.page import write_page
from lopt.demo_report import write_demo_report

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LOOK = """
const page = frame.contentDocument, width = page.documentElement.clientWidth;
const seen = [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().height);
const told = e => e.tagName + ": " + e.textContent.trim().slice(0, 40);
const letters = [...page.querySelectorAll("text, p, td, th, figcaption")].filter(e => e.textContent.trim());
document.title = JSON.stringify({
  overflow: page.documentElement.scrollWidth - width,
  out: seen.filter(e => e.getBoundingClientRect().right > width + 1 && !e.closest(".wide")).map(told),
  small: letters.filter(e => e.getClientRects().length && size(e) < 8).map(told),
});
function size(e) {
  const scale = e.ownerSVGElement ? e.getScreenCTM().a : 1;
  return parseFloat(page.defaultView.getComputedStyle(e).fontSize) * scale;
}
"""


def demo(folder: Path) -> Path:
    return write_demo_report(json.loads((RESULTS / "demo.json").read_text()), folder)


def compare(folder: Path) -> Path:
    return write_page(json.loads((RESULTS / "compare_gsm8k.json").read_text()), folder / "report.html")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("make", [demo, compare])
def test_it_fits(make, width: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = html.escape(make(tmp_path).read_text(encoding="utf-8"), quote=True)
    frame = f'<iframe id="frame" style="border:0;width:{width}px;height:900px" srcdoc="{source}"></iframe>'
    look = tmp_path / "look.html"
    look.write_text(f'<meta charset="utf-8">{frame}<script>onload = () => {{ {LOOK} }}</script>')
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'b'}",
    ]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom", look.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    title = re.search(r"<title>(.*?)</title>", shown.split("</iframe>")[-1] + shown, re.S)
    assert title is not None
    found = json.loads(html.unescape(title[1]))
    assert found == {"overflow": 0, "out": [], "small": []}
