"""Checkpoints of a trainer: written beside their place by transformers' own code, then sealed and renamed.

transformers' Trainer writes into `output_dir/checkpoint-N` file by file. Here it is given the output
folder `output_dir/.writing`; when all ranks have written, the first one seals that checkpoint, reads it
back, gives it its name (`lopt.reliability.checkpoint`), and only then deletes older ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from lopt.files import write_text
from lopt.instruments.memory import dense_parts
from lopt.reliability.checkpoint import (
    WRITING,
    CheckpointError,
    check_free_space,
    checkpoints,
    find_checkpoint,
    flush,
    move_in,
    publish,
    rotate,
    seal,
    staging,
)
from lopt.reliability.secrets import redacted
from lopt.version import __version__

NOTE = "lopt.json"
"""In a checkpoint: which version wrote it, and what was left to do after its last step."""
ARGUMENTS = "training_args.json"
_PICKLED_ARGUMENTS = "training_args.bin"  # written by transformers, read by nobody


class Checkpoints:
    """Writes a trainer's checkpoints and model, whole or not at all, and finds a checkpoint to resume from.

    Args:
        trainer: a trainer with `LoPTMixin`.

    Attributes:
        proven: paths of the checkpoints that this process has written, or read and compared.
        staged: the folder that stands for the output folder while a checkpoint is written; None otherwise.
    """

    def __init__(self, trainer: Any) -> None:
        self.proven: set[str] = set()
        self.staged: Path | None = None
        self._trainer = trainer
        self._push_later = False

    def path(self, step: int) -> Path:
        """Return where the checkpoint of optimizer step `step` lies."""
        return Path(str(self._trainer.args.output_dir)) / f"checkpoint-{step}"

    def is_proven(self, path: Path) -> bool:
        """Return whether `path` is there and known to be whole."""
        return str(path) in self.proven and path.exists()

    def newest(self) -> str:
        """Return which checkpoint is the newest that this run knows to be whole, in words."""
        proven = {Path(path).resolve() for path in self.proven}
        output = str(self._trainer.args.output_dir)
        whole = [path.name for path in checkpoints(output) if path.resolve() in proven]
        if not whole:
            return "there is no earlier checkpoint"
        return f"{whole[-1]} is whole, `resume` goes on from there"

    # -- writing -------------------------------------------------------------------------------------

    def save(self, folder: Path, write: Callable[[], None], push: Callable[[str], None]) -> None:
        """Write the checkpoint of the present step.

        Args:
            folder: the run's output folder.
            write: transformers' own code, which writes into `staged`.
            push: pushes a checkpoint to the hub.

        Raises:
            CheckpointError: the disk is full, read-only or failing; nothing is left half written.
        """
        trainer = self._trainer
        final = folder / f"checkpoint-{trainer.state.global_step}"
        staged = staging(folder, final.name)
        with self._disk_errors(final):
            if trainer.args.should_save:
                shutil.rmtree(folder / WRITING, ignore_errors=True)
                check_free_space(folder, self._bytes(), final.name)
                staged.mkdir(parents=True)
            trainer.accelerator.wait_for_everyone()
            self.staged = staged.parent
            try:
                write()
            finally:
                self.staged = None
            self._name_best(staged, final)
            trainer.accelerator.wait_for_everyone()  # no rank flushes a folder that another one still changes
            flush(staged)  # by each rank: another machine's cache may hold what it wrote
            trainer.accelerator.wait_for_everyone()
            if trainer.args.should_save:
                note = {"version": __version__} | trainer.stops.note() | trainer.guard.note()
                write_text(staged / NOTE, json.dumps(note, indent=2) + "\n")
                seal(staged)
                publish(staged, final)
                shutil.rmtree(folder / WRITING)
                rotate(folder, trainer.args.save_total_limit, final, trainer.state.best_model_checkpoint)
        trainer.accelerator.wait_for_everyone()
        self.proven.add(str(final))
        if self._push_later:
            self._push_later = False
            push(str(final))

    def push(self, folder: str, push: Callable[[str], None]) -> None:
        """Push `folder` to the hub, a checkpoint not before it has its name."""
        self._push_later = self.staged is not None
        if not self._push_later:
            push(folder)

    def _name_best(self, staged: Path, final: Path) -> None:
        """Note the best checkpoint by the name it is about to get."""
        state = self._trainer.state
        if state.best_model_checkpoint is not None and Path(state.best_model_checkpoint) == staged:
            state.best_model_checkpoint = str(final)
            if self._trainer.args.should_save:
                state.save_to_json(str(staged / "trainer_state.json"))

    def _bytes(self) -> int:
        """Return about what a checkpoint will take: weights, heads and the optimizer's state."""
        trainer, lopt = self._trainer, self._trainer.lopt
        tensors = list(trainer.model.parameters()) if lopt.config.method != "lora" else []
        tensors += list(lopt.heads.parameters())
        optimizer = trainer.bare_optimizer()
        if optimizer is not None and not trainer.args.save_only_model:
            tensors += [t for state in optimizer.state.values() for t in state.values()]
        return sum(_whole_bytes(t) for t in tensors if isinstance(t, Tensor))

    @contextmanager
    def _disk_errors(self, final: Path) -> Iterator[None]:
        """Explain a disk that is full, read-only or failing, and leave nothing half written."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            why = _disk_error(error)
            if why is None:
                raise
            if self._trainer.args.should_save:
                shutil.rmtree(final.parent / WRITING, ignore_errors=True)
            raise CheckpointError(f"{final} cannot be written: {why}; {self.newest()}") from error

    # -- the model -----------------------------------------------------------------------------------

    def save_model(self, folder: Path, write: Callable[[str], None]) -> None:
        """Write the model into `folder`, which never holds half of one; arguments as JSON.

        Args:
            write: transformers' own code, which writes into the folder it is given.
        """
        if self.staged is not None:  # as part of a checkpoint
            return self._write_model(folder, write)
        with self._disk_errors(folder / "config.json"):
            shutil.rmtree(folder / WRITING, ignore_errors=True)
            staged = staging(folder, "model")
            self._write_model(staged, write)
            adapter = (staged / "adapter_config.json").is_file()
            move_in(staged, folder, "adapter_config.json" if adapter else "config.json")
            shutil.rmtree(folder / WRITING)

    def _write_model(self, folder: Path, write: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write(str(folder))
        (folder / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
        arguments = json.dumps(redacted(self._trainer.args.to_dict()), indent=2, default=str)
        write_text(folder / ARGUMENTS, arguments + "\n")

    # -- resuming ------------------------------------------------------------------------------------

    def find(self, wanted: str | bool | None) -> str | None:
        """Return what to resume from.

        Args:
            wanted: True for the newest whole checkpoint, or the name of one, which must not be damaged.

        Raises:
            CheckpointError: there is none, or the one named is damaged.
        """
        if not wanted or str(wanted) in self.proven:
            return str(wanted) if wanted else None
        folder, name = str(self._trainer.args.output_dir), "auto" if wanted is True else wanted
        found = on_first_rank(self._trainer.args, lambda: find_checkpoint(folder, name))
        self.proven.add(str(found))
        return found


def _whole_bytes(tensor: Tensor) -> int:
    """Return the bytes that `tensor` takes in a file; of a sharded one those of all shards."""
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        return _whole_bytes(local) * tensor.numel() // max(local.numel(), 1)
    return sum(part.nbytes for part in dense_parts(tensor))


def on_first_rank(args: Any, function: Callable[[], str | None]) -> str | None:
    """Return on all ranks what `function` returns on the first, or raise the `ValueError` it raises there."""
    found: list[str | None] = [None, None]
    error: ValueError | None = None
    if args.process_index == 0:
        try:
            found[0] = function()
        except ValueError as raised:
            error, found[1] = raised, str(raised)
    if args.world_size > 1:
        broadcast_object_list(found)
    if found[1] is not None:
        raise error or CheckpointError(found[1])
    return found[0]


def _disk_error(error: Exception) -> str | None:
    """Return what the disk said, or None if the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if "PytorchStreamWriter" in text or "inline_container" in text:  # torch.save, of a write cut short
        return "the disk did not take all of a file, there is no space left on it, or it is failing"
    return text if isinstance(error, SafetensorError) else None
