"""What waits between stages, or processes, in a planned step: hidden states (B, T, H) and their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Linked:
    """Counts the hidden states (B, T, H) of a process, as `lopt.engine.links` keeps them; in bytes.

    An output is kept until `depth` others have been sent after it, whenever the next process has taken it.
    """

    size: int
    depth: int
    micro_batches: int
    boundary: int

    def of_link(self, position: int) -> int:
        """Return what the link holds in the midst of a step, without the hidden state at work."""
        receives = min(self.depth, self.micro_batches - 1) if position > 0 else 0
        return self.boundary * (receives + self.depth * (position < self.size - 1))

    def during(self, position: int, number: int, blocks: int, slot: int) -> tuple[int, int]:
        """Return what waits while micro-batch `slot` is in a process's block, before and after its output.

        Args:
            position: Of the process.
            number: Of the block, from 0 in this process, which has so many `blocks`.
            slot: Of the micro-batch, from 0.
        """
        left = self.micro_batches - slot
        received = 1 + min(self.depth, left - 1) if position > 0 else 0  # with posted receives
        inputs = left if number > 0 else received
        is_last, sends = number == blocks - 1, self.depth * (position < self.size - 1)
        outputs = sends if is_last else sends + slot
        return self.boundary * (inputs + outputs), self.boundary * (
            inputs + outputs - (is_last and sends > 0)
        )

    def at_step(self, position: int, number: int, blocks: int) -> int:
        """Return what waits while a block is stepped."""
        inner = self.micro_batches * (number < blocks - 1)
        return self.boundary * (inner + self.depth * (position < self.size - 1))
