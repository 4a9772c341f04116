"""The task's exact gradients at the boundaries, to which predicted gradients are fitted.

A forward that no boundary cuts, and a backward that passes activations only: no parameter gets a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from lopt.core.attach import LoPT
from lopt.core.boundaries import BoundaryReached
from lopt.engine.block_major import BlockMajor
from lopt.engine.stage_pass import NO_BLOCK
from lopt.engine.stages import Stage

Take = Callable[[int, int, Tensor, Tensor], None]
"""Is given an earlier block that learns, the number of a micro-batch, the block's output and the gradient of
the loss by it, both (B, T, H)."""


def exact_gradients(lopt: LoPT, slots: int, forward: Callable[[int], Tensor], take: Take) -> None:
    """Run micro-batches through the whole model at once.

    Args:
        slots: Number of micro-batches.
        forward: Returns the loss of one of them.
    """
    blocks = lopt.blocks
    states: list[Tensor] = []

    def leave(module: Any, args: tuple, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple | list) else output
        states.append(hidden if states else hidden.detach().requires_grad_())
        return (states[-1], *output[1:]) if isinstance(output, tuple | list) else states[-1]

    hooks = [blocks.layers[blocks[index].stop - 1].register_forward_hook(leave) for index in lopt.learning]
    active, lopt.active_block = lopt.active_block, NO_BLOCK
    try:
        with _nothing_learns(lopt):
            for slot in range(slots):
                gradients = torch.autograd.grad(forward(slot), states)
                for block, state, gradient in zip(lopt.learning, states, gradients, strict=True):
                    take(block, slot, state.detach(), gradient)
                states.clear()
    finally:
        lopt.active_block = active
        for hook in hooks:
            hook.remove()


class StagedGradients:
    """Runs micro-batches stage by stage, forth and back again.

    Args:
        schedule: What else runs the stages, between its optimizer steps.
    """

    def __init__(self, lopt: LoPT, schedule: BlockMajor) -> None:
        self._lopt = lopt
        self._schedule = schedule

    def run(self, slots: int, forward: Callable[[int], Tensor], take: Take) -> None:
        """Run micro-batches; arguments as of `exact_gradients`."""
        schedule, stages = self._schedule, self._schedule.stages
        first = stages.of_block(self._lopt.learning[0])[-1].index  # behind which gradients are wanted
        schedule.stash.clear()
        schedule.passes.begin_step()
        with _nothing_learns(self._lopt):
            for stage in stages[:-1]:
                schedule.turn_to(stage, stages[stage.index + 1])
                for slot in range(slots):
                    schedule.stash.put(stage.index + 1, slot, self._output(stage, slot, forward))
                    if stage.index <= first:
                        schedule.stash.drop(stage.index, slot)
            for stage in reversed(stages[first + 1 :]):
                schedule.turn_to(stage, stages[max(stage.index - 1, 0)])
                for slot in range(slots):
                    self._run_back(stage, slot, forward, take)
        schedule.stash.clear()

    def _output(self, stage: Stage, slot: int, forward: Callable[[int], Tensor]) -> Tensor:
        """Return the output (B, T, H) of a stage that runs without a graph."""
        with self._schedule.passes.running(stage, slot, with_graph=False) as one, suppress(BoundaryReached):
            forward(slot)
        assert one.output is not None
        return one.output

    def _run_back(self, stage: Stage, slot: int, forward: Callable[[int], Tensor], take: Take) -> None:
        """Run a stage with a graph and its backward; the gradient by its input takes the input's place."""
        schedule, result = self._schedule, None
        with (
            schedule.passes.running(stage, slot, with_graph=True, exact=True) as one,
            suppress(BoundaryReached),
        ):
            result = forward(slot)
        if result is None:
            assert one.output is not None
            one.output.backward(schedule.stash.get(stage.index + 1, slot))
            schedule.stash.drop(stage.index + 1, slot)
        else:
            result.backward()
        if stage.opens:
            state, gradient = one.feeds[stage.start].detach(), schedule.stash.get(stage.index, slot)
            take(stage.block - 1, slot, state, gradient)


@contextmanager
def _nothing_learns(lopt: LoPT) -> Iterator[None]:
    """Within, no parameter of the model gets a gradient, and forwards record what hidden states need."""
    learning = [parameter for parameter in lopt.model.parameters() if parameter.requires_grad]
    learns, lopt.learns_locally = lopt.learns_locally, True  # or earlier blocks would run without a graph
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        lopt.learns_locally = learns
        for parameter in learning:
            parameter.requires_grad_(True)
