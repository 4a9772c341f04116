"""The block-major schedule: all micro-batches of an optimizer step pass through one stage of the model at a
time.

For each block in order:

1. forward sweep: every micro-batch runs without a graph through each stage but the block's last, and each
   stage's input is stashed;
2. in the last stage each micro-batch runs with a graph, and the block's loss (local or task) has its
   backward; the gradient of the stage's input takes the input's place in the stash;
3. backward sweep: stages in reverse, recomputed from their stashed input with the same random numbers, and
   the backward continued from the stashed gradient;
4. a stage's gradient is final then: `Updates` clips and steps it.

A block that does not learn is one forward sweep.

Each pass is a forward of the model as the caller makes it, in which one stage runs: the layers before it
return what they are given, its own input comes from the stash, and behind it the forward is ended. Masks,
rotary embeddings and layer types stay the library's. A forward without gradients (of a reference model that
shares the weights, of an evaluation) is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lopt.architectures import base_model
from lopt.compat import recompute_forward_only
from lopt.core.attach import LoPT
from lopt.core.blocks import Block
from lopt.core.boundaries import BoundaryReached
from lopt.engine.offload import Offload
from lopt.engine.optimizer import BlockOptimizer
from lopt.engine.random_state import (
    RandomState,
    micro_batch_seed,
    random_numbers,
    random_state,
    set_random_state,
)
from lopt.engine.stages import Stage
from lopt.engine.stash import Stash
from lopt.engine.updates import Updates

Forward = Callable[[int], Any]
"""Calls the model on the micro-batch of that number, and returns the loss of the task if it comes so far."""


@dataclass
class Pass:
    """One micro-batch in one stage.

    Attributes:
        with_graph: Gradients are recorded.
        feeds: What the layers of these numbers are given in place of their input, (B, T, H).
        output: (B, T, H) what came out of the stage.
    """

    stage: Stage
    slot: int
    with_graph: bool
    feeds: dict[int, Tensor] = field(default_factory=dict)
    output: Tensor | None = None


class BlockMajor:
    """Runs an attached model stage by stage; docs/memory.md has a whole loop.

    Args:
        lopt: The handle.
        updates: Steps what is final.
        offload: Moves what the current stage does not need to host memory; None moves nothing.

    Attributes:
        stages: The stages, in order.
        seed_of: Returns the seed of the random numbers of a micro-batch, by its number.
        after_pass: Called after each pass of a micro-batch through a stage that is not the last, with the
            stage, the number of the micro-batch and its local loss, detached and not weighted; None if there
            is none.
    """

    def __init__(self, lopt: LoPT, updates: Updates, offload: Offload | None = None) -> None:
        self.stages = updates.stages
        self.updates = updates
        self.seed_of: Callable[[int], int] = lambda slot: micro_batch_seed(0, self._steps, slot)
        self.after_pass: Callable[[Stage, int, Tensor | None], None] = lambda stage, slot, loss: None
        self._lopt = lopt
        self._offload = offload
        self._embedding: Any = base_model(lopt.model).get_input_embeddings()
        self._stash = Stash(lopt.device, on_host=offload is not None and offload.weights is not None)
        self._random: dict[tuple[int, int], RandomState] = {}
        self._steps = 0
        self._pass: Pass | None = None  # that the next forward with gradients is
        self._running: Pass | None = None
        self._own_forwards: dict[Any, Any] = {}
        self._beside: tuple[None, ...] | None = None  # what layers return beside a hidden state, if tuples
        decoder, layers = lopt.blocks.decoder, lopt.blocks.layers
        # Ahead of the handle's own hooks, which must see the pass and its real input.
        lopt.hooks.append(decoder.register_forward_pre_hook(self._enter_decoder, prepend=True))
        lopt.hooks.append(decoder.register_forward_hook(self._leave_decoder, always_call=True))
        for index, layer in enumerate(layers):
            enter = partial(self._enter_layer, index)
            lopt.hooks.append(layer.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        lopt.hooks.append(layers[0].register_forward_hook(self._note_kind))
        lopt.hooks.append(layers[-1].register_forward_hook(self._leave_last_layer))

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
    def stashed_bytes(self) -> int:
        """Bytes of what waits between the stages."""
        return self._stash.nbytes

    # -- an optimizer step ---------------------------------------------------------------------------

    def step(self, slots: int, forward: Forward) -> list[Tensor]:
        """Run one optimizer step.

        Args:
            slots: Number of micro-batches.
            forward: Calls the model on one of them and returns its loss, which is the mean over the optimizer
                step by its share. It is called once for each stage, and must do the same each time.

        Returns:
            The losses, detached.
        """
        losses = []
        self.run_to_last_stage(slots, forward)
        for slot in range(slots):
            with self.last_stage(slot):
                loss = forward(slot)
            loss.backward()
            losses.append(loss.detach())
        self.run_back(slots, forward)
        self.updates.finish()
        self.end_step()
        return losses

    def run_to_last_stage(self, slots: int, forward: Forward) -> None:
        """Run everything up to the model's last stage, which `last_stage` is for then."""
        self._stash.clear()
        self._random.clear()
        self.stages.refresh()
        self.updates.begin()
        for stage in self.stages[:-1]:
            with_graph = stage.closes and self._learns(stage.block)
            self._enter(stage, will_step=with_graph)
            for slot in range(slots):
                self.after_pass(stage, slot, self._run(stage, slot, with_graph, partial(forward, slot)))
            if with_graph:
                self._finish_block(stage, slots, forward)
        self._enter(self.stages[-1], will_step=True)

    @contextmanager
    def last_stage(self, slot: int) -> Iterator[None]:
        """Within, a forward of the model runs the last stage alone, on micro-batch `slot`."""
        stage = self.stages[-1]
        with self._passing(stage, slot, with_graph=True):
            yield
        if not self.stages.reaches_back(stage):
            self._stash.drop(stage.index, slot)

    def run_back(self, slots: int, forward: Forward) -> None:
        """Finish the last block's backward, after that of its last stage."""
        self._finish_block(self.stages[-1], slots, forward)

    def end_step(self) -> None:
        """End the optimizer step; offloaded weights are in host memory then, and current."""
        self._steps += 1
        assert not len(self._stash), "a stage has not run"
        if self._offload is not None:
            self._offload.end_step()

    def _finish_block(self, last: Stage, slots: int, forward: Forward) -> None:
        """Run the backward sweep of the block that ends in `last`, whose own backward is done."""
        self.updates.stage_done(last)
        for stage in reversed(self.stages.of_block(last.block)[:-1]):
            if not (self.stages.reaches_back(stage) or self.stages.parameters(stage)):
                self._forget(stage, slots)
                continue
            self._enter(stage, will_step=True)
            self.updates.return_shared(stage)
            for slot in range(slots):
                self._run_back(stage, slot, partial(forward, slot))
                self.after_pass(stage, slot, None)
            self.updates.stage_done(stage)

    def _enter(self, stage: Stage, will_step: bool) -> None:
        if self._offload is not None:
            self.updates.put_away()
            following = self.stages[stage.index + 1] if stage.index + 1 < len(self.stages) else None
            self._offload.enter(stage, will_step, following)

    def _learns(self, block: int) -> bool:
        is_last = block == len(self._lopt.blocks) - 1
        return is_last or (self._lopt.learns_locally and block in self._lopt.learning)

    # -- passes --------------------------------------------------------------------------------------

    def _run(self, stage: Stage, slot: int, with_graph: bool, forward: Callable[[], Any]) -> Tensor | None:
        """Run a micro-batch through a stage, with its local backward if it has one; return that loss."""
        with self._passing(stage, slot, with_graph) as one, suppress(BoundaryReached):
            forward()
        assert one.output is not None, "the forward did not run the model with gradients on"
        self._stash.put(stage.index + 1, slot, one.output)
        if not self._learns(stage.block) or (with_graph and stage.opens):
            self._stash.drop(stage.index, slot)
        if with_graph and not stage.opens:
            self._stash.drop(_FIRST_INPUT, slot)
        return self._lopt.local_losses()[0] if with_graph and self._lopt.heads else None

    def _run_back(self, stage: Stage, slot: int, forward: Callable[[], Any]) -> None:
        """Recompute a stage of one micro-batch and continue its backward."""
        gradient = self._stash.get(stage.index + 1, slot)
        self._stash.drop(stage.index + 1, slot)
        with self._passing(stage, slot, with_graph=True) as one, suppress(BoundaryReached):
            forward()
        assert one.output is not None
        output, one.output = one.output, None
        output.backward(gradient)
        if not self.stages.reaches_back(stage):
            self._stash.drop(stage.index, slot)

    def _forget(self, stage: Stage, slots: int) -> None:
        """Drop what the backward sweep of `stage` would need, as nothing learns there."""
        for slot in range(slots):
            self._stash.drop(stage.index, slot)
            self._stash.drop(stage.index + 1, slot)

    @contextmanager
    def _passing(self, stage: Stage, slot: int, with_graph: bool) -> Iterator[Pass]:
        """Within, a forward with gradients on runs `stage` alone."""
        self._pass = Pass(stage, slot, with_graph)
        try:
            with random_numbers(self._lopt.device, self.seed_of(slot)):
                yield self._pass
                self._random.setdefault((stage.index + 1, slot), random_state(self._lopt.device))
        finally:
            self._stop_running()
            self._pass = None

    def _inputs(self, one: Pass) -> dict[int, Tensor]:
        """Return what is fed to layers in this pass: the stage's input, and for a local loss the block's."""
        stage = one.stage
        feeds: dict[int, Tensor] = {}
        if stage.index == 0:
            return feeds
        block = self._lopt.blocks[stage.block]
        if one.with_graph and self._has_local_loss(stage) and stage.start > block.start:
            feeds[block.start] = self._stash.get(self._place_of_input(block), one.slot)
        leaf = self._stash.get(stage.index, one.slot)
        if one.with_graph and self.stages.reaches_back(stage):
            leaf.requires_grad_()
            leaf.register_post_accumulate_grad_hook(partial(self._keep_gradient, stage.index, one.slot))
        feeds[stage.start] = leaf
        return feeds

    def _has_local_loss(self, stage: Stage) -> bool:
        return stage.closes and stage.block in self._lopt.learning

    def _keeps_first_input(self, one: Pass) -> bool:
        """Return whether a later stage has the local loss of block 1, which is about this input."""
        stage = one.stage
        early = stage.index == 0 and stage.stop > 0 and not stage.closes and not one.with_graph
        return early and 0 in self._lopt.learning and self._learns(0)

    def _place_of_input(self, block: Block) -> int:
        """Return the place in the stash of the input (B, T, H) of a block's first layer."""
        opening: Stage = self.stages.of_block(block.index)[0]
        if opening.index > 0:
            return opening.index
        return 1 if opening.stop == 0 else _FIRST_INPUT

    def _keep_gradient(self, stage: int, slot: int, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self._stash.put(stage, slot, leaf.grad)
        leaf.grad = None

    # -- hooks ---------------------------------------------------------------------------------------

    def _enter_decoder(self, module: Any, args: tuple) -> None:
        self._stop_running()  # a forward that Ctrl-C has ended
        one = self._pass
        if one is None or not torch.is_grad_enabled():
            return
        layers = self._lopt.blocks.layers
        one.feeds = self._inputs(one)
        replaced: dict[Any, Callable[..., Any]] = {
            layer: self._skip_layer for layer in layers[: one.stage.start]
        }
        if one.stage.index > 0:
            replaced[self._embedding] = self._skip_embedding
        if one.stage.start == len(layers):
            replaced[layers[-1]] = partial(self._skip_to, one.feeds[len(layers)])
        self._running, self._lopt.active_block = one, one.stage.block
        self._own_forwards = {module: vars(module).get("forward") for module in replaced}
        for module, forward in replaced.items():
            module.forward = forward
        if one.with_graph:
            recompute_forward_only([self._lopt.blocks.decoder, *layers])
        else:
            torch.set_grad_enabled(False)

    def _leave_decoder(self, module: Any, args: tuple, output: Any) -> None:
        self._stop_running()

    def _stop_running(self) -> None:
        """Give the model its own forwards back."""
        if self._running is None:
            return
        for module, forward in self._own_forwards.items():
            del module.forward
            if forward is not None:
                module.forward = forward
        self._running, self._lopt.active_block, self._own_forwards = None, None, {}
        torch.set_grad_enabled(True)

    def _enter_layer(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        one = self._running
        if one is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0 and self._keeps_first_input(one):
            self._stash.put(_FIRST_INPUT, one.slot, hidden)
        if index == one.stage.stop and one.stage.index + 1 < len(self.stages):
            one.output = hidden
            raise BoundaryReached
        if index not in one.feeds:
            return None
        if index == one.stage.start:
            self._continue_random(one)
        hidden = one.feeds[index]
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def _continue_random(self, one: Pass) -> None:
        """Go on where the stage before has ended; what feeds the first layer may have drawn some."""
        set_random_state(self._lopt.device, self._random[one.stage.index, one.slot])

    def _leave_last_layer(self, module: Any, args: tuple, output: Any) -> None:
        one = self._running
        layers = len(self._lopt.blocks.layers)
        if one is not None and one.stage.start == layers:
            self._continue_random(one)
        if one is not None and one.stage.stop == layers and one.stage.index + 1 < len(self.stages):
            one.output = output[0] if isinstance(output, tuple | list) else output
            raise BoundaryReached

    def _note_kind(self, module: Any, args: tuple, output: Any) -> None:
        """Note what a layer returns: stages run in order, so that layer 1 runs before any is skipped."""
        if isinstance(output, tuple | list):
            self._beside = (None,) * (len(output) - 1)

    def _skip_embedding(self, input_ids: Tensor) -> Tensor:
        """Return zeros (B, T, E) in place of an embedding that no layer reads."""
        weight = self._embedding.weight
        return weight.new_zeros((*input_ids.shape, weight.shape[1]), device=input_ids.device)

    def _skip_layer(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states if self._beside is None else (hidden_states, *self._beside)

    def _skip_to(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._skip_layer(hidden)


_FIRST_INPUT = -1
"""Place in the stash of the input of block 1's first layer, in the midst of its first stage."""
