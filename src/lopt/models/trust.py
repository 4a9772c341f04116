"""What may come in with a model's or adapter's folder: weights and settings; no code, no pickle, no path.

SECURITY.md has the threat model. transformers and peft check much of this themselves; here it is settled
before they read anything, in one line, and for every load alike.
"""

from __future__ import annotations

import importlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Not weights: what trainers leave beside them, and nobody reads.
_NO_WEIGHTS = (
    *("training_args", "optimizer", "scheduler", "scaler", "rng_state", "rollouts", "random_states"),
    "pytorch_model_fsdp",  # FSDP2's in one file, which accelerate reads by `torch.load(weights_only=True)`
)
_MODEL = ("model.safetensors", "model.safetensors.index.json")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.safetensors.index.json")


class UntrustedError(ValueError):
    """A model or a data set asks for more trust than it was given."""


def check_folder(folder: str | Path, *, weights: bool, name: str | None = None) -> None:
    """Refuse a model's or adapter's folder whose files are pickles or point out of it. Reads JSON only.

    Args:
        weights: whether weights are about to be loaded; without, only links are looked at.
        name: what the user calls the folder.

    Raises:
        UntrustedError: links or shards outside the folder; weights that are no safetensors.
    """
    folder = Path(folder)
    name = str(folder) if name is None else name
    _check_links(folder, name)
    if not weights:
        return
    for index in sorted(folder.glob("*.index.json")):
        _check_index(index, name)
    if (folder / "adapter_config.json").is_file():
        _check_safetensors(folder, name, _ADAPTER)
    if (folder / "config.json").is_file():
        _check_safetensors(folder, name, _MODEL)


def check_kernels(name: str, config: Any, chosen: str | None) -> None:
    """Refuse a config that names a compiled kernel on the hub, which would be fetched and run.

    Raises:
        UntrustedError: it does, and the user did not choose it with --attn_implementation.
    """
    wanted = getattr(config, "_attn_implementation", None)
    if chosen is None and isinstance(wanted, str) and "/" in wanted:
        raise UntrustedError(
            f"--model_name_or_path {name} names {wanted} in its config.json, code from the hub: give "
            f"--attn_implementation sdpa, or {wanted} if you trust it"
        )
    wanted = getattr(config, "_experts_implementation", None)
    if isinstance(wanted, str) and "/" in wanted:
        raise UntrustedError(
            f"--model_name_or_path {name} names {wanted} in its config.json, code from the hub: take "
            "experts_implementation out of that file"
        )


def refused_code(name: str, error: BaseException) -> UntrustedError | None:
    """The sentence on a model that comes with code; None if `error` is about something else."""
    if "trust_remote_code" not in str(error) and "custom code" not in str(error):
        return None
    return UntrustedError(
        f"--model_name_or_path {name} comes with Python code of its own, which was not run: read it, and add "
        "--trust_remote_code if you trust it, or use a model that needs none"
    )


def pickled_weights(folder: Path) -> list[str]:
    """The names of pickles in `folder` that a loader could take for weights."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        file.name
        for file in files
        if file.suffix.lower() in PICKLES and not file.name.startswith(_NO_WEIGHTS) and file.is_file()
    ]


def _check_safetensors(folder: Path, name: str, accepted: tuple[str, ...]) -> None:
    if any((folder / file).is_file() for file in accepted):
        return
    pickles = pickled_weights(folder)
    if pickles:
        raise UntrustedError(
            f"--model_name_or_path {name} has its weights in {pickles[0]}, a pickle, which can run code when "
            f'it is read: convert it to {accepted[0]} (docs/guide.md, "From .bin to safetensors": torch.load('
            "weights_only=True), then safetensors.torch.save_file), or use a revision with safetensors"
        )
    raise UntrustedError(
        f"--model_name_or_path {name} has no {accepted[0]}: give a folder with weights in safetensors"
    )


def _check_index(index: Path, name: str) -> None:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UntrustedError(f"--model_name_or_path {name}: {index.name} is no index of weights") from error
    if not index.name.endswith(".safetensors.index.json"):
        return  # of pickles, which are not read
    for shard in shards:
        if not _is_plain(shard) or not shard.endswith(".safetensors"):
            raise UntrustedError(
                f"--model_name_or_path {name}: {index.name} names {str(shard)[:100]!r}, which is no "
                "safetensors file in that folder: download the model again from a source that you trust"
            )


def _is_plain(shard: Any) -> bool:
    """Whether a shard's name stays in its folder, on any system."""
    if not isinstance(shard, str) or not shard or "\0" in shard:
        return False
    windows = PureWindowsPath(shard)
    parts = {*PurePosixPath(shard).parts, *windows.parts}
    return not (shard.startswith("/") or windows.drive or windows.root or ".." in parts)


def _check_links(folder: Path, name: str) -> None:
    """A link out of the folder would let its author choose which of the reader's files are read or copied."""
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":  # the hub's cache: snapshots/<commit>/file -> ../../blobs/<hash>
        allowed.append(home.parent.parent / "blobs")
    for path in _entries(folder):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
            raise UntrustedError(
                f"--model_name_or_path {name}: {path.relative_to(folder)} is a link out of that folder: put "
                "a copy of the file there (cp -L), if it is meant"
            )


def _entries(folder: Path) -> Iterator[Path]:
    """What a loader may open: the folder's own files, and those of folders that lie directly in it."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("checkpoint-"):
            yield from sorted(path.iterdir())


# -- checkpoints ---------------------------------------------------------------------------------------


def check_pickles(folder: str | Path) -> None:
    """Read the `.metadata` of sharded (FSDP2) checkpoints, which torch unpickles, without running anything.

    Everything else in a checkpoint is safetensors, JSON or read by `torch.load(weights_only=True)`.

    Raises:
        UntrustedError: it names something that is no part of such a file; weights are pickles.
    """
    for name in pickled_weights(Path(folder)):
        raise UntrustedError(
            f"--resume {folder} is refused: {name} is a pickle, checkpoints hold safetensors"
        )
    for path in Path(folder).rglob(".metadata"):
        try:
            with path.open("rb") as file:
                _OnlyData(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
            raise UntrustedError(f"{path} is refused: {error}") from error


class _OnlyData(pickle.Unpickler):
    """Knows the classes of torch's sharded checkpoints and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        plain = {("collections", "OrderedDict"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
        own = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        is_class = module in own and isinstance(_attribute(module, name), type)
        is_path = module.split(".")[0] == "pathlib" and name in ("PosixPath", "PurePosixPath", "Path")
        if is_class or is_path or (module, name) in plain:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")


def _attribute(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name, None)
