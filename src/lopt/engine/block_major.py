"""The block-major schedule: the micro-batches of an optimizer step pass through one stage at a time.

For each block in order:

1. forward sweep: every micro-batch runs without a graph through each stage but the block's last, and each
   stage's input is stashed;
2. in the last stage each micro-batch runs with a graph, and the block's loss (local or task) has its
   backward; the gradient of the stage's input takes the input's place in the stash;
3. backward sweep: stages in reverse, recomputed from their stashed input with the same random numbers, and
   the backward continued from the stashed gradient;
4. a stage's gradient is final then: `Updates` clips and steps it.

A block that does not learn is one forward sweep.

In a pipeline (`lopt.engine.pipeline`) a process does this with its own blocks alone: it receives their input
from the process before it, and sends their output to the next one as soon as it has been computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from torch import Tensor

from lopt.compat import captured_outputs
from lopt.core.attach import LoPT
from lopt.core.boundaries import BoundaryReached
from lopt.engine.links import Link, LinkedStash
from lopt.engine.offload import Offload
from lopt.engine.optimizer import BlockOptimizer
from lopt.engine.random_state import micro_batch_seed
from lopt.engine.stage_pass import FIRST_INPUT, StagePasses
from lopt.engine.stages import Stage
from lopt.engine.stash import Stash
from lopt.engine.updates import Updates

Forward = Callable[[int], Any]
"""Calls the model on the micro-batch of that number, and returns the loss of the task if it comes so far."""

ROUTERS = "`schedule` block_major cannot balance routers over all layers at once: use `schedule` eager"
"""Why a mixture of experts that returns router logits is refused."""


class BlockMajor:
    """Runs an attached model stage by stage; docs/memory.md has a whole loop.

    Args:
        lopt: The handle.
        updates: Steps what is final.
        offload: Moves what the current stage does not need to host memory; None moves nothing.
        link: To the neighbours in a pipeline; None runs all blocks in this process.

    Attributes:
        stages: The stages of the model, in order.
        own: Those that this process runs.
        passes: Runs a micro-batch through one of them.
        stash: What waits between them.
        after_pass: Called after each pass of a micro-batch through a stage that is not the last, with the
            stage, the number of the micro-batch and its local loss, detached and not weighted; None if there
            is none.
    """

    def __init__(
        self, lopt: LoPT, updates: Updates, offload: Offload | None = None, link: Link | None = None
    ) -> None:
        self.stages = updates.stages
        self.own = self.stages.of_pipeline(*((link.position, link.size) if link else (0, 1)))
        self.link = link
        self.updates = updates
        self.after_pass: Callable[[Stage, int, Tensor | None], None] = lambda stage, slot, loss: None
        self._lopt = lopt
        self._offload = offload
        self.stash = self._make_stash()
        self._steps = 0
        self.passes = StagePasses(lopt, self.stages, self.stash, self._learns, link, self.own)
        process = 0 if link is None else link.position  # whose layers draw numbers of their own
        self.passes.seed_of = lambda slot: micro_batch_seed(0, self._steps, slot, process)
        lopt.hooks.append(lopt.blocks.layers[0].register_forward_pre_hook(self._check_routers))

    @property
    def optimizer(self) -> BlockOptimizer:
        """The optimizer of all stages."""
        assert self.updates.optimizer is not None
        return self.updates.optimizer

    def synchronize(self) -> None:
        """Wait until host memory holds the current values of all that is offloaded, as before saving."""
        if self._offload is not None:
            self._offload.synchronize()

    def close(self) -> None:
        """Let go of pinned host memory now; all values stay there."""
        if self._offload is not None:
            self._offload.close()

    @property
    def has_task(self) -> bool:
        """Whether this process runs the model's last stage, which has the loss of the task."""
        return self.own[-1] is self.stages[-1]

    @property
    def stashed_bytes(self) -> int:
        """Bytes of what waits between the stages."""
        return self.stash.nbytes

    @property
    def waited(self) -> float:
        """Seconds that stages have waited for their step in host memory, since the start."""
        return 0.0 if self._offload is None else self._offload.transfer.waited

    # -- an optimizer step ---------------------------------------------------------------------------

    def step(self, slots: int, forward: Forward) -> list[Tensor]:
        """Run one optimizer step.

        Args:
            slots: Number of micro-batches.
            forward: Calls the model on one of them and returns its loss, which is the mean over the optimizer
                step by its share. It is called once for each stage, and must do the same each time.

        Returns:
            The losses, detached; none where another process runs the last stage.

        Raises:
            ValueError: The model is asked for router logits.
        """
        losses = []
        self.run_to_last_stage(slots, forward)
        if self.has_task:
            for slot in range(slots):
                with self.last_stage(slot):
                    loss = forward(slot)
                loss.backward()
                losses.append(loss.detach())
                del loss  # which holds the last stage's input
            self.run_back(slots, forward)
        self.updates.finish()
        self.end_step()
        return losses

    def run_to_last_stage(self, slots: int, forward: Forward) -> None:
        """Run everything up to the model's last stage, which `last_stage` is for then if it is run here."""
        self.stash.clear()
        self.passes.begin_step()
        self.stages.refresh()
        self.updates.begin()
        for stage in self.own[: -1 if self.has_task else None]:
            with_graph = stage.closes and self._learns(stage.block)
            self._enter(stage, with_graph)
            for slot in range(slots):
                self.after_pass(stage, slot, self._run(stage, slot, with_graph, partial(forward, slot)))
            if with_graph:
                self._finish_block(stage, slots, forward)
        if self.has_task:
            self._enter(self.stages[-1], with_graph=True)

    @contextmanager
    def last_stage(self, slot: int) -> Iterator[None]:
        """Within, a forward of the model runs the last stage alone, on micro-batch `slot`."""
        stage = self.stages[-1]
        with self.passes.running(stage, slot, with_graph=True):
            yield
        if not self.stages.reaches_back(stage):
            self.stash.drop(stage.index, slot)

    def run_back(self, slots: int, forward: Forward) -> None:
        """Finish the last block's backward, after that of its last stage."""
        self._finish_block(self.stages[-1], slots, forward)

    def end_step(self) -> None:
        """End the optimizer step; offloaded weights are in host memory then, and current."""
        self._steps += 1
        assert not len(self.stash), "a stage has not run"
        if self._offload is not None:
            self._offload.end_step()

    def _finish_block(self, last: Stage, slots: int, forward: Forward) -> None:
        """Run the backward sweep of the block that ends in `last`, whose own backward is done."""
        self.updates.stage_done(last)
        for stage in reversed(self.stages.of_block(last.block)[:-1]):
            if not self._runs_back(stage):
                self._forget(stage, slots)
                continue
            self._enter(stage, with_graph=True)
            self.updates.return_shared(stage)
            for slot in range(slots):
                self._run_back(stage, slot, partial(forward, slot))
                self.after_pass(stage, slot, None)
            self.updates.stage_done(stage)

    def turn_to(self, stage: Stage, following: Stage) -> None:
        """Bring the weights of `stage` to the device, outside an optimizer step; begin with `following`."""
        if self._offload is not None:
            self._offload.enter(stage, False, following)

    def _enter(self, stage: Stage, with_graph: bool) -> None:
        if self._offload is not None:
            self.updates.put_away()
            will_step = with_graph and self.updates.steps_at_once(stage)
            self._offload.enter(stage, will_step, self._stage_after(stage, back=with_graph))

    def _runs_back(self, stage: Stage) -> bool:
        """Return whether the backward sweep of its block runs through `stage`."""
        return self.stages.reaches_back(stage) or bool(self.stages.parameters(stage))

    def _stage_after(self, stage: Stage, back: bool) -> Stage | None:
        """Return the stage that the device turns to after `stage`.

        Args:
            stage: Of a block whose backward is on its way if `back`.
            back: Whether the next stage is an earlier one of the block, if its backward runs through any.
        """
        of_block = self.stages.of_block(stage.block)
        earlier = [s for s in of_block if s.index < stage.index and self._runs_back(s)] if back else []
        if earlier:
            return earlier[-1]
        later = of_block[-1].index + 1 if back else stage.index + 1
        return self.stages[later] if later <= self.own[-1].index else None

    def _make_stash(self) -> Stash:
        on_host = self._offload is not None and self._offload.weights is not None
        if self.link is None:
            return Stash(self._lopt.device, on_host)
        first, last = self.own[0].index, self.own[-1]
        stash = LinkedStash(self._lopt.device, on_host, self.link, first, last.index + 1)
        if not self.has_task:  # the output leaves before the block's own backward
            layer = self._lopt.blocks.layers[last.stop - 1]
            self._lopt.hooks.append(layer.register_forward_hook(self._send, prepend=True))
        return stash

    def _send(self, module: Any, args: tuple, output: Any) -> None:
        one = self.passes.now
        if one is None:
            return
        hidden = output[0] if isinstance(output, tuple | list) else output
        if one.relays:
            assert self.link is not None
            self.link.send(hidden)
        elif one.stage is self.own[-1]:
            self.stash.put(one.stage.index + 1, one.slot, hidden)

    def _check_routers(self, module: Any, args: tuple) -> None:
        """Raise a ValueError if this pass collects router logits, which would be those of one stage."""
        if self.passes.now is not None and "router_logits" in captured_outputs():
            raise ValueError(f"{ROUTERS}, or leave `output_router_logits` False")

    def _learns(self, block: int) -> bool:
        is_last = block == len(self._lopt.blocks) - 1
        return is_last or (self._lopt.learns_locally and block in self._lopt.learning)

    # -- passes --------------------------------------------------------------------------------------

    def _run(self, stage: Stage, slot: int, with_graph: bool, forward: Callable[[], Any]) -> Tensor | None:
        """Run a micro-batch through a stage, with its local backward if it has one; return that loss."""
        with self.passes.running(stage, slot, with_graph) as one, suppress(BoundaryReached):
            forward()
        assert one.output is not None, "the forward did not run the model with gradients on"
        self.stash.put(stage.index + 1, slot, one.output)
        if not self._learns(stage.block) or (with_graph and stage.opens):
            self.stash.drop(stage.index, slot)
        if with_graph and not stage.opens:
            self.stash.drop(FIRST_INPUT, slot)
        return self._lopt.local_losses()[0] if with_graph and self._lopt.heads else None

    def _run_back(self, stage: Stage, slot: int, forward: Callable[[], Any]) -> None:
        """Recompute a stage of one micro-batch and continue its backward."""
        gradient = self.stash.get(stage.index + 1, slot)
        self.stash.drop(stage.index + 1, slot)
        with self.passes.running(stage, slot, with_graph=True) as one, suppress(BoundaryReached):
            forward()
        assert one.output is not None
        output, one.output = one.output, None
        output.backward(gradient)
        if not self.stages.reaches_back(stage):
            self.stash.drop(stage.index, slot)

    def _forget(self, stage: Stage, slots: int) -> None:
        """Drop what the backward sweep of `stage` would need, as nothing learns there."""
        for slot in range(slots):
            self.stash.drop(stage.index, slot)
            self.stash.drop(stage.index + 1, slot)
