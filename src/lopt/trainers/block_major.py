"""The block-major schedule in a trainer's loop.

The loop still asks for one micro-batch after the other. At the first of an optimizer step all of them pass
through the earlier blocks, each of which is clipped and stepped when its last micro-batch is through; after
that the loop's own forwards and backwards are those of the last block alone.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lopt.core.blocks import Block
from lopt.engine.block_major import BlockMajor
from lopt.engine.clipping import clip_block


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
        norms: gradient norms of the earlier blocks in this optimizer step, before clipping; empty where they
            do not learn.
        stepped: indices of the blocks that have been stepped in this optimizer step.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._schedule = BlockMajor(trainer.lopt, trainer.offload)
        self.begin_step()

    def begin_step(self) -> None:
        """Begin an optimizer step."""
        self.norms: list[Tensor] = []
        self.stepped: list[int] = []
        self._prepared: list[Prepared] = []
        self._slot: int | None = None
        self._ready = False

    def end_step(self) -> None:
        """End an optimizer step, in which the last block has been stepped as well."""
        self._schedule.end_step()

    def run_early_blocks(self, batches: list[Any], items: Any) -> None:
        """Run all micro-batches through all blocks but the last, and step each block that learns.

        Args:
            items: number of labels in the optimizer step, as the trainer's loss takes it.
        """
        trainer = self._trainer
        trainer.model.train()
        self._prepared = self._prepare(batches)
        for block in trainer.lopt.blocks[:-1]:
            self._schedule.enter(block)
            for slot in range(len(batches)):
                self._run(block, slot, items)
            if trainer.lopt.learns_locally:
                self._step(block)
            self._schedule.leave(block)
        trainer.micro_batch = 1
        self._schedule.enter(trainer.lopt.blocks[-1])
        self._ready = True

    def inputs(self) -> Any:
        """Return the prepared inputs of the current micro-batch; None if nothing is prepared."""
        return self._prepared[self._trainer.micro_batch - 1].inputs if self._prepared else None

    def stage(self) -> AbstractContextManager[None]:
        """Return what a training forward runs in: the last block alone, if the earlier ones are done."""
        early = self._trainer.lopt.active_block is not None
        if early or not self._ready or not torch.is_grad_enabled():
            return nullcontext()
        return self._schedule.last_block(self._trainer.micro_batch - 1)

    def is_last_micro_batch(self) -> bool:
        """Return whether an earlier block's gradients are complete after the current backward."""
        return self._slot == len(self._prepared) - 1

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

    def _run(self, block: Block, slot: int, items: Any) -> None:
        trainer, prepared = self._trainer, self._prepared[slot]
        trainer.lopt.loss_scale, trainer.share = prepared.loss_scale, prepared.share
        self._slot, trainer.micro_batch = slot, slot + 1

        def forward() -> None:
            copy = dict(prepared.inputs)  # some losses take things out of it
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(trainer.model, copy, num_items_in_batch=items)

        loss = self._schedule.run_early(block, slot, forward)
        if loss is not None:
            trainer.guard.note_losses({block.index: loss}, inputs=prepared.inputs)
        trainer.stops.obey_within_step()

    def _step(self, block: Block) -> None:
        trainer = self._trainer
        if trainer.reduction is not None:
            trainer.reduction.wait()
        trainer.guard.look()
        norm = clip_block(trainer.lopt, block.index, trainer.args.max_grad_norm or math.inf)
        self.norms.append(norm)
        trainer.guard.check_norms(torch.stack(self.norms))
        trainer.stops.partly_stepped = True
        trainer.guard.phase = "optimizer"
        trainer.bare_optimizer().step()  # only this block has gradients
        trainer.guard.phase = "step"
        self.stepped.append(block.index)
        for parameter in trainer.lopt.block_parameters(block.index):
            parameter.grad = None
