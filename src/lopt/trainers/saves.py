"""How a LoPT trainer saves and loads: whole checkpoints, and the state that transformers does not know of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lopt.architectures import base_model
from lopt.engine.grid import Grid
from lopt.models.part import read_part
from lopt.reliability.ranks import together
from lopt.trainers.card import WritesCard
from lopt.trainers.heads import load_heads, save_heads
from lopt.trainers.optimizer_state import load_optimizer, save_optimizer
from lopt.trainers.pipeline import write_model

if TYPE_CHECKING:  # what the mixin is put in front of
    from transformers import Trainer
else:
    Trainer = object


class WritesCheckpoints(WritesCard, Trainer):
    """The part of `LoPTMixin` that writes and reads models and checkpoints."""

    args: Any
    lopt: Any
    checkpoints: Any
    stops: Any
    grid: Grid | None
    synchronize_weights: Callable[[], None]

    # -- writing -------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.synchronize_weights()
        write = functools.partial(super()._save_checkpoint, model, trial)
        self.checkpoints.save(Path(self._get_output_dir(trial)), write, super()._push_from_checkpoint)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the present step, whatever `save_strategy` says."""
        self._save_checkpoint(self.model_wrapped, None)

    def _get_output_dir(self, trial: Any) -> str:
        staged = self.checkpoints.staged
        return super()._get_output_dir(trial) if staged is None else str(staged)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.checkpoints.push(checkpoint_folder, super()._push_from_checkpoint)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; a sharded one (FSDP2) is gathered, whatever form its checkpoints have.

        In a pipeline all processes call this, and each writes its own blocks.

        Raises:
            NonFiniteError: some weights are not finite.
        """
        if not _internal_call:
            self.synchronize_weights()
            self.checkpoints.check_weights()
        if self.grid is not None:
            together(functools.partial(self._save, output_dir))
            if not _internal_call:
                self._write_card(Path(output_dir or str(self.args.output_dir)))
            return None
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None) if self.is_fsdp_enabled else None
        if plugin is None or _internal_call or "FULL" in str(plugin.state_dict_type):
            save = functools.partial(super().save_model, output_dir, _internal_call)
            return save() if self.checkpoints.staged is None else together(save)
        whole = self.accelerator.get_state_dict(self.model)  # by all ranks
        if self.args.should_save:
            self._save(output_dir, whole)
        return None

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.synchronize_weights()
        folder, write = Path(output_dir or str(self.args.output_dir)), super()._save
        if self.grid is not None:
            self.checkpoints.save_model(folder, functools.partial(write_model, self))
        elif self.args.should_save:
            self.checkpoints.save_model(folder, lambda place: write(place, state_dict))
        else:
            write(str(folder), state_dict)

    @property
    def writes_own_state(self) -> bool:
        """Whether this process writes the state of its blocks; in a pipeline several do."""
        return self.args.should_save if self.grid is None else self.grid.replica == 0

    def save_own_state(self, folder: Path) -> None:
        """Write into a checkpoint what transformers does not know of."""
        if self.lopt.heads and self.writes_own_state:
            save_heads(self.lopt, folder, self.grid)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.save_own_state(Path(output_dir))
        save_optimizer(self, Path(output_dir), super()._save_optimizer_and_scheduler)

    def _save_rng_state(self, output_dir: str) -> None:
        if self.grid is None or self.grid.is_last:  # the processes of a pipeline draw the same numbers
            super()._save_rng_state(output_dir)

    # -- reading -------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.grid is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            read_part(base_model(self.lopt.model), resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.grid is None:
            super()._load_best_model()
        else:
            read_part(base_model(self.lopt.model), str(self.state.best_model_checkpoint))

    def load_own_state(self, folder: Path) -> None:
        """Read what `save_own_state` wrote."""
        if self.lopt.heads:
            load_heads(self.lopt, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.load_own_state(Path(checkpoint))
            load_optimizer(self, Path(checkpoint), super()._load_optimizer_and_scheduler)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if not self.stops.restore_random_state():
            super()._load_rng_state(checkpoint)

    def load_random_state(self, checkpoint: str) -> None:
        """Restore the random state of a checkpoint."""
        super()._load_rng_state(checkpoint)
