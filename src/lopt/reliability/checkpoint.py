"""Folders that are whole or absent: written aside, flushed, listed in a manifest, then renamed.

    staged = staging(folder, "checkpoint-40")     # folder/.writing/checkpoint-40
    ...                                           # anyone writes files into it
    seal(staged)                                  # flushed and read back, then manifest.json
    publish(staged, folder / "checkpoint-40")     # one rename

What is compared when, and by which hashes: `lopt.reliability.manifest`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from lopt.files import follow_umask, fsync
from lopt.instruments.memory import format_bytes
from lopt.models.pickles import check_pickles
from lopt.models.processor import FILES as PROCESSOR_FILES
from lopt.reliability.manifest import (
    MANIFEST,
    CheckpointError,
    Verify,
    damage,
    files,
    has_hashes,
    settle,
    write_manifest,
)

WRITING = ".writing"
"""Folder in the output folder for what is unfinished; `recover` finishes or removes what a kill left."""
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = "replaced-"
_CONFIGS = ("config.json", "adapter_config.json")
_OF_A_MODEL = (
    "model*.safetensors", "model.safetensors.index.json", "adapter_model*.safetensors",
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "chat_template.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    *PROCESSOR_FILES,
)  # fmt: skip
"""Patterns of what transformers and PEFT read, beside the configs."""


@dataclass
class Choice:
    """The newest whole checkpoint of a folder, and why newer ones were passed over."""

    path: Path | None = None
    passed_over: list[tuple[Path, str]] = field(default_factory=list)

    def reasons(self) -> list[str]:
        """Return one line for each that was passed over."""
        return [f"{path.name} is passed over: {why}" for path, why in self.passed_over]


def step_of(path: str | Path) -> int | None:
    """Return the optimizer step in a checkpoint's name; None if it is another name."""
    found = _NAME.fullmatch(Path(path).name)
    return int(found[1]) if found else None


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints in `folder`, whole or not, oldest first: by step, since clocks go wrong."""
    folder = Path(folder)
    inside = [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted((path for path in inside if step_of(path) is not None), key=lambda path: step_of(path) or 0)


# -- writing -----------------------------------------------------------------------------------------


def staging(folder: str | Path, name: str) -> Path:
    """Return the place in `folder` where `name` is written first."""
    return Path(folder) / WRITING / name


def seal(folder: Path, verify: Verify = "hash") -> None:
    """Flush all files in `folder`, compare them as `verify` says and write the manifest.

    Raises:
        CheckpointError: what is read back is not what was written.
        OSError: the disk is full or failing.
    """
    write_manifest(folder, settle(folder, files(folder), verify=verify))


def publish(staged: Path, final: Path) -> None:
    """Give a sealed folder its name, which only a whole folder ever has.

    A folder of that name is replaced; killed in between, `recover` finishes it.
    """
    aside = staged.with_name(_ASIDE + final.name)
    if final.exists():
        os.rename(final, aside)
    os.rename(staged, final)
    fsync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def recover(folder: str | Path, verify: Verify = "hash") -> list[Path]:
    """Finish or remove what a killed run left half done in `folder`; return the checkpoints finished."""
    writing = Path(folder) / WRITING
    finished = []
    for staged in checkpoints(writing):
        final = Path(folder) / staged.name
        if not final.exists() and damage(staged, verify) is None:
            os.rename(staged, final)
            finished.append(final)
    if writing.exists():
        shutil.rmtree(writing)
        fsync(Path(folder))
    return finished


def move_in(staged: Path, folder: Path, last: str) -> None:
    """Move the model in `staged` into `folder` in place of another; `last`, without which none loads, last.

    The other model's configs go first: whenever it is killed, the folder holds a whole model or none. Then
    the rest of it, which transformers would load with the new one or in place of it.
    """
    follow_umask(files(staged))
    for path in [*staged.rglob("*"), staged]:
        fsync(path)
    for name in _CONFIGS:
        (folder / name).unlink(missing_ok=True)
    fsync(folder)
    for path in [path for pattern in _OF_A_MODEL for path in folder.glob(pattern)]:
        if not (staged / path.name).exists():
            path.unlink()
    for path in sorted(files(staged), key=lambda path: path.name == last):
        target = folder / path.relative_to(staged)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.name == last:
            fsync(folder)
        os.replace(path, target)
    fsync(folder)
    shutil.rmtree(staged)


def rotate(folder: str | Path, limit: int | None, newest: Path, best: str | None = None) -> list[Path]:
    """Delete all but `limit` checkpoints up to `newest`, which is proven; return what was deleted.

    `newest` and `best` always stay, and so does what is newer than `newest`: a run that was resumed from
    before a damaged checkpoint does not take that for its own.
    """
    if not limit or limit < 1:
        return []
    mine = [path for path in checkpoints(folder) if (step_of(path) or 0) <= (step_of(newest) or 0)]
    keep = {newest.name} | ({Path(best).name} if best is not None else set())
    for path in reversed(mine):
        if len(keep) >= limit:
            break
        keep.add(path.name)
    gone = [path for path in mine if path.name not in keep]
    for path in gone:  # renamed first: a kill in between leaves nothing that looks like a checkpoint
        aside = staging(folder, _ASIDE + path.name)
        aside.parent.mkdir(exist_ok=True)
        os.rename(path, aside)
        shutil.rmtree(aside)
    if gone:
        shutil.rmtree(Path(folder) / WRITING)
    return gone


# -- disk space --------------------------------------------------------------------------------------


def free_space(folder: str | Path) -> int:
    """Return the bytes that can still be written to the disk of `folder`."""
    return shutil.disk_usage(folder).free


def check_free_space(folder: str | Path, need: int, what: str) -> None:
    """Check that `what` will fit on the disk of `folder`.

    Raises:
        CheckpointError: fewer than `need` bytes are free.
    """
    have = free_space(folder)
    if have < need:
        raise CheckpointError(
            f"{what} needs {format_bytes(need)} and the disk of {folder} has {format_bytes(have)} left: "
            "free some space, or write less with `save_total_limit` or `save_only_model`"
        )


# -- reading -----------------------------------------------------------------------------------------


def choose(folder: str | Path, verify: Verify = "hash", whole: Collection[Path] = ()) -> Choice:
    """Return the newest whole checkpoint of `folder`, as far as `verify` compares, or known from `whole`."""
    choice = Choice()
    for path in reversed(checkpoints(folder)):
        why = None if path in whole else damage(path, verify)
        if why is None:
            choice.path = path
            break
        choice.passed_over.append((path, why))
    return choice


def check_checkpoint(path: str | Path, verify: Verify = "hash") -> str | None:
    """Check a checkpoint that the user names; return a warning if it has no manifest.

    Raises:
        CheckpointError: it is not a folder, or was damaged.
        UntrustedError: it holds a pickle that would do more than hold data.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"`resume` {path} is not a folder: name a checkpoint, or leave it at `resume`")
    check_pickles(path)
    if not (path / MANIFEST).is_file():
        return f"{path.name} has no {MANIFEST}, so it cannot be checked: taken as it is"
    why = damage(path, verify)
    if why is not None:
        raise CheckpointError(f"`resume` {path} is refused: {why}. `resume` alone takes the newest whole one")
    return None


def find_checkpoint(folder: str, wanted: str, verify: Verify = "hash") -> str:
    """Return the checkpoint to resume from; print which it is, and why newer ones are passed over.

    Args:
        folder: the output folder.
        wanted: "auto" for the newest whole checkpoint, or the path of one.
        verify: what is compared; with "hash" every byte of it is read once.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    if wanted != "auto":
        warning = check_checkpoint(wanted, verify)
        if warning is not None:
            print(f"Resume: {warning}")
        _say_what_was_compared(Path(wanted), verify)
        return wanted
    finished = recover(folder, verify)
    for path in finished:
        print(f"Resume: {path.name} was written and not yet named when the run was killed")
    choice = choose(folder, verify, finished)
    for reason in choice.reasons():
        print(f"Resume: {reason}")
    if choice.path is None:
        reasons = "; ".join(choice.reasons())
        raise CheckpointError(
            f"`resume`: there is no whole checkpoint in {folder}{': ' if reasons else ''}{reasons}: check "
            "`output_dir` or leave `resume` out"
        )
    check_pickles(choice.path)
    _say_what_was_compared(choice.path, verify)
    print(f"Resume: going on from {choice.path}, step {step_of(choice.path)}")
    return str(choice.path)


def _say_what_was_compared(path: Path, verify: Verify) -> None:
    if verify == "hash" and (path / MANIFEST).is_file() and not has_hashes(path):
        print(
            f"Resume: {path.name} was written without hashes (`checkpoint_verify`): its sizes were compared"
        )
