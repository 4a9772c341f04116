"""Each benchmark starts; the ones for a GPU run through on a CPU with a tiny shape."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "small_model")


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_starts(script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    module = importlib.import_module(script)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        module.main()
    shown = capsys.readouterr().out
    assert module.__doc__.splitlines()[0] in shown and "--output" in shown


def test_the_phases_of_stop_exist() -> None:
    """It wraps functions by name, private ones among them."""
    from stop import PHASES

    for _, owner, name in PHASES.values():
        assert callable(getattr(owner, name))


@pytest.mark.slow
def test_gpu_on_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import gpu

    flags = ["--device", "cpu", "--shape", "tiny", "--tokens", "32", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags, "--output", str(tmp_path / "gpu.json")])
    gpu.main()
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["on"] == "cpu" and {"peak", "offload", "equal memory"} <= found.keys()
    for row in found["peak"].values():
        assert row["measured over planned"] == pytest.approx(1, abs=0.05)
