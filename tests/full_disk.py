"""Trainings on a small disk that fills up; run by test_full_disk.py in a mount namespace of its own.

unshare --map-root-user --mount python tests/full_disk.py MODEL ROWS MOUNT_POINT RESULT
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from lopt.cli.main import main
from lopt.reliability.checkpoint import WRITING, checkpoints, damage

ROOM = 64 * 2**20
model, rows, disk, result = map(Path, sys.argv[1:])


def mount(*options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(disk)], check=True)


def sft(folder: Path, *flags: str) -> tuple[int, str]:
    """Exit code and the last line of what is said about errors."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(
            ["sft", "--model_name_or_path", str(model), "--train_file", str(rows),
             "--output_dir", str(folder),
             "--max_steps", "4", "--save_steps", "1", "--save_total_limit", "3", "--head_warmup_steps", "2",
             "--learning_rate", "1e-3", "--disable_tqdm", "true", *flags]
        )  # fmt: skip
    return code, said.getvalue().strip().splitlines()[-1] if said.getvalue().strip() else ""


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def state(folder: Path) -> dict[str, Any]:
    return {
        "checkpoints": {path.name: damage(path) for path in checkpoints(folder)},
        "writing": (folder / WRITING).exists(),
        "model": (folder / "config.json").exists(),
    }


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


mount("-o", f"size={ROOM}")
whole = disk / "whole"
assert sft(whole)[0] == 0
one, expected = size(checkpoints(whole)[-1]), weights(whole)
subprocess.run(["rm", "-r", str(whole)], check=True)

found: list[dict[str, Any]] = []
# From hardly room for one checkpoint to room for all three and the one being written, but no model beside.
for number, share in enumerate((0.5, 1.9, 4.1)):
    folder = disk / f"run-{number}"
    mount("-o", f"remount,size={int(one * share) // 4096 * 4096}")
    code, message = sft(folder)
    entry = {"share": share, "code": code, "message": message, **state(folder)}
    mount("-o", f"remount,size={ROOM}")
    if folder.exists():
        resumed = sft(folder, *(["--resume"] if entry["checkpoints"] else ["--overwrite_output_dir"]))
        entry["end"] = [resumed[0], resumed[1], resumed[0] == 0 and weights(folder) == expected]
        subprocess.run(["rm", "-r", str(folder)], check=True)
    found.append(entry)

folder = disk / "read-only"
assert sft(folder, "--max_steps", "2")[0] == 0
mount("-o", "remount,ro")
read_only = [
    sft(folder, "--resume"),
    sft(disk / "new"),
    [state(folder)["checkpoints"], weights(folder) != ""],
]
result.write_text(json.dumps({"full": found, "read_only": read_only}, indent=1))
