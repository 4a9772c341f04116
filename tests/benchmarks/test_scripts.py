"""Each benchmark starts; the ones for a GPU run through on a CPU with a tiny shape."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if "\ndef main(" in path.read_text())


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

    flags = ["--device", "cpu", "--shape", "tiny", "--output", str(tmp_path / "gpu.json")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *flags])
    gpu.main()
    cases = json.loads((tmp_path / "gpu.json").read_text())["cases"]
    assert cases["parity"]["met"]
    assert not [name for name, found in cases.items() if "error" in found]
    planned = {n: found["measured over planned"] for n, found in cases.items() if "planned GiB" in found}
    assert len(planned) >= 6 and planned == pytest.approx(dict.fromkeys(planned, 1), abs=0.05)
