"""Open files of rows, on this machine or by fsspec (`s3://bucket/rows.jsonl`), as they are or packed."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa

from lopt.messages import error_text

Place = Path | str
"""A path, or an address as text."""

KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
"""Accepted suffix -> kind of file."""

PACKED = (".gz", ".zst")
"""Suffixes that may follow those of text files."""

ACCEPTED = f"{', '.join(KINDS)} (all but Parquet also with {' or '.join(PACKED)} behind it)"

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class BrokenFileError(ValueError):
    """A file that cannot be read; the message goes on after the file's name."""


def place_of(name: Any) -> Place:
    """Return the address or the path that a user has given."""
    return str(name) if _ADDRESS.match(str(name)) else Path(name).expanduser()


def file_name(place: Place) -> str:
    """Return the last part of a path or an address."""
    if isinstance(place, Path):
        return place.name
    return PurePosixPath(re.sub(r"[?#].*", "", place) if place.startswith("http") else place).name


def kind_of(place: Place) -> str | None:
    """Return the kind of a file by its suffix; None for one that is not read."""
    name = PurePosixPath(file_name(place).lower())
    if name.suffix not in PACKED:
        return KINDS.get(name.suffix)
    kind = KINDS.get(PurePosixPath(name.stem).suffix)
    return None if kind == "parquet" else kind


def stamp(place: Place) -> tuple[str, ...]:
    """Return what changes when the file does, as far as its file system tells."""
    if isinstance(place, Path):
        found = place.stat()
        return (str(place.absolute()), str(found.st_size), str(found.st_mtime_ns))
    files, path = fsspec.url_to_fs(place)
    return (place, repr(sorted(files.info(path).items(), key=str)))


@contextmanager
def opened(place: Place) -> Iterator[BinaryIO]:
    """Open a file for reading, unpacked.

    Raises:
        BrokenFileError: a packed file is damaged or breaks off; an address stops answering.
        OSError: a file of this machine cannot be read.
    """
    packing = next((suffix for suffix in PACKED if file_name(place).lower().endswith(suffix)), None)
    with _raw(place) as raw:
        if packing is None:
            yield raw
            return
        try:
            unpacked: Any = gzip.GzipFile(fileobj=raw) if packing == ".gz" else _zstd(raw)
            yield unpacked
        except (EOFError, zlib.error, OSError, pa.ArrowException) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise BrokenFileError(
                f"is no whole {packing} file ({error_text(error)}): get it again, or pack it anew"
            ) from error


@contextmanager
def _raw(place: Place) -> Iterator[Any]:
    if isinstance(place, Path):
        with place.open("rb") as handle:
            yield handle
        return
    try:
        with fsspec.open(place, "rb") as handle:
            yield handle
    except (ValueError, pa.ArrowException):  # of what is in the file
        raise
    except Exception as error:  # of a store's client, which has errors of its own
        raise BrokenFileError(
            f"cannot be read on ({error_text(error)}): check the network, and try again"
        ) from error


def _zstd(raw: BinaryIO) -> Any:
    stream: Any = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
    return io.BufferedReader(stream)


def problem(place: Place) -> str | None:
    """Return why a file cannot be read, as a sentence that names it, or None."""
    if isinstance(place, Path):
        return _problem_of_path(place)
    if secret := re.match(r"([^/]+://[^/@:]*:)[^/@]+@", place):
        return f"{secret[1]}... holds a password, which a run would note: give it by the environment"
    try:
        files, path = fsspec.url_to_fs(place)
        found = files.info(path)
    except FileNotFoundError:
        return f"{place} is not found: check the address, and that its host answers"
    except ImportError as error:
        return f"{place} needs a package that is not installed ({error_text(error)})"
    except Exception as error:  # of a store's client, which has errors of its own
        return f"{place} cannot be reached ({error_text(error)}): check address, network and sign-in"
    if found.get("type") == "directory":
        return f"{place} is a folder: name the files to read"
    if kind_of(place) is None:
        return f"{file_name(place) or place} is of an unknown type: give {ACCEPTED}"
    return f"{place} is empty: give a file with at least one row" if found.get("size") == 0 else None


def _problem_of_path(path: Path) -> str | None:
    if path.is_dir():
        # A folder often holds test files too, so reading all of it could train on the test set.
        usable = sorted(entry.name for entry in path.iterdir() if kind_of(entry) is not None)
        inside = f"it holds {', '.join(usable[:5])}" if usable else f"it holds no {', '.join(KINDS)} file"
        return f"{path} is a folder: name the files to read ({inside})"
    if not path.exists():
        return f"{path} does not exist: check the path"
    if not path.is_file():  # a pipe would be waited for, and is gone once read
        return f"{path} is no regular file: write the rows to a file first"
    if kind_of(path) is None:
        return f"{path.name} is of an unknown type: give {ACCEPTED}"
    try:
        with path.open("rb") as handle:
            return None if handle.read(1) else f"{path} is empty: give a file with at least one row"
    except OSError as error:
        return f"cannot read {path} ({error.strerror}): check its permissions"
