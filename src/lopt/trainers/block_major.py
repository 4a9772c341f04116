"""The block-major schedule in a trainer's loop.

The loop still asks for one micro-batch after the other. At the first of an optimizer step all of
them pass through the earlier blocks, each of which is clipped and stepped when its last one is
through; after that the loop's own forwards and backwards are those of the last block alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lopt.core.blocks import Block
from lopt.engine.block_major import BlockMajor
from lopt.engine.optimizer import clip_block


class BlockMajorSteps:
    """What happens between a `LoPTMixin` trainer and its `BlockMajor` schedule.

    Attributes:
        norms: gradient norms of the earlier blocks in this optimizer step, before clipping; empty
            where they rest.
        stepped: the blocks that have been stepped in this optimizer step.
    """

    def __init__(self, trainer: Any) -> None:
        self.norms: list[Tensor] = []
        self.stepped: list[int] = []
        self._trainer = trainer
        self._schedule = BlockMajor(trainer.lopt, trainer.offload)
        self._ready = False
        self._prepared: list[tuple[Any, float, float]] = []
        self._slot: int | None = None

    def begin_step(self) -> None:
        """A new optimizer step: forget the last one."""
        self.norms, self.stepped = [], []
        self._prepared, self._slot, self._ready = [], None, False

    def end_step(self) -> None:
        """The last block has been stepped as well."""
        self._schedule.end_step()

    def run_early_blocks(self, batches: list[Any], items: Any) -> None:
        """All micro-batches through all blocks but the last; steps each block that learns."""
        trainer = self._trainer
        trainer.model.train()
        self._prepared = list(self._prepare(batches))
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

    def _step(self, block: Block) -> None:
        trainer = self._trainer
        if trainer.reduction is not None:
            trainer.reduction.wait()
        norm = clip_block(trainer.lopt, block.index, trainer.args.max_grad_norm or math.inf)
        self.norms.append(norm)
        trainer.check_norms(torch.stack(self.norms))
        trainer.partly_stepped = True
        trainer.doing = "optimizer"
        trainer.bare_optimizer().step()  # only this block has gradients
        trainer.doing = "step"
        self.stepped.append(block.index)
        for parameter in trainer.lopt.block_parameters(block.index):
            parameter.grad = None

    def inputs(self) -> Any:
        """The prepared inputs of the current micro-batch; None if nothing is prepared."""
        if not self._prepared:
            return None
        inputs, *_ = self._prepared[self._trainer.micro_batch - 1]
        return inputs

    def stage(self) -> AbstractContextManager[None]:
        """What a training forward runs in: only the last block, if the earlier ones are done."""
        early = self._trainer.lopt.active_block is not None
        if early or not self._ready or not torch.is_grad_enabled():
            return nullcontext()
        return self._schedule.last_block(self._trainer.micro_batch - 1)

    def is_last_micro_batch(self) -> bool:
        """Whether an earlier block's gradients are complete after the current backward."""
        return self._slot == len(self._prepared) - 1

    def _prepare(self, batches: list[Any]) -> Iterator[tuple[Any, float, float]]:
        """Inputs, local loss scale and share of every micro-batch, as the loop would prepare them."""
        trainer = self._trainer
        counter = getattr(trainer, "_step", None)  # by which on-policy trainers find their rollouts
        for number, batch in enumerate(batches, start=1):
            trainer.micro_batch = number
            inputs = trainer._prepare_inputs(batch)
            yield inputs, trainer.lopt.loss_scale, trainer.share
            if counter is not None:
                trainer._step += 1
        trainer.micro_batch = 1
        if counter is not None:
            trainer._step = counter

    def _run(self, block: Block, slot: int, items: Any) -> None:
        trainer = self._trainer
        inputs, trainer.lopt.loss_scale, trainer.share = self._prepared[slot]
        self._slot, trainer.micro_batch = slot, slot + 1

        def forward() -> None:
            copy = dict(inputs)  # some losses take things out of it
            with trainer.compute_loss_context_manager():
                trainer.compute_loss(trainer.model, copy, num_items_in_batch=items)

        loss = self._schedule.run_early(block, slot, forward)
        if loss is not None:
            trainer.log_losses({block.index: loss}, inputs=inputs)
        trainer.obey_noted()
