"""The short form of benchmarks/kill.py: SIGKILL at random moments, resumed, the same weights bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kill.py"
RUNS = 6


def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    output = tmp_path / "kill.json"
    subprocess.run(
        [sys.executable, str(SCRIPT), "--runs", str(RUNS), "--kinds", "eager", "--output", str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    result = json.loads(output.read_text())
    assert result["summary"]["runs"] == result["summary"]["identical"] == RUNS, result
    assert result["summary"]["kills"] >= RUNS and not result["summary"]["damaged_chosen"]
    assert not any(
        why
        for run in result["kinds"]["eager"]["runs"]
        for kill in run["kills"]
        for why in kill["checkpoints"].values()
    )
