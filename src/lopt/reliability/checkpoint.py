"""Folders that are whole or absent: written aside, flushed, listed in a manifest, then renamed.

    staged = staging(folder, "checkpoint-40")     # folder/.writing/checkpoint-40
    ...                                           # anyone writes files into it
    seal(staged)                                  # fsync, then sizes and hashes into manifest.json
    publish(staged, folder / "checkpoint-40")     # read back and compared, then one rename

Hashes are SHA-256 of pieces of 256 MiB, computed by up to eight threads: OpenSSL works without the
interpreter lock and uses the processor's SHA instructions, 1 to 2 GB/s a core, so that 70 GB in a single file
take about as long as a disk needs to give them. Nothing to install, and `sha256sum` checks a smaller file.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lopt.files import fsync, read_json, write_json
from lopt.instruments.memory import format_bytes
from lopt.models.pickles import check_pickles

MANIFEST = "manifest.json"
WRITING = ".writing"
"""Folder in the output folder for what is unfinished; `recover` finishes or removes what a kill left."""
PIECE = 256 * 2**20
READ_AT_ONCE = 2**20
FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")
_ASIDE = "replaced-"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or the one asked for cannot be read."""


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


def flush(folder: Path) -> None:
    """Wait until the disk has every file in `folder`, and the folders' entries."""
    for path in [*folder.rglob("*"), folder]:
        fsync(path)


def seal(folder: Path) -> None:
    """Flush all files in `folder`, then write the manifest: each file's size and hashes.

    Raises:
        OSError: the disk is full or failing.
    """
    flush(folder)
    names = [path.relative_to(folder).as_posix() for path in _files(folder)]
    hashes = _hashes(folder, names)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": hashes[name]} for name in names}
    content = {"format": FORMAT, "piece_bytes": PIECE, "files": files}
    write_json(folder / MANIFEST, content)


def publish(staged: Path, final: Path) -> None:
    """Read a sealed folder back and give it its name, which only a whole folder ever has.

    A folder of that name is replaced; killed in between, `recover` finishes it.

    Raises:
        CheckpointError: what is read back is not what was written.
    """
    _forget_cached(staged)
    why = damage(staged)
    if why is not None:
        raise CheckpointError(f"{final.name} cannot be read back from the disk: {why}. Is the disk failing?")
    aside = staged.with_name(_ASIDE + final.name)
    if final.exists():
        os.rename(final, aside)
    os.rename(staged, final)
    fsync(final.parent)
    if aside.exists():
        shutil.rmtree(aside)


def recover(folder: str | Path) -> list[Path]:
    """Finish or remove what a killed run left half done in `folder`; return the checkpoints finished."""
    writing = Path(folder) / WRITING
    finished = []
    for staged in checkpoints(writing):
        final = Path(folder) / staged.name
        if not final.exists() and damage(staged) is None:
            os.rename(staged, final)
            finished.append(final)
    if writing.exists():
        shutil.rmtree(writing)
        fsync(Path(folder))
    return finished


def move_in(staged: Path, folder: Path, last: str) -> None:
    """Move the files of `staged` into `folder`, replacing others; `last`, without which no model loads, last.

    An older `last` goes first: whenever it is killed, the folder holds a whole model or none.
    """
    flush(staged)
    (folder / last).unlink(missing_ok=True)
    fsync(folder)
    for path in sorted(_files(staged), key=lambda path: path.name == last):
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


def damage(folder: str | Path) -> str | None:
    """Return why `folder` is not what was sealed, in words; None if it is, bit for bit."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return (
            f"it has no {MANIFEST}: an older version or another program wrote it, or not to the end "
            f"(`resume` {folder} takes it as it is)"
        )
    try:
        content = read_json(folder / MANIFEST)
        piece, files = int(content["piece_bytes"]), content["files"]
        sizes = {name: int(entry["size"]) for name, entry in files.items()}
        expected = {name: list(entry["sha256"]) for name, entry in files.items()}
        newer = int(content["format"]) > FORMAT
        if piece < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if newer:
        return f"its {MANIFEST} is of a newer version of lopt"
    present = {path.relative_to(folder).as_posix(): path.stat().st_size for path in _files(folder)}
    for name, size in sizes.items():
        have = present.get(name)
        if have is None:
            return f"{name} is missing"
        if have != size:
            return f"{name} has {have:,} of {size:,} bytes" if have else f"{name} is empty"
    for name in sorted(present.keys() - sizes.keys()):
        return f"{name} is not in its {MANIFEST} (if you put it there, take it away)"
    try:
        found = _hashes(folder, list(sizes), piece)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read: {error.strerror}"
    changed = [name for name in sizes if found[name] != expected[name]]
    return f"{changed[0]} was changed: its hash is another" if changed else None


def choose(folder: str | Path) -> Choice:
    """Return the newest whole checkpoint of `folder`, every byte of it read and compared."""
    choice = Choice()
    for path in reversed(checkpoints(folder)):
        why = damage(path)
        if why is None:
            choice.path = path
            break
        choice.passed_over.append((path, why))
    return choice


def check_checkpoint(path: str | Path) -> str | None:
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
    why = damage(path)
    if why is not None:
        raise CheckpointError(f"`resume` {path} is refused: {why}. `resume` alone takes the newest whole one")
    return None


def find_checkpoint(folder: str, wanted: str) -> str:
    """Return the checkpoint to resume from; print which it is, and why newer ones are passed over.

    Args:
        folder: the output folder.
        wanted: "auto" for the newest whole checkpoint, or the path of one.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    if wanted != "auto":
        warning = check_checkpoint(wanted)
        if warning is not None:
            print(f"Resume: {warning}")
        return wanted
    for finished in recover(folder):
        print(f"Resume: {finished.name} was written and not yet named when the run was killed")
    choice = choose(folder)
    for reason in choice.reasons():
        print(f"Resume: {reason}")
    if choice.path is None:
        reasons = "; ".join(choice.reasons())
        raise CheckpointError(
            f"`resume`: there is no whole checkpoint in {folder}{': ' if reasons else ''}{reasons}: check "
            "`output_dir` or leave `resume` out"
        )
    check_pickles(choice.path)
    print(f"Resume: going on from {choice.path}, step {step_of(choice.path)}")
    return str(choice.path)


# -- files -------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[Path]:
    """Return all files but the manifest, sorted."""
    return sorted(p for p in folder.rglob("*") if not p.is_dir() and p != folder / MANIFEST)


def _hashes(folder: Path, names: Iterable[str], piece: int = PIECE) -> dict[str, list[str]]:
    """Return the SHA-256 of every piece of every file, by name."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        work = {
            name: [
                pool.submit(_hash, folder / name, start, piece)
                for start in range(0, max((folder / name).stat().st_size, 1), piece)
            ]
            for name in names
        }
        return {name: [digest.result() for digest in digests] for name, digests in work.items()}


def _hash(path: Path, start: int, length: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(READ_AT_ONCE, length)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while length and (count := file.readinto(buffer[: min(len(buffer), length)])):
            digest.update(buffer[:count])
            length -= count
    return digest.hexdigest()


def _forget_cached(folder: Path) -> None:
    """Ask the kernel to read the files from the disk next time."""
    if sys.platform != "linux":  # the call that others have not, or ignore
        return
    for path in _files(folder):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
