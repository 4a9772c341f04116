"""The output folder: nothing in it is lost or mixed up with another run."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from lopt.reliability.checkpoint import WRITING, checkpoints, find_checkpoint
from lopt.reliability.manifest import Verify
from lopt.reliability.record import RUN_JSON, RUN_YAML, command_in

_SIGNS_OF_A_RUN = ("config.json", "trainer_state.json", "adapter_config.json", "results.json")

_REPLACED = ("README.md", "report.html", "report.json", RUN_YAML, RUN_JSON)
"""What a run writes from its start, or over what has this name."""
_OF_THE_RUN_BEFORE = (
    "trainer_state.json", "report.json", "report.html", "retention.html", "retention.svg", "all_results.json",
    "train_results.json", "eval_results.json",
)  # fmt: skip
_TRAINING = ("sft", "dpo", "grpo", "demo")


def check_output(
    output_dir: str,
    *,
    resume: str | None,
    overwrite: bool,
    resumable: bool = True,
    verify: Verify = "hash",
) -> str | None:
    """Check `output_dir` before any work, without changing it; return the checkpoint to resume, if any.

    Args:
        resume: `auto` for the newest whole checkpoint, or a checkpoint.
        resumable: False for a command that cannot resume, which the message then does not offer.
        verify: what is compared of a checkpoint.

    Raises:
        ValueError: It is not a writable folder, holds a run or files that a run would write over, or has no
            whole checkpoint to resume.
    """
    folder = Path(output_dir)
    if resume and overwrite:
        raise ValueError("--resume and --overwrite_output_dir contradict each other: give one of them")
    if not output_dir.strip():
        raise ValueError("--output_dir is empty: name a folder, or leave it out")
    check_writable(folder)
    if resume:
        return find_checkpoint(str(folder), resume, verify)
    if overwrite:
        return None
    if _holds_a_run(folder):
        resuming = "go on with --resume, " if resumable else ""
        raise ValueError(
            f"--output_dir {folder} holds a run already: {resuming}start anew with --overwrite_output_dir, "
            "or choose another folder"
        )
    there = [name for name in _REPLACED if (folder / name).exists()]
    if there and command_in(folder) not in _TRAINING:
        raise ValueError(
            f"--output_dir {folder} has files that the run would write over ({', '.join(there)}): choose "
            "another folder, or let them be replaced with --overwrite_output_dir"
        )
    return None


def check_apart(output_dir: str, command: str) -> None:
    """Refuse to write the results of `command`, which trains nothing, over the record of something else.

    Raises:
        ValueError: The folder is not writable, or holds a run, a model or what another command wrote.
    """
    folder = Path(output_dir)
    check_writable(folder)
    other = (folder / RUN_JSON).exists() and command_in(folder) != command
    if other or _holds_a_run(folder):
        raise ValueError(
            f"--output_dir {folder} holds a run, a model or the results of another command: choose another "
            f"folder, for example {folder / command}"
        )


def _holds_a_run(folder: Path) -> bool:
    return bool(checkpoints(folder)) or any((folder / name).exists() for name in _SIGNS_OF_A_RUN)


def check_report(output_dir: str, names: Sequence[str], command: str, *, overwrite: bool) -> Path:
    """Check the folder for a report of the files `names` before any work, without changing it.

    Raises:
        ValueError: See `check_apart`; or the folder holds such a report.
    """
    folder = Path(output_dir)
    check_apart(output_dir, command)
    if not overwrite and any((folder / name).exists() for name in names):
        raise ValueError(
            f"--output_dir {folder} holds a report already: replace it with --overwrite_output_dir, or "
            "choose another folder"
        )
    return folder


def start_anew(output_dir: str) -> None:
    """Make the folder, and remove the checkpoints and the log in it; to be called when all else is ready."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in _OF_THE_RUN_BEFORE:  # `lopt report` would take them for the new run's
        (folder / name).unlink(missing_ok=True)
    for checkpoint in checkpoints(folder):
        shutil.rmtree(checkpoint)
    shutil.rmtree(folder / WRITING, ignore_errors=True)


def spare_model(output_dir: str, model: str, written: Sequence[str] = ("checkpoint-*",)) -> None:
    """Refuse to write over the model that a run starts from.

    Args:
        model: A folder; a hub id is never written over.
        written: Patterns of the names in the output folder that the run replaces or removes.

    Raises:
        ValueError: The output folder is the model's or lies in it, or the model lies in what is written.
    """
    folder, source = Path(output_dir).resolve(), Path(model).expanduser().resolve()
    if not source.is_dir():
        return
    inside = source == folder or source in folder.parents
    if folder in source.parents:
        first = source.relative_to(folder).parts[0]
        inside = any(fnmatch(first, pattern) for pattern in written)
    if inside:
        raise ValueError(
            f"--output_dir {output_dir} would write over the model it starts from, {model}: "
            "choose another folder"
        )


def check_writable(folder: Path) -> None:
    """Write to the folder or its nearest parent, since permissions do not show read-only disks."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if existing.is_symlink() and not existing.exists():
        raise ValueError(
            f"--output_dir {existing} is a link to {os.readlink(existing)}, which does not exist: make that "
            "folder, or choose another"
        )
    if not existing.is_dir():
        raise ValueError(f"--output_dir {existing} is a file: choose a folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ValueError(
            f"--output_dir {folder} cannot be written to ({error.strerror}): choose another folder"
        ) from error
