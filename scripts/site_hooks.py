"""Hooks of the documentation site (mkdocs.yml)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
_CODE = re.compile(r"<code[^>]*>.*?</code>", re.DOTALL)
_FLAG = re.compile(r"(?<![\w-])--[a-z]\w+")
_FOREIGN = re.compile(
    r"""<(?:script|img|iframe|source)[^>]+src=["']?https?://|<link[^>]+rel=["']?stylesheet[^>]+https?://"""
)


def on_files(files: Files, config: Any) -> Files:
    """Publish the plots and pages of benchmarks/results, so that a page links them as the repository does."""
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.[sh][vt][gm]*")):
        file = File.generated(
            config,
            f"../benchmarks/results/{path.name}",
            abs_src_path=str(path),
            inclusion=InclusionLevel.INCLUDED,  # a path that begins with a dot is excluded by default
        )
        file.dest_uri = f"results/{path.name}"
        files.append(file)
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Keep a flag in running text on one line: browsers break it behind its dashes."""
    parts = re.split(r"(<pre.*?</pre>)", html, flags=re.DOTALL)
    for index in range(0, len(parts), 2):
        parts[index] = _CODE.sub(
            lambda code: _FLAG.sub(r'<span style="white-space: nowrap">\g<0></span>', code[0]), parts[index]
        )
    return "".join(parts)


def on_post_build(config: Any) -> None:
    """Fail if a page would load something from another host.

    Raises:
        PluginError: names the pages.
    """
    site = Path(config["site_dir"])
    foreign = [
        str(p.relative_to(site)) for p in site.rglob("*.html") if _FOREIGN.search(p.read_text("utf-8"))
    ]
    if foreign:
        raise PluginError(f"pages load files from other hosts: {', '.join(foreign)}")
