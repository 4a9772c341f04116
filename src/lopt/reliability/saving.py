"""Checkpoints of a trainer: written beside their place by transformers' own code, then sealed and renamed.

transformers' Trainer writes into `output_dir/checkpoint-N` file by file. Here it is told that the output
folder is `output_dir/.writing`; when all ranks have written, the first one seals that checkpoint, reads it
back, gives it its name (`lopt.reliability.checkpoint`), and only then deletes older ones.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from lopt.core.attach import LoPT
from lopt.files import write_text
from lopt.instruments.memory import unwrap_optimizer
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

if TYPE_CHECKING:  # what the mixin is put in front of
    from transformers import Trainer
else:
    Trainer = object

NOTE = "lopt.json"
"""In a checkpoint: which version wrote it, and what was left to do after its last step."""
ARGUMENTS = "training_args.json"
_PICKLED_ARGUMENTS = "training_args.bin"  # written by transformers, read by nobody


class WholeCheckpoints(Trainer):
    """Part of `LoPTMixin`: checkpoints that are whole or absent, and the choice of one to resume from.

    Attributes:
        proven: checkpoints that this process has written, or read and compared.
    """

    model: Any
    lopt: LoPT
    proven: set[str]
    _staged: Path | None = None
    _push_later: bool = False

    # -- writing ---------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial))
        final = folder / f"checkpoint-{self.state.global_step}"
        staged = staging(folder, final.name)
        with self._told(final):
            if self.args.should_save:
                shutil.rmtree(folder / WRITING, ignore_errors=True)
                check_free_space(folder, self._checkpoint_bytes(), final.name)
                staged.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._staged = staged.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staged = None
            self._name_best(staged, final)
            flush(staged)  # by each rank: another machine's cache may hold what it wrote
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                write_text(staged / NOTE, json.dumps(self._note(), indent=2) + "\n")
                seal(staged)
                publish(staged, final)
                shutil.rmtree(folder / WRITING)
                rotate(folder, self.args.save_total_limit, final, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        self.proven.add(str(final))
        if self._push_later:
            self._push_later = False
            super()._push_from_checkpoint(str(final))

    def _note(self) -> dict[str, Any]:
        return {"version": __version__}

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staged is None else str(self._staged)

    def _name_best(self, staged: Path, final: Path) -> None:
        """The best checkpoint is noted by the name it is about to get."""
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == staged:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staged is None:
            super()._push_from_checkpoint(checkpoint_folder)
        self._push_later = self._staged is not None

    def _checkpoint_bytes(self) -> int:
        """What a checkpoint will take, about: weights, heads and the optimizer's state."""
        tensors = list(self.model.parameters()) if self.lopt.config.method != "lora" else []
        tensors += list(self.lopt.heads.parameters())
        optimizer = unwrap_optimizer(self.optimizer)
        if optimizer is not None and not self.args.save_only_model:
            tensors += [
                t for state in optimizer.state.values() for t in state.values() if hasattr(t, "numel")
            ]
        return sum(t.numel() * t.element_size() for t in tensors)

    @contextmanager
    def _told(self, final: Path) -> Iterator[None]:
        """A disk that is full, read-only or failing is a sentence, and leaves nothing half written."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            why = _disk_trouble(error)
            if why is None:
                raise
            if self.args.should_save:
                shutil.rmtree(final.parent / WRITING, ignore_errors=True)
            raise CheckpointError(f"{final} cannot be written: {why}; {self.on_disk()}") from error

    def on_disk(self) -> str:
        """The newest checkpoint that this run knows to be whole, in words."""
        proven = {Path(path).resolve() for path in self.proven}
        good = [path.name for path in checkpoints(str(self.args.output_dir)) if path.resolve() in proven]
        if not good:
            return "there is no earlier checkpoint"
        return f"{good[-1]} is whole, --resume goes on from there"

    # -- the model -------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; a sharded one (FSDP2) is gathered, whatever form its checkpoints have."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None) if self.is_fsdp_enabled else None
        if plugin is None or _internal_call or "FULL" in str(plugin.state_dict_type):
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, self.accelerator.get_state_dict(self.model))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers does, but so that the folder never holds half a model; arguments as JSON."""
        folder = Path(output_dir or str(self.args.output_dir))
        if not self.args.should_save:
            return super()._save(str(folder), state_dict)
        if self._staged is not None:
            return self._save_plainly(folder, state_dict)
        with self._told(folder / "config.json"):
            shutil.rmtree(folder / WRITING, ignore_errors=True)
            staged = staging(folder, "model")
            self._save_plainly(staged, state_dict)
            adapter = (staged / "adapter_config.json").is_file()
            move_in(staged, folder, "adapter_config.json" if adapter else "config.json")
            shutil.rmtree(folder / WRITING)

    def _save_plainly(self, folder: Path, state_dict: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        super()._save(str(folder), state_dict)
        (folder / _PICKLED_ARGUMENTS).unlink(missing_ok=True)
        write_text(
            folder / ARGUMENTS, json.dumps(redacted(self.args.to_dict()), indent=2, default=str) + "\n"
        )

    # -- resuming --------------------------------------------------------------------------------

    def whole_checkpoint(self, wanted: str | bool | None) -> str | None:
        """What to resume from: True is the newest whole checkpoint, a name is that one, if it is not damaged.

        Raises:
            CheckpointError: there is none, or the one named is damaged.
        """
        if not wanted or str(wanted) in self.proven:
            return str(wanted) if wanted else None
        folder = str(self.args.output_dir)
        found = on_first_rank(
            self.args, lambda: find_checkpoint(folder, "auto" if wanted is True else wanted)
        )
        self.proven.add(str(found))
        return found


def on_first_rank(args: Any, function: Callable[[], str | None]) -> str | None:
    """What `function` says on the first rank, or the `ValueError` it raises there, on all ranks."""
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


def _disk_trouble(error: Exception) -> str | None:
    """What the disk said; None if the error is about something else."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if "PytorchStreamWriter" in text or "inline_container" in text:  # torch.save, of a write cut short
        return "the disk did not take all of a file, there is no space left on it, or it is failing"
    return text if isinstance(error, SafetensorError) else None
