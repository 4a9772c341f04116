"""Where a result comes from: versions, git state, machine, rows."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from lopt.version import __version__

PACKAGES = (
    *("lopt", "torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors", "numpy"),
    *("peft", "torchao", "lm_eval", "reasoning-gym", "math-verify", "vllm"),
)
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "CUDA_LAUNCH_BLOCKING", "NCCL_ALGO"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "WORLD_SIZE", "PYTHONHASHSEED", "HF_HUB_OFFLINE"),
)
"""Environment variables that change results or speed; no other is recorded, since some hold secrets."""


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return the versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = __version__ if name == "lopt" else importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> str:
    """Return the device that computes, in words."""
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    return f"{name} ({platform.machine()})"


def environment() -> dict[str, Any]:
    """Return machine, Python and the environment variables that matter."""
    return {
        "device": device(),
        "devices": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def git_states() -> dict[str, dict[str, Any]]:
    """Return the git state of lopt's source and of the working folder, where these lie in a repository."""
    folders = {"lopt": Path(__file__).parents[1], "working_folder": Path.cwd()}
    found = {name: git_state(folder) for name, folder in folders.items()}
    return {name: state for name, state in found.items() if state is not None}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit and the number of files that differ from it; None without repository or git."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain")
    if commit is None or changed is None:
        return None
    return {"commit": commit.strip(), "changed_files": len(changed.splitlines())}


def _git(folder: Path, *arguments: str) -> str | None:
    # A repository's own settings must not start programs.
    command = ["git", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def fingerprint(rows: Iterable[Any]) -> str:
    """Return the first 16 digits of the SHA-256 over rows in their order, as JSON."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()[:16]
