"""Releases that are too old are refused in one line; the bounds are those of pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest

import lopt
from lopt.cli.main import main
from lopt.requirements import OLDEST, check_installed

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def test_the_bounds_are_those_that_pip_sees() -> None:
    """And `make test-oldest` runs with them."""
    bounds = dict(re.split(r">=|,<", line)[:2] for line in PROJECT["dependencies"] if ">=" in line)
    assert OLDEST.items() <= bounds.items()
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints-oldest.txt").read_text().split() if "==" in line
    )
    for package, lowest in OLDEST.items():
        assert pinned[package] in (lowest, f"{lowest}.0"), package


def test_a_release_that_is_too_old_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    versions = dict(OLDEST) | {"datasets": "4.8.5", "torch": "2.11.0+cpu"}
    monkeypatch.setattr(importlib.metadata, "version", versions.__getitem__)
    message = 'lopt needs datasets >= 5.0 (4.8.5 is installed): pip install "datasets>=5.0"'
    assert main(["sft"]) == 2
    assert capsys.readouterr().err == f"lopt sft: error: {message}\n"
    vars(lopt).pop("LoPTSFTTrainer", None)
    with pytest.raises(ImportError, match=r"4\.8\.5 is installed"):
        lopt.LoPTSFTTrainer  # noqa: B018
    versions["datasets"] = "5.0.0"
    check_installed()
    with pytest.raises(ImportError, match=r"FSDP2 needs accelerate >= 1.15 \(1.12 is"):
        check_installed({"accelerate": "1.15"}, "FSDP2")
