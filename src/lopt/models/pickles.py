"""Refuse pickles, which can run code when they are read: weights must be safetensors."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from typing import Any

import torch

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Suffixes of files that torch unpickles."""

# Files that trainers write beside weights, and that no loader takes for weights.
_NO_WEIGHTS = (
    *("training_args", "optimizer", "scheduler", "scaler", "rng_state", "rollouts", "random_states"),
    "pytorch_model_fsdp",  # FSDP2's in one file, which accelerate reads by `torch.load(weights_only=True)`
)


class UntrustedError(ValueError):
    """A model or a data set asks for more trust than it was given."""


def pickled_weights(folder: Path) -> list[str]:
    """Return the names of the pickles in `folder` that a loader could take for weights."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return [
        file.name
        for file in files
        if file.suffix.lower() in PICKLES and not file.name.startswith(_NO_WEIGHTS) and file.is_file()
    ]


def check_safetensors(folder: Path, name: str, accepted: tuple[str, ...]) -> None:
    """Refuse the folder of the model `name` if it holds none of the files `accepted`.

    Raises:
        UntrustedError: with the pickle that is there instead, if one is.
    """
    if any((folder / file).is_file() for file in accepted):
        return
    pickles = pickled_weights(folder)
    if pickles:
        raise UntrustedError(
            f"`model_name_or_path` {name} has its weights in {pickles[0]}, a pickle, which can run code when "
            f"it is read: convert it to {accepted[0]} by torch.load(weights_only=True) and "
            'safetensors.torch.save_file ("From .bin to safetensors" in the documentation), or use a '
            "revision with safetensors"
        )
    raise UntrustedError(
        f"`model_name_or_path` {name} has no {accepted[0]}: give a folder with weights in safetensors"
    )


def check_pickles(folder: str | Path) -> None:
    """Read the `.metadata` of sharded (FSDP2) checkpoints, which torch unpickles, without running anything.

    Everything else in a checkpoint is safetensors, JSON or read by `torch.load(weights_only=True)`.

    Raises:
        UntrustedError: the file names something that is no part of such metadata; weights are pickles.
    """
    for name in pickled_weights(Path(folder)):
        raise UntrustedError(
            f"`resume` {folder} is refused: {name} is a pickle, checkpoints hold safetensors"
        )
    for path in Path(folder).rglob(".metadata"):
        try:
            with path.open("rb") as file:
                _DataUnpickler(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
            raise UntrustedError(f"{path} is refused: {error}") from error


class _DataUnpickler(pickle.Unpickler):
    """Load the classes of torch's sharded checkpoints and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        plain = {("collections", "OrderedDict"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
        own = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")
        is_class = module in own and isinstance(getattr(importlib.import_module(module), name, None), type)
        is_path = module.split(".")[0] == "pathlib" and name in ("PosixPath", "PurePosixPath", "Path")
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_class or is_path or is_dtype or (module, name) in plain:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it would run {module}.{name}")
