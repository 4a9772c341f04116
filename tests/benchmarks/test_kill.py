"""Short forms of benchmarks/kill.py and stop.py: signals at random moments, resumed, the same weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RUNS = 3
PHASES = ("saving", "generation")  # the others are in trainers/test_stopping.py


def run(script: str, output: Path, *flags: str) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARKS / script), *flags, "--output", str(output)]
    subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return json.loads(output.read_text())


def test_killed_runs_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    result = run("kill.py", tmp_path / "kill.json", "--runs", str(RUNS), "--steps", "3", "--kinds", "eager")
    assert result["summary"]["runs"] == result["summary"]["identical"] == RUNS, result
    assert result["summary"]["kills"] >= RUNS and not result["summary"]["damaged_chosen"]
    assert not any(
        why
        for run in result["kinds"]["eager"]["runs"]
        for kill in run["kills"]
        for why in kill["checkpoints"].values()
    )


def test_a_stopped_run_leaves_whole_checkpoints_and_ends_soon(tmp_path: Path) -> None:
    result = run("stop.py", tmp_path / "stop.json", "--moments", "1", "--phases", *PHASES)
    assert set(result["summary"]) == set(PHASES)
    for phase, found in result["summary"].items():
        ended = found["exit_code_75"] + found["finished"]  # in the last save, a run just ends
        assert ended == found["identical"] == 1, (phase, result["phases"][phase])
        # On an idle machine under 10 s, see benchmarks/results/stop.json.
        assert found["damaged_checkpoints"] == 0 and found["longest_seconds"] < 120, (phase, found)
