"""The GPU benchmark runs on a CPU as well, so that it runs when there is a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import gpu


@pytest.mark.parametrize("case", ["peak", pytest.param("offload", marks=pytest.mark.slow)])
def test_benchmark(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    flags = ["--device", "cpu", "--shape", "tiny", "--tokens", "16", "--rounds", "1", "--prefetch", "0.001"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags, "--only", case, "--output", str(path)])
    gpu.main()
    found = json.loads(path.read_text())[case]
    if case == "peak":
        assert all(row["measured over planned"] == pytest.approx(1, abs=0.05) for row in found.values())
    else:
        assert found["block"][0]["peak GiB"] < found["none"][0]["peak GiB"]
