"""The block-major schedule in a trainer's loop.

The loop still asks for one micro-batch after the other. At the first of an optimizer step all of them pass
through every stage but the model's last; after that the loop's own forwards and backwards are those of the
last stage alone; after the last of them the backward of the last block's other stages follows. Stages are
clipped and stepped on the way, as soon as they can be; the loop's own step finds nothing left to do.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopt.data.batches import token_shape
from lopt.engine.block_major import BlockMajor
from lopt.engine.offload import Offload, move_rest
from lopt.engine.pipeline import leave_out, make_link
from lopt.engine.random_state import micro_batch_seed, random_numbers
from lopt.engine.reduction import average_gradients
from lopt.engine.stages import Stage, Stages
from lopt.engine.updates import Updates
from lopt.trainers.pipeline import WAITS


@dataclass
class Prepared:
    """A micro-batch as the loop would prepare it: inputs, scale of its local losses, share of the step."""

    inputs: Any
    loss_scale: float
    share: float


class BlockMajorSteps:
    """Runs a trainer's optimizer steps by a `BlockMajor` schedule.

    Args:
        trainer: a trainer with `LoPTMixin`, which calls this class from its loop.

    Attributes:
        stages: the stages of its model.
        schedule: what runs them.
        offload: moves what no stage needs now to host memory; None if nothing moves.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        lopt, device, place = trainer.lopt, trainer.args.device, trainer.grid
        self.stages = Stages(lopt)
        link = None
        if place is not None:
            link = make_link(lopt, place.group, device, lopt.config.pipeline_depth)
            leave_out(lopt, self.stages, self.stages.of_pipeline(place.position, place.size))
        self.offload = Offload.of_config(lopt, self.stages, device)
        if place is not None and not trainer.weights_offloaded:
            move_rest(lopt.model, (), device)
        self._updates = Updates(lopt, self.stages, offload=self.offload)
        self._updates.before_step = self._before_step
        if torch.distributed.is_initialized():
            self._updates.reduce = average_gradients
        self.schedule = BlockMajor(lopt, self._updates, self.offload, link)
        self.schedule.passes.seed_of = lambda slot: random_seed(trainer, slot)
        self.schedule.after_pass = self._after_pass
        self._waited = 0.0
        self._linked = (0.0, 0.0)
        self.begin_step()

    @property
    def stepped(self) -> list[int]:
        """Blocks that have been stepped in this optimizer step, at least in part."""
        return self._updates.stepped

    def begin_step(self) -> None:
        """Begin an optimizer step."""
        self._updates.begin()
        self._prepared: list[Prepared] = []
        self._items: Any = None
        self._in_loop = False  # the loop's own forwards are those of the last stage

    def end_step(self) -> None:
        """End an optimizer step."""
        self.schedule.end_step()
        if (link := self.schedule.link) is not None:
            waits = link.waited - self._linked[0], link.blocked - self._linked[1]
            for name, seconds in zip(WAITS, waits, strict=True):
                self._trainer.average(name, seconds)
        if self.offload is not None and self.offload.host is not None:
            waited, self._waited = self._waited, self.schedule.waited
            self._trainer.average("host_wait_seconds", self._waited - waited)
        self.begin_step()

    def run_to_last_stage(self, batches: list[Any], items: Any) -> None:
        """Run all micro-batches through all stages but the last.

        Args:
            items: number of labels in the optimizer step, as the trainer's loss takes it.
        """
        trainer = self._trainer
        trainer.model.train()
        self._updates.optimizer = trainer.bare_optimizer()
        self._updates.max_norm = trainer.args.max_grad_norm or math.inf
        self._items, self._prepared = items, self._prepare(batches)
        if (link := self.schedule.link) is not None:
            self._linked = link.waited, link.blocked
            link.largest()  # of an evaluation
            link.expect([token_shape(one.inputs) for one in self._prepared])
        self.schedule.run_to_last_stage(len(batches), self._forward)
        self._set_slot(0)
        trainer.guard.phase = "step"
        self._in_loop = True

    def run_back(self) -> None:
        """Run the rest of the last block's backward, after that of its last stage."""
        self._in_loop = False
        self.schedule.run_back(len(self._prepared), self._forward)

    def finish(self) -> Tensor:
        """Step what is left and return the norms (k,) of all blocks, before clipping."""
        return self._updates.finish()

    def inputs(self) -> Any:
        """Return the prepared inputs of the current micro-batch; None if nothing is prepared."""
        return self._prepared[self._trainer.micro_batch - 1].inputs if self._prepared else None

    def stage(self) -> AbstractContextManager[None]:
        """Return what a training forward of the loop runs in: the last stage alone."""
        if not self._in_loop or not torch.is_grad_enabled():
            return nullcontext()
        return self.schedule.last_stage(self._trainer.micro_batch - 1)

    def _prepare(self, batches: list[Any]) -> list[Prepared]:
        trainer, prepared = self._trainer, []
        for number, batch in enumerate(batches, start=1):
            trainer.micro_batch = number
            inputs = trainer._prepare_inputs(batch)
            prepared.append(Prepared(inputs, trainer.lopt.loss_scale, trainer.share))
            trainer.skip_micro_batches(1)
        trainer.skip_micro_batches(-len(batches))
        trainer.micro_batch = 1
        return prepared

    def _set_slot(self, slot: int) -> None:
        trainer, prepared = self._trainer, self._prepared[slot]
        trainer.lopt.loss_scale, trainer.share = prepared.loss_scale, prepared.share
        trainer.micro_batch = slot + 1

    def _forward(self, slot: int) -> None:
        trainer = self._trainer
        self._set_slot(slot)
        trainer.guard.phase = "step"
        inputs = dict(self._prepared[slot].inputs)  # some losses take things out of it
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, inputs, num_items_in_batch=self._items)

    def _after_pass(self, stage: Stage, slot: int, loss: Tensor | None) -> None:
        trainer = self._trainer
        if loss is not None:
            trainer.guard.note_losses({stage.block: loss}, inputs=self._prepared[slot].inputs)
        trainer.stops.obey_within_step()

    def _before_step(self, norms: Tensor) -> None:
        trainer = self._trainer
        trainer.guard.look()
        trainer.guard.check_norms(norms)
        trainer.stops.partly_stepped = True
        trainer.guard.phase = "optimizer"


def loss_context(trainer: Any) -> AbstractContextManager[None]:
    """Return what a trainer computes a loss in: the stage that it is for, and random numbers of its own."""
    if trainer.block_major is not None:
        return trainer.block_major.stage()
    if not (trainer.model.training and torch.is_grad_enabled()):
        return nullcontext()
    return random_numbers(trainer.args.device, random_seed(trainer, trainer.micro_batch - 1))


def random_seed(trainer: Any, slot: int) -> int:
    """Return the seed of the random numbers that micro-batch `slot` (from 0) of this optimizer step draws."""
    args, place = trainer.args, trainer.grid
    process = args.process_index if place is None else place.rank  # layers of other processes draw others
    return micro_batch_seed(args.seed, trainer.state.global_step, slot, process)
