"""A trainer that can be stopped within a micro-batch, and goes on bit for bit as if it had not been.

Several processes stop together, before the next optimizer step; those of a pipeline by an `Agreement`.

A stop drops the gradients of an unfinished optimizer step: the checkpoint is that of the last finished step,
with the random state in which the next one began, so that a resumed run replays the dropped micro-batches. In
the block-major schedule a step whose first block has been stepped is finished. A stop in the evaluation after
a step is noted in the checkpoint, and a resumed run evaluates first.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lopt.compat import evaluate_and_save
from lopt.files import read_json
from lopt.reliability.checkpoint import step_of
from lopt.reliability.saving import NOTE
from lopt.reliability.stop import Stopped, at_once, hold, is_active, requested
from lopt.reliability.watch import Agreement

LEFT_TO_DO = "left_to_do"
"""Key in a checkpoint's note: "step" or "epoch", after which logs and evaluation are still to be done."""


@dataclass
class RunState:
    """Everything but weights and optimizer that the rest of a run depends on."""

    python: Any
    numpy: Any
    torch: Any
    cuda: Any
    tokens_seen: Any
    rollouts: Any

    @classmethod
    def of(cls, trainer: Any) -> RunState:
        """Return the present state."""
        return cls(
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
            torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None,
            trainer.state.num_input_tokens_seen,
            trainer.rollout_state(),
        )

    def restore(self, trainer: Any) -> None:
        """Make it the present state again."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        trainer.state.num_input_tokens_seen = self.tokens_seen
        trainer.set_rollout_state(self.rollouts)


class Stops:
    """Obeys `lopt.reliability.stop` in a trainer's loop.

    Args:
        trainer: a trainer with `LoPTMixin`, which calls this class at the events of its loop.

    Attributes:
        began: the first epoch has begun, so there may be something to save.
        partly_stepped: some blocks have been stepped in this optimizer step and others have not.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._agreement = None if trainer.grid is None else Agreement(trainer.grid)
        self.start(None)

    @property
    def alone(self) -> bool:
        """Whether this process need not agree with others."""
        return self._trainer.args.world_size == 1 and self._agreement is None

    def start(self, checkpoint: str | None) -> None:
        """Begin a run, new or from `checkpoint`."""
        self.began, self.partly_stepped = False, False
        self._first_step = 0
        self._following: str | None = None  # what is being followed by logs and evaluation: "step" or "epoch"
        self._left: str | None = left_to_do(checkpoint)  # the same, of the run that wrote `checkpoint`
        self._left_to_save: str | None = None  # the same, for the checkpoint that a stop writes
        self._state: RunState | None = None  # with which a checkpoint written now would be resumed
        self._after_evaluation: RunState | None = None
        self._first_of_epoch = True

    def leave(self, checkpoint: str | None) -> str:
        """Write a checkpoint unless there is nothing new, and return what is on the disk.

        Args:
            checkpoint: the one that this run was resumed from.
        """
        trainer = self._trainer
        step = trainer.state.global_step
        if not self.began or step == self._first_step:
            if checkpoint is None:
                return "before the first step was done: nothing had to be saved"
            return f"with nothing new since {Path(checkpoint).name}: go on with `resume`"
        final = trainer.checkpoints.path(step)
        if self._following is not None or not trainer.checkpoints.is_proven(final):
            trainer.synchronize_weights()
            trainer.model.zero_grad()
            trainer.lopt.heads.zero_grad()
            assert self._state is not None
            self._state.restore(trainer)
            self._left_to_save = self._following
            trainer.save_checkpoint()
        return f"after step {step} of {trainer.state.max_steps}: {final} is whole, go on with `resume`"

    def note(self) -> dict[str, Any]:
        """Return what a checkpoint's note says of the stop."""
        return {LEFT_TO_DO: self._left_to_save}

    # -- when a stop is obeyed -----------------------------------------------------------------------

    def obey(self) -> None:
        """Stop here if a stop was asked for; all ranks must call this together.

        Raises:
            Stopped: it was.
        """
        reason, trainer = requested(), self._trainer
        if self._agreement is not None:
            reason = self._agreement.decide(reason)
        elif trainer.args.world_size > 1 and is_active():
            flag = torch.tensor(float(reason is not None), device=trainer.args.device)
            if trainer.accelerator.reduce(flag, "sum") > 0:
                reason = reason or "a signal to another rank"
        if reason is not None:
            raise Stopped(reason)

    def obey_within_step(self) -> None:
        """Stop here if this process is the only one and the optimizer step can be dropped.

        Several ranks agree before the next optimizer step (`fetch`): to agree after every micro-batch, each
        would have to wait for its device.

        Raises:
            Stopped: a stop was asked for.
        """
        if self.alone and not self.partly_stepped:
            self.obey()

    def before_forward(self, *_: Any) -> None:
        """Obey before a forward without gradients (a hook), where one rank need not ask others."""
        if self.alone and not torch.is_grad_enabled() and not self.partly_stepped and self.began:
            self.obey()

    def fetch(self, get: Callable[[], Any]) -> Any:
        """Return the micro-batches that `get` fetches; obey before, a single process also while it waits."""
        self._following = None
        if not self._first_of_epoch:
            self._state = RunState.of(self._trainer)
        self.obey()
        if self.alone:
            with at_once():
                found = get()
        else:
            found = get()
        if not self._first_of_epoch:
            self._state = RunState.of(self._trainer)
        self._first_of_epoch = False
        return found

    # -- events of the loop --------------------------------------------------------------------------

    def begin_training(self) -> None:
        """Note the step at which this run begins."""
        self._first_step = self._trainer.state.global_step

    def begin_epoch(self) -> None:
        """Begin an epoch, whose order is about to be drawn."""
        self._following, self._first_of_epoch, self._state = None, True, RunState.of(self._trainer)

    def begin_following(self, what: str | None) -> None:
        """Begin what follows a finished "step" or "epoch": logs, evaluation and a checkpoint."""
        self.partly_stepped = False
        self._following, self._state = what, RunState.of(self._trainer)

    def enter_epoch(self, epoch: Mapping[str, Any]) -> bool:
        """Prepare for an epoch of the loop, and return whether there is anything to do in it.

        Args:
            epoch: the arguments of `Trainer._run_epoch`.
        """
        trainer = self._trainer
        if not self.began:
            self.began = True
            hold()
        self.do_what_is_left(
            epoch["resume_from_checkpoint"],
            trial=epoch["trial"],
            epoch=epoch["epoch"],
            ignore_keys_for_eval=epoch["ignore_keys_for_eval"],
            start_time=epoch["start_time"],
        )
        if trainer.control.should_training_stop or trainer.state.global_step >= trainer.state.max_steps:
            trainer.control.should_training_stop = True  # resumed at its end: Trainer would do one step more
            return False
        return True

    def do_what_is_left(self, checkpoint: str | None, **place: Any) -> None:
        """Evaluate and save as the stopped run was about to, and keep the random state that this leaves."""
        left, self._left = self._left, None
        if left is None:
            return
        trainer = self._trainer
        if checkpoint is not None:
            trainer.load_random_state(checkpoint)
        self.begin_following(left)
        handler = trainer.callback_handler
        event = handler.on_step_end if left == "step" else handler.on_epoch_end
        trainer.control = event(trainer.args, trainer.state, trainer.control)
        evaluate_and_save(trainer, **place)
        self._following = None
        self._after_evaluation = RunState.of(trainer)

    def restore_random_state(self) -> bool:
        """Restore the random state that a made-up evaluation left, and return whether there was one."""
        state, self._after_evaluation = self._after_evaluation, None
        if state is not None:
            state.restore(self._trainer)
        return state is not None


def left_to_do(checkpoint: str | None) -> str | None:
    """Return what a checkpoint's note says was still to be done after its last step."""
    path = Path(checkpoint or "") / NOTE
    if checkpoint is None or step_of(checkpoint) is None or not path.is_file():
        return None
    return read_json(path).get(LEFT_TO_DO)
