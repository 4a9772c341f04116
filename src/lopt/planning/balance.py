"""Deal out the layers of a model to the processes of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache


def balance(layers: int, least: Sequence[int], seconds: Callable[[int, int], float]) -> list[int]:
    """Deal out layers to processes so that the slowest one is as quick as can be.

    Args:
        layers: How many there are.
        least: How many each process has at least.
        seconds: The time of a process with so many layers, which grows with them.

    Returns:
        How many each has. What is left over once none has to be slower goes where the time is then shortest.
    """
    counts, seconds = list(least), cache(seconds)
    for _ in range(layers - sum(least)):
        position = min(range(len(counts)), key=lambda p: seconds(p, counts[p] + 1))
        counts[position] += 1
    return counts


def evenly(count: int, parts: int) -> list[int]:
    """Return `count` split into so many parts, as even as possible, the larger ones first."""
    size, rest = divmod(count, parts)
    return [size + (n < rest) for n in range(parts)]
