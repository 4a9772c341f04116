"""Events of a trainer's loop that its parts have to know of."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

from transformers import TrainerCallback

from lopt.core.attach import LoPT
from lopt.trainers.checks import check_batches
from lopt.trainers.heads import warm_up_heads
from lopt.trainers.resume import resumed_otherwise


class LoopEvents(TrainerCallback):
    """Tells the parts of a `LoPTMixin` trainer what its loop is about to do, or has done."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Warm up the heads; a resumed run has warm ones.

        Raises:
            ValueError: there is no batch to train on.
            NonFiniteError: a local loss of the warm-up is not finite.
        """
        loader: Any = kwargs.get("train_dataloader")
        if isinstance(getattr(loader, "dataset", None), Sized) and not len(loader):  # a stream has no length
            check_batches(args, self._trainer.train_dataset, None)  # knows most of the reasons
            raise ValueError(
                "the training rows make no batch: give more rows, or lower `per_device_train_batch_size`"
            )
        if self._trainer.resumed_from and self._trainer.is_world_process_zero():
            change = resumed_otherwise(self._trainer, self._trainer.resumed_from)
            if change is not None:
                print(f"Resume: {change}")
        self._find_best(state)
        self._trainer.stops.begin_training()
        lopt: LoPT = self._trainer.lopt
        lopt.heads.zero_grad()  # the gradients of a batch that did not fit (`auto_find_batch_size`)
        if self._trainer.predicted_gradients is not None and state.global_step == 0:
            self._trainer.predicted_gradients.start()
        elif lopt.heads and lopt.config.head_warmup_steps and state.global_step == 0:
            warm_up_heads(self._trainer)

    def _find_best(self, state: Any) -> None:
        """Find the best checkpoint again whose path was relative to another working folder.

        transformers keeps the path as it was given, and drops one that does not exist.
        """
        if not self._trainer.resumed_from or state.best_model_checkpoint or not state.best_global_step:
            return
        best = self._trainer.checkpoints.path(state.best_global_step)
        if best.is_dir():
            state.best_model_checkpoint = str(best)
            if self._trainer.is_world_process_zero():
                print(f"Resume: the best checkpoint so far is {best}")

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the random state that the epoch's order is drawn with."""
        self._trainer.stops.begin_epoch()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide whether earlier blocks learn in this optimizer step."""
        lopt: LoPT = self._trainer.lopt
        lopt.learns_locally = state.global_step % lopt.config.local_every == 0
        self._trainer.throughput.begin_step()
        self._trainer.guard.begin_step()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the optimizer is about to step."""
        self._trainer.guard.phase = "optimizer"

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Free the heads' gradients, which the loop does not know."""
        self._trainer.lopt.heads.zero_grad()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the optimizer step in every part."""
        trainer = self._trainer
        if trainer.block_major is not None:
            trainer.block_major.end_step()
        trainer.throughput.end_step()
        trainer.stops.begin_following("step")
        trainer.guard.end_step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note that the evaluation of an epoch may follow."""
        self._trainer.stops.begin_following("epoch")
