"""Every kind of page in a browser, on a phone, a desktop and paper: nothing sticks out or is too small."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from report_pages import PAGES

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = (360, 1280)
PAPER = 700  # A4 or letter at 96 dots an inch, less the margins; nothing scrolls there
LOOK = """
document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const page = frame.contentDocument, width = page.documentElement.clientWidth;
  const seen = [...page.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().height);
  const scrolls = frame.className == "paper" ? ".nothing" : ".wide";
  const told = e => e.tagName + ": " + e.textContent.trim().slice(0, 40);
  const letters = [...page.querySelectorAll("text, p, td, th, figcaption")].filter(e => e.textContent.trim());
  const scale = e => e.ownerSVGElement ? e.getScreenCTM().a : 1;
  const size = e => parseFloat(page.defaultView.getComputedStyle(e).fontSize) * scale(e);
  return {
    overflow: page.documentElement.scrollWidth - width,
    out: seen.filter(e => e.getBoundingClientRect().right > width + 1 && !e.closest(scrolls)).map(told),
    small: letters.filter(e => e.getClientRects().length && size(e) < 8).map(told),
  };
}));
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("make", PAGES)
def test_it_fits(make: Callable[[Path], Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    source = html.escape(make(tmp_path).read_text(encoding="utf-8"), quote=True)
    printed = source.replace("@media print", "@media all")
    assert printed != source
    frames = [_frame(width, source) for width in WIDTHS] + [_frame(PAPER, printed, "paper")]
    look = tmp_path / "look.html"
    look.write_text(f'<meta charset="utf-8">{"".join(frames)}<script>onload = () => {{ {LOOK} }}</script>')
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
    title = re.search(r"<title>(.*?)</title>", shown, re.S)  # the page's own is escaped in its frame
    assert title is not None
    assert json.loads(html.unescape(title[1])) == [{"overflow": 0, "out": [], "small": []}] * len(frames)


def _frame(width: int, source: str, kind: str = "") -> str:
    return f'<iframe class="{kind}" style="border:0;width:{width}px;height:900px" srcdoc="{source}"></iframe>'
