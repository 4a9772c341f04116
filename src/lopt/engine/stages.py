"""The stages of a model: what the device holds at a time in the block-major schedule.

A block has one or more stages, each a run of its layers. What feeds the first layer (the token embedding) and
what follows the last one (final norm, LM head) belong to the first and last stage, which may have no layers
beside them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lopt.architectures import base_model
from lopt.core.attach import LoPT


@dataclass(frozen=True)
class Stage:
    """Layers `start` (included) to `stop` (excluded) of block `block`.

    Attributes:
        index: Number of the stage in the model, from 0.
        block: Index of its block.
        opens: It is the first of its block.
        closes: It is the last of its block.
    """

    index: int
    block: int
    start: int
    stop: int
    opens: bool
    closes: bool


class Stages(Sequence[Stage]):
    """The stages of an attached model, in order, as its config asks for.

    Args:
        lopt: The handle.
    """

    def __init__(self, lopt: LoPT) -> None:
        self._lopt = lopt
        base: Any = base_model(lopt.model)
        blocks = lopt.blocks
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        self._parts: list[list[nn.Module]] = [
            [*blocks.front, embedding],
            *([layer] for layer in blocks.layers),
            [*blocks.tail, head],
        ]
        layers = len(blocks.layers)
        self._spans = self._split()
        self._stages: list[Stage] = []
        for block, spans in enumerate(self._spans):
            for number, (first, end) in enumerate(spans):
                opens, closes = number == 0, number == len(spans) - 1
                start, stop = max(first - 1, 0), min(end - 1, layers)
                self._stages.append(Stage(len(self._stages), block, start, stop, opens, closes))
        assert self._stages[-1].stop == layers
        self.refresh()

    def __len__(self) -> int:
        return len(self._stages)

    def __getitem__(self, index: Any) -> Any:
        return self._stages[index]

    def of_block(self, index: int) -> list[Stage]:
        """Return the stages of block `index` (from 0)."""
        return [stage for stage in self._stages if stage.block == index]

    def of_pipeline(self, position: int, size: int) -> list[Stage]:
        """Return the stages of the blocks that process `position` (from 0) of `size` has."""
        own = dealt(len(self._spans), position, size)
        return [stage for stage in self._stages if stage.block in own]

    def modules(self, stage: Stage) -> list[nn.Module]:
        """Return the modules of `stage`: its layers, and what is before or after all layers."""
        spans = [span for block in self._spans for span in block]
        return _unique(module for part in self._parts[slice(*spans[stage.index])] for module in part)

    def parameters(self, stage: Stage) -> list[nn.Parameter]:
        """Return the parameters of `stage` that learn, its block's head with the block's last stage.

        A matrix that is both token embedding and LM head belongs to the first stage.
        """
        return self._learning[stage.index]

    def borrowed(self, stage: Stage) -> list[nn.Parameter]:
        """Return the parameters of modules of `stage` that learn and belong to another stage."""
        return [] if stage.index + 1 < len(self) or stage.index == 0 else self._borrowed

    def reaches_back(self, stage: Stage) -> bool:
        """Return whether an earlier stage of its block learns, which needs the gradient of its input."""
        return self._reaching[stage.index]

    def owner(self, parameter: nn.Parameter) -> int:
        """Return the index of the stage that a parameter of the model or of a head belongs to."""
        return self._owners[parameter]

    def refresh(self) -> None:
        """Look again at what learns; untying and freezing come before."""
        claims: dict[nn.Parameter, int] = {}
        for stage in reversed(self._stages):  # so that a shared matrix belongs to the first
            claims |= {p: stage.index for m in self.modules(stage) for p in m.parameters()}
        for stage in self._stages:
            if stage.closes and stage.block < len(self._lopt.heads):
                claims |= dict.fromkeys(self._lopt.heads[stage.block].parameters(), stage.index)
        self._owners = {p: 0 for p in self._lopt.model.parameters()} | claims
        head = [p for module in self._parts[-1] for p in module.parameters()]
        self._borrowed = [p for p in head if claims[p] != len(self) - 1 and p.requires_grad]
        self._learning: list[list[nn.Parameter]] = [[] for _ in self._stages]
        for block in self._lopt.blocks:
            for parameter in self._lopt.block_parameters(block.index):
                self._learning[self._owners[parameter]].append(parameter)
        self._reaching: list[bool] = []
        for stage in self._stages:
            before = stage.index - 1
            self._reaching.append(
                not stage.opens and (self._reaching[before] or bool(self._learning[before]))
            )

    def _split(self) -> list[list[tuple[int, int]]]:
        """Return for each block its stages as spans of parts: the first part, every layer, the last part."""
        config = self._lopt.config
        costs = [sum(_cost(module) for module in _unique(modules)) for modules in self._parts]
        stops = [block.stop for block in self._lopt.blocks]
        return split_into_stages(costs, stops, config.stages, config.stage_layers)


def dealt(blocks: int, position: int, size: int) -> range:
    """Return the blocks of process `position` (from 0) of `size`: in order, as evenly as can be."""
    return range(blocks * position // size, blocks * (position + 1) // size)


def split_into_stages(
    costs: list[int], block_stops: list[int], stages: int | None = None, stage_layers: int | None = None
) -> list[list[tuple[int, int]]]:
    """Split the parts of a model, which are what feeds its layers, every layer, and what follows them.

    Args:
        costs: Of each part, in bytes.
        block_stops: The layer after the last one of each block.
        stages: Of the whole model; default: as many as blocks.
        stage_layers: Instead of it the largest number of layers of a stage.

    Returns:
        For each block its stages as spans (start, stop) of parts.
    """
    ends = [stop + 1 for stop in block_stops]
    ends[-1] += 1
    parts = list(zip([0, *ends], ends, strict=False))
    if stage_layers is not None:
        return [_by_layers(start, stop, costs, stage_layers) for start, stop in parts]
    tables = [_Splits(costs[start:stop]) for start, stop in parts]
    numbers = [1] * len(parts)
    wanted = len(parts) if stages is None else stages
    assert wanted <= len(costs), "the caller has checked the number of stages"
    while sum(numbers) < wanted:  # the largest stage is split next
        possible = [b for b, (start, stop) in enumerate(parts) if numbers[b] < stop - start]
        largest = max(possible, key=lambda b: tables[b].largest(numbers[b]))
        numbers[largest] += 1
    return [
        [(start + a, start + b) for a, b in table.spans(number)]
        for (start, _), table, number in zip(parts, tables, numbers, strict=True)
    ]


class _Splits:
    """Ways to split a list of costs into contiguous spans so that the largest span is as small as can be."""

    def __init__(self, costs: list[int]) -> None:
        self._sums = [0]
        for cost in costs:
            self._sums.append(self._sums[-1] + cost)
        self._best: dict[tuple[int, int], tuple[int, int]] = {}

    def largest(self, number: int) -> int:
        """Return the cost of the largest of `number` spans."""
        return self._solve(len(self._sums) - 1, number)[0]

    def spans(self, number: int) -> list[tuple[int, int]]:
        """Return `number` spans (start, stop)."""
        stop, found = len(self._sums) - 1, []
        for remaining in range(number, 0, -1):
            start = self._solve(stop, remaining)[1]
            found.append((start, stop))
            stop = start
        return found[::-1]

    def _solve(self, stop: int, number: int) -> tuple[int, int]:
        """Return the largest of `number` spans of the first `stop` costs, and where the last one starts."""
        if number == 1:
            return self._sums[stop], 0
        key = (stop, number)
        if key not in self._best:
            self._best[key] = min(
                (max(self._solve(start, number - 1)[0], self._sums[stop] - self._sums[start]), start)
                for start in range(number - 1, stop)
            )
        return self._best[key]


def _by_layers(start: int, stop: int, costs: list[int], most: int) -> list[tuple[int, int]]:
    """Split parts `start` to `stop` by at most `most` layers; an end that costs more stands alone."""
    first, last = int(start == 0), int(stop == len(costs))
    layers = range(start + first, stop - last)
    number = math.ceil(len(layers) / most)
    size, rest = divmod(len(layers), number)
    edges = [layers[0] + b * size + min(b, rest) for b in range(number)] + [layers[-1] + 1]
    room = most * max(costs[i] for i in layers)
    if first:
        edges = [start, *edges[int(costs[start] <= room) :]]
    if last:
        edges = [*edges[: len(edges) - int(costs[stop - 1] <= room)], stop]
    return list(itertools.pairwise(edges))


def _cost(module: nn.Module) -> int:
    """Return bytes of weights, and as many again for the gradients of those that are trained."""
    return sum(p.nbytes * (1 + p.requires_grad) for p in module.parameters())


def _unique(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Leave out modules that are inside others."""
    modules = list(dict.fromkeys(modules))
    inner = {child for module in modules for child in list(module.modules())[1:]}
    return [module for module in modules if module not in inner]
