"""Refuse what a model must not bring along: code, pickles (`lopt.models.pickles`), links out of its folder.

SECURITY.md has the threat model. transformers and peft check much of this themselves; here it is checked
before they read anything, in the same way for every load, with an error message of one line.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lopt.compat import kernel_names
from lopt.models.pickles import UntrustedError, check_safetensors

_MODEL = ("model.safetensors", "model.safetensors.index.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.safetensors.index.json")


def check_folder(folder: str | Path, *, weights: bool, name: str | None = None) -> None:
    """Refuse the folder of a model or adapter whose files are pickles or lie outside it. Reads JSON only.

    Args:
        weights: Check the weights, which are about to be loaded, and not only the links.
        name: The model's name in messages; by default the folder.

    Raises:
        UntrustedError: links or shards outside the folder; weights that are not safetensors.
    """
    folder = Path(folder)
    name = str(folder) if name is None else name
    _check_links(folder, name)
    if not weights:
        return
    for index in sorted(folder.glob("*.index.json")):
        _check_index(index, name)
    if (folder / "adapter_config.json").is_file():
        check_safetensors(folder, name, _ADAPTER)
    if (folder / "config.json").is_file():
        check_safetensors(folder, name, _MODEL)


def check_kernels(name: str, config: Any, chosen: str | None) -> None:
    """Refuse a config that names a compiled kernel on the hub, which would be downloaded and run.

    Args:
        chosen: The attention implementation that the user asks for; it is trusted.

    Raises:
        UntrustedError: the config names one.
    """
    fixes = {
        "attn_implementation": "give `attn_implementation` sdpa, or {} if you trust it",
        "experts_implementation": "take experts_implementation out of that file",
    }
    for argument, wanted in kernel_names(config).items():
        trusted = chosen is not None and argument == "attn_implementation"
        if isinstance(wanted, str) and "/" in wanted and not trusted:
            raise UntrustedError(
                f"`model_name_or_path` {name} names {wanted} in its config.json, code from the hub: "
                + fixes[argument].format(wanted)
            )


def remote_code_error(name: str, error: BaseException) -> UntrustedError | None:
    """Return the error for a model that comes with code; None if `error` has another reason."""
    if "trust_remote_code" not in str(error) and "custom code" not in str(error):
        return None
    return UntrustedError(
        f"`model_name_or_path` {name} comes with Python code of its own, which was not run: read it, and add "
        "`trust_remote_code` if you trust it, or use a model that needs none"
    )


def _check_index(index: Path, name: str) -> None:
    """Refuse an index of weights that names anything but safetensors files beside it."""
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UntrustedError(f"`model_name_or_path` {name}: {index.name} is no index of weights") from error
    if not index.name.endswith(".safetensors.index.json"):
        return  # of pickles, which are not read
    for shard in shards:
        if not _is_plain(shard) or not shard.endswith(".safetensors"):
            raise UntrustedError(
                f"`model_name_or_path` {name}: {index.name} names {str(shard)[:100]!r}, which is no "
                "safetensors file in that folder: download the model again from a source that you trust"
            )


def _is_plain(shard: Any) -> bool:
    """Return whether a shard's name stays in its folder, on any system."""
    if not isinstance(shard, str) or not shard or "\0" in shard:
        return False
    windows = PureWindowsPath(shard)
    parts = {*PurePosixPath(shard).parts, *windows.parts}
    return not (shard.startswith("/") or windows.drive or windows.root or ".." in parts)


def _check_links(folder: Path, name: str) -> None:
    """Refuse links out of the folder, by which its author would choose which of the user's files are read."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the hub's cache: snapshots/<commit>/file -> ../../blobs/<hash>
        allowed.append(home.parent.parent / "blobs")
    for path in _entries(folder):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
            raise UntrustedError(
                f"`model_name_or_path` {name}: {path.relative_to(folder)} is a link out of that folder: put "
                "a copy of the file there (cp -L), if it is meant"
            )


def _entries(folder: Path) -> Iterator[Path]:
    """Yield what a loader may open: the folder's own files, and those of folders that lie directly in it."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("checkpoint-"):
            yield from sorted(path.iterdir())
