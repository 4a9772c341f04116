"""Files that are whole or absent and follow the umask, and trees of plain values."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def write_text(path: Path, text: str) -> None:
    """Write `path` whole or not at all, as UTF-8 with Unix line ends; when it returns, the disk has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8", newline="\n")
        fsync(beside)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Wait until the disk has a file's content, or a folder's entries.

    Windows writes the entries itself and cannot open a folder, so there a folder is left alone.
    """
    if sys.platform == "win32":
        if path.is_dir():
            return
        flags = os.O_RDWR  # Windows flushes only what is open for writing
    else:
        flags = os.O_RDONLY
    descriptor = os.open(path, flags)
    try:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)  # fsync leaves data in the drive's cache
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(paths: Iterable[Path]) -> None:
    """Give files the permissions that the umask leaves to new ones; folders are left alone.

    safetensors makes its files with mode 600, so that another user, such as an inference server, could not
    read them.
    """
    umask = os.umask(0o077)  # it can only be read by setting it: what a thread makes now is not open to all
    os.umask(umask)
    wanted = 0o666 & ~umask
    for path in paths:
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode) and stat.S_IMODE(mode) != wanted:
            with suppress(PermissionError, NotImplementedError):  # a disk without permissions, such as exFAT
                path.chmod(wanted)


def save_tensors(
    tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str] | None = None
) -> None:
    """Write `tensors` in safetensors' format to a file that follows the umask."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)
    follow_umask([Path(path)])


def write_json(path: Path, content: object, **options: Any) -> None:
    """Write `content` as JSON with `write_text`; `options` are those of `json.dumps`."""
    write_text(path, json.dumps(content, indent=1, **options) + "\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file in UTF-8."""
    return json.loads(path.read_text(encoding="utf-8"))


def finite(value: Any) -> Any:
    """Return a tree of plain values in which NaN and infinities, which JSON does not have, are None."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Return where two trees of plain values differ, each as "name was old and is new"."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*new, *(key for key in old if key not in new)]
        return [
            d for key in keys for d in differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if json.loads(json.dumps(new)) == old else [f"{name} was {_brief(old)} and is {_brief(new)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
