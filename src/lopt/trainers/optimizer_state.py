"""Optimizer and schedule in a checkpoint."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from lopt.engine.optimizer import BlockOptimizer
from lopt.engine.reduction import heads_apart, load_heads_optimizer, save_heads_optimizer
from lopt.models.pickles import UntrustedError
from lopt.trainers.parts import file_of, files_of


def save_optimizer(trainer: Any, folder: Path, write: Callable[[str], None]) -> None:
    """Write optimizer and schedule into a checkpoint.

    Args:
        write: transformers' own code, which writes into the folder it is given.
    """
    if trainer.is_fsdp_enabled:
        if trainer.lopt.heads and trainer.args.should_save:
            save_heads_optimizer(trainer.bare_optimizer(), folder)
        with heads_apart(trainer.bare_optimizer()):
            write(str(folder))
        return
    if not _is_plain(trainer):
        write(str(folder))
        return
    states = []
    if trainer.writes_own_state:
        states.append((trainer.optimizer.state_dict(), file_of(OPTIMIZER_NAME, trainer.grid)))
    if trainer.args.should_save:
        states.append((trainer.lr_scheduler.state_dict(), SCHEDULER_NAME))
    for state, name in states:
        with trainer.checkpoints.file(folder / name) as file:
            torch.save(state, file)


def load_optimizer(trainer: Any, folder: Path, read: Callable[[str], None]) -> None:
    """Read what `save_optimizer` wrote.

    The state stays in the file, mapped into memory, until each tensor is copied to where it is kept; with
    several processes transformers would put the whole file on every GPU first.

    Args:
        read: transformers' own code, which reads the folder it is given.

    Raises:
        ValueError: the checkpoint has no optimizer.
        UntrustedError: its files are not what `torch.save` writes.
    """
    if trainer.is_fsdp_enabled:
        with heads_apart(trainer.bare_optimizer()):
            read(str(folder))
        if trainer.lopt.heads:
            load_heads_optimizer(trainer.bare_optimizer(), folder)
    elif not _is_plain(trainer):
        read(str(folder))
    else:
        for owner, name in ((trainer.optimizer, OPTIMIZER_NAME), (trainer.lr_scheduler, SCHEDULER_NAME)):
            paths = files_of(name, folder)
            if not paths:
                raise ValueError(
                    f"{folder} has no {name}, so `save_only_model` wrote it and no run can go on from it: "
                    "leave `resume` out, and start from it as `model_name_or_path`"
                )
            owner.load_state_dict(_joined([_read(path) for path in paths]))


def _joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one state of what the processes of a pipeline have written, which number parameters alike."""
    joined, *others = states
    for state in others:
        joined["state"] |= state["state"]
        for group, other in zip(joined["param_groups"], state["param_groups"], strict=True):
            group["updates"] = max(group["updates"], other["updates"])
    return joined


def _read(path: Path) -> Any:
    """Return what `torch.save` wrote, mapped into memory.

    Raises:
        UntrustedError: it is a pickle of another kind.
    """
    if not zipfile.is_zipfile(path):
        raise UntrustedError(f"{path} is refused: it is not as torch.save writes it, and could run code")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)


def _is_plain(trainer: Any) -> bool:
    """Return whether the optimizer is ours, in one file, and not in the hands of DeepSpeed."""
    return isinstance(trainer.bare_optimizer(), BlockOptimizer) and not trainer.is_deepspeed_enabled
