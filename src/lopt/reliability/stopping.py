"""A trainer that can be stopped within a micro-batch, and goes on bit for bit as if it had not been.

A stop drops the gradients of an unfinished optimizer step: the checkpoint is that of the last finished step,
with the random state in which the next one began, so that a resumed run replays the dropped micro-batches. In
the block-major schedule a step whose first block has been stepped is finished. A stop in the evaluation after
a step is noted in the checkpoint, and a resumed run evaluates first.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lopt.reliability.checkpoint import step_of
from lopt.reliability.saving import NOTE
from lopt.reliability.stop import Stopped, at_once, hold, requested, watching

if TYPE_CHECKING:  # what the mixin is put in front of
    from lopt.reliability.saving import WholeCheckpoints
else:
    WholeCheckpoints = object

LEFT_TO_DO = "left_to_do"


@dataclass
class _Moment:
    """Everything but weights and optimizer that the rest of a run depends on."""

    python: Any
    numpy: Any
    torch: Any
    cuda: Any
    tokens_seen: Any
    own: Any


class Stoppable(WholeCheckpoints):
    """Part of `LoPTMixin`: obeys `lopt.reliability.stop`.

    Attributes:
        partly_stepped: some blocks have been stepped in this optimizer step and others have not.
    """

    args: Any
    partly_stepped: bool = False
    _began: bool = False
    _stop_seen: str | None = None
    _after: str | None = None  # "step" or "epoch": what comes after it (logs, evaluation) is being done
    _owed: str | None = None  # the same, as a resumed checkpoint says
    _moment: _Moment
    _random_state: _Moment | None = None
    _first_of_epoch: bool = True
    _note_after: str | None = None
    _settle: Callable[[], None]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train.

        Raises:
            Stopped: a stop was requested; a checkpoint is on the disk if there was anything to save.
        """
        checkpoint = self.whole_checkpoint(resume_from_checkpoint)
        self._began, self._stop_seen, self._after, self._random_state = False, None, None, None
        self._owed = _left_to_do(checkpoint)
        try:
            return super().train(checkpoint, *args, **kwargs)
        except Stopped as stop:
            raise Stopped(stop.reason, self._leave(checkpoint)) from None

    def _leave(self, checkpoint: str | None) -> str:
        """Write a checkpoint unless there is nothing new; says what is on the disk."""
        step = self.state.global_step
        if not self._began or step == self._initial_global_step:
            if checkpoint is None:
                return "before the first step was done: nothing had to be saved"
            return f"with nothing new since {Path(checkpoint).name}: go on with --resume"
        final = Path(self._get_output_dir(None)) / f"checkpoint-{step}"
        if self._after is not None or str(final) not in self.proven or not final.exists():
            self._settle()
            self.model.zero_grad()
            self.lopt.heads.zero_grad()
            self._set(self._moment)
            self._note_after = self._after
            self._save_checkpoint(self.model_wrapped, None)
        return f"after step {step} of {self.state.max_steps}: {final} is whole, go on with --resume"

    def _note(self) -> dict[str, Any]:
        return super()._note() | {LEFT_TO_DO: self._note_after}

    # -- when ------------------------------------------------------------------------------------

    def obey(self) -> None:
        """Stop here if a stop was asked for; all ranks ask together.

        Raises:
            Stopped: it was.
        """
        reason = requested()
        if self.args.world_size > 1 and watching():
            flag = torch.tensor(float(reason is not None), device=self.args.device)
            if self.accelerator.reduce(flag, "sum") > 0:
                reason = reason or "a signal to another rank"
        if reason is not None:
            raise Stopped(reason)

    def note_stop(self, asked: bool) -> None:
        """What all ranks know after a micro-batch: whether any of them was told to stop."""
        self._stop_seen = (requested() or "a signal to another rank") if asked else None

    def obey_noted(self) -> None:
        """Stop here if `note_stop` was told so and the optimizer step can be dropped."""
        if self._stop_seen is not None and not self.partly_stepped:
            raise Stopped(self._stop_seen)

    def before_forward(self, *_: Any) -> None:
        """A hook: evaluation and generation run without gradients, and one rank need not ask others."""
        if (
            self.args.world_size == 1
            and not torch.is_grad_enabled()
            and not self.partly_stepped
            and self._began
        ):
            self.obey()

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """One batch of an evaluation."""
        if self.args.world_size > 1:
            self.obey()
        return super().prediction_step(*args, **kwargs)

    def fetch(self, get: Callable[[], Any]) -> Any:
        """The micro-batches of the next optimizer step; a stop does not wait for slow data."""
        self._after = None
        if not self._first_of_epoch:
            self._moment = self._now()
        self.obey_noted()
        if self.args.world_size == 1:
            with at_once():
                found = get()
        else:
            found = get()
        if not self._first_of_epoch:
            self._moment = self._now()
        self._first_of_epoch = False
        return found

    def begin_epoch(self) -> None:
        """An epoch's order is about to be drawn."""
        self._after, self._first_of_epoch, self._moment = None, True, self._now()

    def begin_after(self, what: str) -> None:
        """A step or an epoch has been done; logs, evaluation and checkpoint follow."""
        self.partly_stepped = False
        self._after, self._moment = what, self._now()

    # -- random state ----------------------------------------------------------------------------

    def own_state(self) -> Any:
        """What a trainer's next step depends on beside weights and random state."""
        return None

    def set_own_state(self, state: Any) -> None:
        """Take back what `own_state` gave."""

    def _now(self) -> _Moment:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        seen = self.state.num_input_tokens_seen
        draws = random.getstate(), np.random.get_state(), torch.get_rng_state()
        return _Moment(*draws, cuda, seen, self.own_state())

    def _set(self, moment: _Moment) -> None:
        random.setstate(moment.python)
        np.random.set_state(moment.numpy)
        torch.set_rng_state(moment.torch)
        if moment.cuda is not None:
            torch.cuda.set_rng_state_all(moment.cuda)
        self.state.num_input_tokens_seen = moment.tokens_seen
        self.set_own_state(moment.own)

    # -- resuming --------------------------------------------------------------------------------

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self._began:
            self._began = True
            hold()
        if self._owed is not None:
            names = ("resume_from_checkpoint", "epoch", "trial", "ignore_keys_for_eval", "start_time")
            self._do_what_is_owed(*(kwargs[name] for name in names))
        # Resumed at its end: Trainer would do one step more.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: Any, start_time: Any) -> Any:
        if self._owed is not None:  # after the last step of the last epoch
            self._do_what_is_owed(None, int(self.state.epoch or 0), trial, None, start_time)
        self._after, self._moment = None, self._now()
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _do_what_is_owed(self, checkpoint: Any, epoch: int, trial: Any, ignored: Any, start: Any) -> None:
        """Evaluate and save, as the stopped run was about to do, and keep the random state that leaves."""
        owed, self._owed = self._owed, None
        if checkpoint is not None:
            super()._load_rng_state(checkpoint)
        self.begin_after(str(owed))
        event = self.callback_handler.on_step_end if owed == "step" else self.callback_handler.on_epoch_end
        self.control = event(self.args, self.state, self.control)
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model_wrapped, trial, epoch, ignored, start)
        self._after = None
        self._random_state = self._now()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if self._random_state is None:
            return super()._load_rng_state(checkpoint)
        self._set(self._random_state)
        self._random_state = None


def _left_to_do(checkpoint: str | None) -> str | None:
    """What a checkpoint's own note says was still to be done after its last step."""
    path = Path(checkpoint or "") / NOTE
    if checkpoint is None or step_of(checkpoint) is None or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get(LEFT_TO_DO)
