"""The output folder: nothing in it is lost or mixed up with another run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

_SIGNS_OF_A_RUN = ("config.json", "trainer_state.json", "adapter_config.json", "results.json")


def prepare_output(output_dir: str, *, resume: bool, overwrite: bool) -> str | None:
    """Check `output_dir` before any work; returns the checkpoint to go on from, if any.

    Raises:
        ValueError: it is not a writable folder, holds a run, or has nothing to resume.
    """
    folder = Path(output_dir)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite_output_dir contradict each other: give one of them")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: choose a folder")
    checkpoints = sorted(folder.glob("checkpoint-*")) if folder.exists() else []
    if resume:
        last = get_last_checkpoint(str(folder)) if checkpoints else None
        if last is None:
            raise ValueError(
                f"--resume: there is no checkpoint in {folder}: check --output_dir or leave --resume out"
            )
        return last
    if checkpoints or any((folder / name).exists() for name in _SIGNS_OF_A_RUN):
        if not overwrite:
            raise ValueError(
                f"--output_dir {folder} holds a run already: go on with --resume, start anew with "
                "--overwrite_output_dir, or choose another folder"
            )
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be written to: choose another folder")
    return None


def prepare_report(output_dir: str, names: Sequence[str], *, overwrite: bool) -> Path:
    """A writable folder for a report of the files `names`; nothing else in it is touched.

    Raises:
        ValueError: it is not a writable folder, or holds such a report.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: choose a folder")
    if not overwrite and any((folder / name).exists() for name in names):
        raise ValueError(
            f"--output_dir {folder} holds a report already: replace it with --overwrite_output_dir, or "
            "choose another folder"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--output_dir {folder} cannot be written to: choose another folder")
    return folder
