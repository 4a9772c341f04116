"""The output folder: nothing in it is lost or mixed up with another run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lopt.checkpoint import WRITING, find_checkpoint

_SIGNS_OF_A_RUN = ("config.json", "trainer_state.json", "adapter_config.json", "results.json")


def prepare_output(output_dir: str, *, resume: str | None, overwrite: bool) -> str | None:
    """Check `output_dir` before any work; returns the checkpoint to go on from, if any.

    Args:
        resume: `auto` for the newest whole checkpoint, or a checkpoint.

    Raises:
        ValueError: it is not a writable folder, holds a run, or has nothing whole to resume.
    """
    folder = Path(output_dir)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite_output_dir contradict each other: give one of them")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: choose a folder")
    checkpoints = sorted(folder.glob("checkpoint-*")) if folder.exists() else []
    if resume:
        if folder.exists():
            _check_writable(folder)
        return find_checkpoint(str(folder), resume)
    if checkpoints or any((folder / name).exists() for name in _SIGNS_OF_A_RUN):
        if not overwrite:
            raise ValueError(
                f"--output_dir {folder} holds a run already: go on with --resume, start anew with "
                "--overwrite_output_dir, or choose another folder"
            )
        for checkpoint in checkpoints:
            shutil.rmtree(checkpoint)
        shutil.rmtree(folder / WRITING, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    _check_writable(folder)
    return None


def _check_writable(folder: Path) -> None:
    """By writing, which finds read-only disks that permissions do not show."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder} cannot be written to ({error.strerror}): choose another folder"
        ) from error


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
    _check_writable(folder)
    return folder
