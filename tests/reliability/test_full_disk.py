"""A real disk that fills up or is read-only, through the command line."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "full_disk.py"
UNSHARE = ["unshare", "--map-root-user", "--mount"]


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    command = [*UNSHARE, "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="this user may not mount a tmpfs in a namespace of its own")
def test_a_disk_that_is_full_or_read_only(tiny_folder: Path, sums_file: Path, tmp_path: Path) -> None:
    disk, result = tmp_path / "disk", tmp_path / "result.json"
    disk.mkdir()
    subprocess.run(
        [*UNSHARE, sys.executable, str(SCRIPT), str(tiny_folder), str(sums_file), str(disk), str(result)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
    )  # fmt: skip
    found = json.loads(result.read_text())
    for run in found["full"]:
        assert run["code"] == 2 and "lopt sft: error: " in run["message"], run
        assert re.search(r"has [\d.]+ \w+ left|[Nn]o space left on", run["message"]), run
        assert not any(run["checkpoints"].values()) and not run["writing"] and not run["model"], run
        assert run["end"][::2] == [0, True], run
    assert [len(run["checkpoints"]) for run in found["full"]][::2] == [0, 3]
    (resumed, resumed_says), (new, new_says), (checkpoints, has_model) = found["read_only"]
    assert resumed == new == 2 and has_model and checkpoints and not any(checkpoints.values())
    assert all("cannot be written to (Read-only file system)" in m for m in (resumed_says, new_says))
