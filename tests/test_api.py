"""What the README promises of `import lopt`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lopt

ROOT = Path(__file__).parents[1]


def test_public_names_exist() -> None:
    assert all(getattr(lopt, name) is not None for name in lopt.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = lopt.nothing


def test_the_core_needs_no_trl() -> None:
    code = "import sys, lopt, lopt.optim; assert 'trl' not in sys.modules and 'datasets' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_readmes_tree_is_true() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## Where things are")[1].split("```")[1]
    named = set(re.findall(r"(\w+\.(?:py|md|toml|txt))", tree)) | set(re.findall(r"(\w+)/ ", tree))
    files = [
        p.relative_to(ROOT) for p in ROOT.rglob("*.py") if p.is_relative_to(ROOT / "src") or p.parent == ROOT
    ]
    for path in files:
        assert path.name in named or path.name == "__init__.py", f"{path} is not in the README's tree"
    everything = {
        p.name
        for folder in ("src", "docs", "tests", "benchmarks", "scripts")
        for p in (ROOT / folder).rglob("*")
    }
    everything |= {p.name for p in ROOT.iterdir()}
    assert named <= everything, named - everything
    assert not re.search(r"\bCOLDSTART\b", text)
