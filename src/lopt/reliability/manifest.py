"""What a whole folder holds: the size and the hashes of every file, in its `manifest.json`.

Hashes are SHA-256 of pieces of 256 MiB, computed by up to eight threads: OpenSSL works without the
interpreter lock and uses the processor's SHA instructions, 1 to 2 GB/s a core, so that hashing keeps up with
a disk. Nothing to install, and `sha256sum` checks a smaller file. They are computed while a file is written,
where its writer takes a file object (`torch.save`), or as soon as it is, from the kernel's cache
(safetensors).

How much is compared (`checkpoint_verify`), of a folder that has just been written and of one that is resumed:

    none   nothing: a folder with a manifest was written to its end
    size   names and sizes
    hash   the same, and every byte, read once from the disk
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, get_args

from lopt.files import fsync, read_json, write_json

logger = logging.getLogger(__name__)

Verify = Literal["none", "size", "hash"]
VERIFY = get_args(Verify)
MANIFEST = "manifest.json"
PIECE = 256 * 2**20
READ_AT_ONCE = 2**20
FORMAT = 1
LONG = 60.0
"""Seconds of reading back after which it is said how to leave that out."""


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or the one asked for cannot be read."""


def files(folder: Path) -> list[Path]:
    """Return all files but the manifest, sorted."""
    return sorted(p for p in folder.rglob("*") if not p.is_dir() and p != folder / MANIFEST)


# -- hashes ------------------------------------------------------------------------------------------


class Hashes:
    """SHA-256 of files, computed by threads as soon as they are written, beside the writing of others."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="hash")
        self._known: dict[Path, tuple[tuple[int, int], list[Future[str]]]] = {}

    def begin(self, path: Path, piece: int = PIECE) -> None:
        """Begin to hash a file that is complete, unless that was done and it has not changed since."""
        state = _state(path)
        if path not in self._known or self._known[path][0] != state:
            starts = range(0, max(state[0], 1), piece)
            self._known[path] = state, [self._pool.submit(_hash, path, at, piece) for at in starts]

    def of(self, path: Path) -> list[str]:
        """Return the hash of each piece of a file, once they are computed."""
        self.begin(path)
        return [digest.result() for digest in self._known[path][1]]

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        """Let a thread call `function`."""
        return self._pool.submit(function, *args)

    def keep(self, path: Path, digests: list[str]) -> None:
        """Take over the hashes of a file that has been closed."""
        done: list[Future[str]] = []
        for digest in digests:
            done.append(Future())
            done[-1].set_result(digest)
        self._known[path] = _state(path), done


class HashingFile:
    """A file for a writer that goes from its start to its end; each write is hashed beside itself.

    An error of the disk is raised at the end: `torch.save` writes from C++, which no exception should cross.

    Args:
        path: is made anew.
        hashes: gets those of the file; None computes none.
    """

    def __init__(self, path: Path, hashes: Hashes | None) -> None:
        self._file, self._path, self._hashes = path.open("wb", buffering=0), path, hashes
        self._digests: list[Any] = []
        self._filled = 0  # bytes of the last piece
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`; returns its bytes."""
        view = memoryview(data).cast("B")
        start, work = 0, []
        while start < len(view) and self._hashes is not None:
            if not self._filled:
                self._digests.append(hashlib.sha256())
            part = view[start : start + PIECE - self._filled]
            work.append(self._hashes.submit(self._digests[-1].update, part))
            self._filled = (self._filled + len(part)) % PIECE
            start += len(part)
        self._write(view)
        for each in work:
            each.result()
        return len(view)

    def _write(self, view: memoryview) -> None:
        try:
            while len(view) and self._error is None:
                view = view[self._file.write(view) :]
        except OSError as error:
            self._error = error

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def __enter__(self) -> HashingFile:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.close()
        if self._error is not None:
            raise self._error
        if error is None and self._hashes is not None:
            digests = [digest.hexdigest() for digest in self._digests] or [hashlib.sha256().hexdigest()]
            self._hashes.keep(self._path, digests)


def _state(path: Path) -> tuple[int, int]:
    """Return what changes when a file does."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _hash(path: Path, start: int, length: int) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(min(READ_AT_ONCE, length)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while length and (count := file.readinto(buffer[: min(len(buffer), length)])):
            digest.update(buffer[:count])
            length -= count
    return digest.hexdigest()


# -- writing -----------------------------------------------------------------------------------------


def settle(
    folder: Path, paths: Iterable[Path], hashes: Hashes | None = None, verify: Verify = "hash"
) -> dict[str, Any]:
    """Wait until the disk has `paths`, files in `folder`; return their entries for the manifest.

    With `verify` hash they are read back from the disk and compared with what was written.

    Raises:
        CheckpointError: a file cannot be read back as it was written.
        OSError: the disk is full or failing.
    """
    paths, hashes = list(paths), hashes or Hashes()
    if verify == "hash":
        for path in paths:
            hashes.begin(path)  # goes on while the disk writes
    for path in paths:
        fsync(path)
    entries: dict[str, Any] = {}
    for path in paths:
        entry: dict[str, Any] = {"size": path.stat().st_size}
        entries[path.relative_to(folder).as_posix()] = entry
        if verify == "hash":
            entry["sha256"] = hashes.of(path)
    if verify == "hash":
        _read_back(folder, entries)
    return entries


def _read_back(folder: Path, entries: dict[str, Any]) -> None:
    began = time.monotonic()
    for name in entries:
        _forget_cached(folder / name)
    why = _changed(folder, entries, PIECE)
    if why is not None:
        raise CheckpointError(f"{folder.name} cannot be read back from the disk: {why}. Is the disk failing?")
    took = time.monotonic() - began
    if took > LONG:
        logger.warning(
            "%s: reading it back from the disk took %.0f s, while the run waits: `checkpoint_verify` size "
            "leaves that out", folder.name, took,
        )  # fmt: skip


def _forget_cached(path: Path) -> None:
    """Ask the kernel to read a file from the disk next time."""
    if sys.platform != "linux":  # macOS and Windows have no such call
        return
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Write the manifest, with which `folder` is whole; the disk has all its folders' entries then."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync(path)
    content = {"format": FORMAT, "piece_bytes": PIECE, "files": dict(sorted(entries.items()))}
    write_json(folder / MANIFEST, content)


# -- reading -----------------------------------------------------------------------------------------


def damage(folder: str | Path, verify: Verify = "hash") -> str | None:
    """Return why `folder` is not what was written, in words; None if it is, as far as `verify` compares."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return (
            f"it has no {MANIFEST}: an older version or another program wrote it, or not to the end "
            f"(`resume` {folder} takes it as it is)"
        )
    try:
        content = read_json(folder / MANIFEST)
        piece, entries = int(content["piece_bytes"]), dict(content["files"])
        sizes = {name: int(entry["size"]) for name, entry in entries.items()}
        hashed = {name: entry for name, entry in entries.items() if "sha256" in entry}
        newer = int(content["format"]) > FORMAT
        if piece < 1 or not all(isinstance(entry["sha256"], list) for entry in hashed.values()):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    if newer:
        return f"its {MANIFEST} is of a newer version of lopt"
    why = _other_sizes(folder, sizes) if verify != "none" else None
    if why is not None or verify != "hash":
        return why
    try:
        return _changed(folder, hashed, piece)
    except OSError as error:
        return f"{error.filename or 'a file'} cannot be read: {error.strerror}"


def has_hashes(folder: Path) -> bool:
    """Return whether the manifest of `folder` holds hashes; without them sizes alone can be compared."""
    return all("sha256" in entry for entry in read_json(folder / MANIFEST)["files"].values())


def _other_sizes(folder: Path, sizes: dict[str, int]) -> str | None:
    present = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files(folder)}
    for name, size in sizes.items():
        have = present.get(name)
        if have is None:
            return f"{name} is missing"
        if have != size:
            return f"{name} has {have:,} of {size:,} bytes" if have else f"{name} is empty"
    for name in sorted(present.keys() - sizes.keys()):
        return f"{name} is not in its {MANIFEST} (if you put it there, take it away)"
    return None


def _changed(folder: Path, entries: dict[str, Any], piece: int) -> str | None:
    hashes = Hashes()
    for name in entries:
        hashes.begin(folder / name, piece)
    changed = [name for name, entry in entries.items() if hashes.of(folder / name) != entry["sha256"]]
    return f"{changed[0]} was changed: its hash is another" if changed else None
