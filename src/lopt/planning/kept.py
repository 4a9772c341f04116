"""What waits between the stages of a planned optimizer step: hidden states (B, T, H) and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

from lopt.planning.run import Run
from lopt.planning.sizes import StageSizes


class Kept:
    """Counts hidden states and gradients of them, as `lopt.engine.block_major` stashes them.

    Args:
        run: What is planned.
        stages: All stages.
    """

    def __init__(self, run: Run, stages: Sequence[StageSizes]) -> None:
        self._run, self._stages = run, stages

    def during(self, stage: StageSizes, with_graph: bool) -> tuple[int, int, int]:
        """Return how many hidden states, or gradients of them, wait while micro-batches run in `stage`.

        Returns:
            When the first one begins, at most when another one does, and at most in host memory, where an
            output has been copied before an input goes.
        """
        own = [s.index for s in self._stages if s.block == stage.block]
        all_, is_last = self._run.accumulation, stage.index + 1 == len(self._stages)
        inputs = (stage.index - max(own[0], 1) + 1) * all_
        if with_graph and not stage.closes:  # with gradients of its output, and the block's outputs
            inputs += all_ * (1 + (own[-1] + 1 < len(self._stages)))
            return inputs, inputs - 1, inputs
        first = self.has_first_input(stage)
        if not stage.learns or (stage.opens and stage.closes):
            inputs = all_ * (stage.index > 0)  # those of stages before have gone
            replaced = stage.index > 0
        else:
            inputs += all_ * (first and stage.index > 0)
            replaced = first and stage.closes
        if is_last:
            return inputs, inputs, inputs
        kept = 1 + (first and stage.index == 0)
        later = inputs + (0 if replaced else kept * (all_ - 1))
        return inputs, later, later + kept

    def at_step(self, stage: StageSizes) -> int:
        """Return how many wait while a stage is stepped on the device."""
        own = [s.index for s in self._stages if s.block == stage.block]
        count = int(own[-1] + 1 < len(self._stages))
        if not self._run.clips:  # the other stages of its block have not been stepped
            count += stage.index - max(own[0], 1) + 1 if len(own) > 1 else 0
        return count * self._run.accumulation

    def fed(self, stage: StageSizes, with_graph: bool) -> int:
        """Return how many hidden states come out of the stash for a micro-batch in `stage`."""
        earlier = [s for s in self._stages[: stage.index] if s.block == stage.block]
        target = stage.closes and bool(stage.head) and any(s.layers for s in earlier)
        return (stage.index > 0) + with_graph * ((not stage.closes) + target)

    def has_first_input(self, stage: StageSizes) -> bool:
        """Return whether the input of block 1's first layer waits for the block's local loss."""
        first = self._stages[0]
        local = any(s.head for s in self._stages if s.block == 0)
        return stage.block == 0 and local and bool(first.layers) and not first.closes
