"""Checkpoints of a trainer: written beside their place by transformers' own code, then sealed and renamed.

transformers' Trainer writes into `output_dir/checkpoint-N` file by file. Here it is given the output
folder `output_dir/.writing`; when all ranks have written, each flushes and compares its own files
(`lopt.reliability.manifest`); then the first one gives that checkpoint its name, and only then deletes older
ones (`lopt.reliability.checkpoint`). Nobody waits in a collective for what takes long
(`lopt.reliability.ranks`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from lopt.architectures import base_model
from lopt.engine.grid import Grid
from lopt.files import follow_umask, write_text
from lopt.instruments.memory import dense_parts
from lopt.models.generation_config import make_saveable
from lopt.reliability.checkpoint import (
    WRITING,
    CheckpointError,
    check_free_space,
    checkpoints,
    find_checkpoint,
    move_in,
    publish,
    rotate,
    staging,
)
from lopt.reliability.finite import NonFiniteError, non_finite_weights
from lopt.reliability.manifest import Hashes, HashingFile, Verify, files, settle, write_manifest
from lopt.reliability.ranks import on_first_rank, together
from lopt.reliability.secrets import redacted
from lopt.version import __version__

NOTE = "lopt.json"
"""In a checkpoint: which version wrote it, and what was left to do after its last step."""
ARGUMENTS = "training_args.json"
_OF_A_RANK = re.compile(r"(?:rng_state_|rollouts_|__)(\d+)[._]")  # transformers', ours, torch's shards
_OF_A_POSITION = re.compile(r"-(\d{5})-of-\d{5}\.")  # in a pipeline
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
        self._hashes = Hashes()
        make_saveable(base_model(trainer.model))

    @property
    def verify(self) -> Verify:
        """What is compared of a checkpoint; TRL's own configs do not say."""
        return getattr(self._trainer.args, "checkpoint_verify", "hash")

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
            NonFiniteError: see `check_weights`.
        """
        trainer = self._trainer
        final = folder / f"checkpoint-{trainer.state.global_step}"
        staged = staging(folder, final.name)

        def by_all(part: Callable[..., Any], *args: Any) -> Any:
            def explained() -> Any:
                with self._disk_errors(final):
                    return part(*args)

            return together(explained)

        by_all(self._prepare, staged)
        by_all(self._write, staged, final, write)
        entries = by_all(self._settle, staged)
        for others in self._of_all_ranks(entries):
            entries = others | entries
        by_all(self._publish, staged, final, entries)
        self.proven.add(str(final))
        if self._push_later:
            self._push_later = False
            push(str(final))

    def _of_all_ranks(self, value: Any) -> list[Any]:
        place = self._trainer.grid
        return gather_object([value]) if place is None else place.gather(value)

    def _wait_for_pipeline(self) -> None:
        if self._trainer.grid is not None:
            self._trainer.grid.gather(None)

    def check_weights(self) -> None:
        """Check what is about to be saved.

        Raises:
            NonFiniteError: some weights are not finite.
        """
        trainer = self._trainer
        if bad := non_finite_weights(trainer.model):
            raise NonFiniteError(
                f"after step {trainer.state.global_step} weights are not finite: {bad}. They are not saved; "
                f"{self.newest()}. Lower `learning_rate`, or clip with a smaller `max_grad_norm`"
            )

    def _prepare(self, staged: Path) -> None:
        self.check_weights()
        if self._trainer.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
            check_free_space(staged.parents[1], self._bytes(), staged.name)
            staged.mkdir(parents=True)

    def _write(self, staged: Path, final: Path, write: Callable[[], None]) -> None:
        trainer = self._trainer
        self._hashes = Hashes()
        self.staged = staged.parent
        try:
            write()
        finally:
            self.staged = None
        self._name_best(staged, final)
        watched = trainer.guard.note(self._of_all_ranks)
        if trainer.args.should_save:
            note = {"version": __version__} | trainer.stops.note() | watched
            write_text(staged / NOTE, json.dumps(note, indent=2) + "\n")

    def _settle(self, staged: Path) -> dict[str, Any]:
        """Flush and compare the files that this rank wrote, whose content its machine may still hold."""
        own = [path for path in files(staged) if self._is_own(path)]
        follow_umask(own)
        return settle(staged, own, self._hashes, self.verify)

    def _publish(self, staged: Path, final: Path, entries: dict[str, Any]) -> None:
        trainer = self._trainer
        if trainer.args.should_save:
            here = {path.relative_to(staged).as_posix() for path in files(staged)}
            write_manifest(staged, {name: entry for name, entry in entries.items() if name in here})
            publish(staged, final)
            shutil.rmtree(staged.parent)
            rotate(final.parent, trainer.args.save_total_limit, final, trainer.state.best_model_checkpoint)

    def file(self, path: Path) -> HashingFile:
        """Return a new file of the checkpoint that is being written, for a writer that only appends."""
        return HashingFile(path, self._hashes if self.verify == "hash" else None)

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
            plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
            if plugin is not None and "FULL" in str(plugin.state_dict_type):
                tensors += trainer.model.parameters()  # once as a model, once for itself
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
            self._write_model(folder, write)
            if self.verify == "hash":
                for path in filter(self._is_own, folder.rglob("*.safetensors")):
                    self._hashes.begin(path)  # while the optimizer is written
            return
        writes, staged = self._trainer.args.should_save, staging(folder, "model")
        with self._disk_errors(folder / "config.json"):
            if writes:
                shutil.rmtree(folder / WRITING, ignore_errors=True)
            self._wait_for_pipeline()
            self._write_model(staged, write)
            self._wait_for_pipeline()
            if writes:
                adapter = (staged / "adapter_config.json").is_file()
                move_in(staged, folder, "adapter_config.json" if adapter else "config.json")
                shutil.rmtree(folder / WRITING)

    def _write_model(self, folder: Path, write: Callable[[str], None]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write(str(folder))
        if not self._trainer.args.should_save:
            return
        (folder / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
        arguments = json.dumps(redacted(self._trainer.args.to_dict()), indent=2, default=str)
        write_text(folder / ARGUMENTS, arguments + "\n")

    def _is_own(self, path: Path) -> bool:
        return _is_of(path.name, self._trainer.args, self._trainer.grid)

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
        found = on_first_rank(self._trainer.args, lambda: find_checkpoint(folder, name, self.verify))
        self.proven.add(str(found))
        return found


def _whole_bytes(tensor: Tensor) -> int:
    """Return the bytes that `tensor` takes in a file; of a sharded one those of all shards."""
    if isinstance(tensor, DTensor):
        local = tensor.to_local()
        return _whole_bytes(local) * tensor.numel() // max(local.numel(), 1)
    return sum(part.nbytes for part in dense_parts(tensor))


def _is_of(name: str, args: Any, place: Grid | None) -> bool:
    """Return whether this rank wrote the file `name` of a checkpoint: one of its own, or of those of all."""
    part = _OF_A_POSITION.search(name)
    if place is not None and part is not None:
        return int(part[1]) - 1 == place.position and place.replica == 0
    numbered = _OF_A_RANK.match(name)
    rank = int(numbered[1]) if numbered is not None else args.world_size
    if rank < args.world_size:
        return rank == args.process_index and (place is None or place.is_last)
    return args.should_save


def _disk_error(error: Exception) -> str | None:
    """Return what the disk said, or None if the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if "PytorchStreamWriter" in text or "inline_container" in text:  # torch.save, of a write cut short
        return "the disk did not take all of a file, there is no space left on it, or it is failing"
    return text if isinstance(error, SafetensorError) else None
