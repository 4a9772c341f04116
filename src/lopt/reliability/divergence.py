"""Divergence of earlier blocks: local losses that rise, heads that explain nothing, boundaries that collapse.

Numbers go in, findings come out; docs/monitoring.md has the equations. The state is small and goes into
checkpoints, so that a resumed run sees what the whole one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

SETTLED = 5
"""Values after which a mean counts."""
BOUNDARY_EVERY = 10
"""Optimizer steps between two measurements at the boundaries."""
UNEXPLAINED = 0.95
"""Share of a target's variance from which on a head is no better than the mean."""
SPREAD = 0.1
"""Share of the spread at the start below which a boundary has collapsed."""


@dataclass(frozen=True)
class Divergence:
    """What is wrong with a block.

    Attributes:
        block: from 0.
        kind: "local_loss_rise", "unexplained" or "spread".
        value: the number that is too high or too low.
        text: the numbers in words.
    """

    block: int
    kind: str
    value: float
    text: str


@dataclass
class Trend:
    """An exponential mean over about `window` values; a plain mean until there are as many."""

    window: int
    count: int = 0
    mean: float = 0.0
    first: float = 0.0
    low: float = math.inf  # the lowest mean so far, and its optimizer step
    low_step: int = 0

    def add(self, value: float, step: int) -> None:
        """Add the value of optimizer step `step`."""
        self.count += 1
        self.first = value if self.count == 1 else self.first
        self.mean += (value - self.mean) / min(self.count, self.window)
        if self.count >= SETTLED and self.mean < self.low:
            self.low, self.low_step = self.mean, step


class DivergenceMonitor:
    """Follows the local losses and the boundaries of a run.

    Args:
        factor: a local loss diverges if its mean is more than `factor` times its lowest mean.
        steps: optimizer steps that the mean is over, about.
    """

    def __init__(self, factor: float = 3.0, steps: int = 50) -> None:
        self.factor, self.steps = factor, steps
        self._losses: dict[int, Trend] = {}
        self._unexplained: dict[int, Trend] = {}
        self._spread: dict[int, Trend] = {}
        self._reported: set[tuple[str, int]] = set()
        self._last_boundary: int | None = None

    def start(self, blocks: Sequence[int], history: Sequence[Sequence[float]]) -> None:
        """Take the end of a head warm-up, when no weight had moved, as where the local losses began.

        Args:
            blocks: indices of the blocks that learn.
            history: their local losses in every step of the warm-up.
        """
        for losses in history[-SETTLED:]:
            self.add_losses(0, dict(zip(blocks, losses, strict=True)))

    def add_losses(self, step: int, losses: Mapping[int, float]) -> list[Divergence]:
        """Add the local losses of optimizer step `step`, by block, and return what diverges.

        Their mean is geometric, which a single spike moves little.
        """
        found = []
        for block, loss in losses.items():
            trend = self._losses.setdefault(block, Trend(self.steps))
            trend.add(math.log(max(loss, 1e-30)), step)
            rise = math.exp(min(trend.mean - trend.low, 700.0))
            if rise > self.factor:
                text = (
                    f"the local loss of block {block + 1} diverges: its mean is {math.exp(trend.mean):.3g}, "
                    f"{rise:.1f} times the lowest ({math.exp(trend.low):.3g} at step {trend.low_step})"
                )
                found.append(Divergence(block, "local_loss_rise", rise, text))
        return found

    def is_due(self, step: int) -> bool:
        """Return whether the boundaries should be measured in optimizer step `step`."""
        return self._last_boundary is None or step >= self._last_boundary + BOUNDARY_EVERY

    def add_boundaries(
        self, step: int, unexplained: Mapping[int, float], spread: Mapping[int, float]
    ) -> list[Divergence]:
        """Add what was measured at the boundaries in step `step`, by block, and return what has collapsed.

        Args:
            unexplained: local loss / variance of what is to be reconstructed; empty for other local losses.
            spread: `lopt.instruments.hidden_states.token_spread` of the block's output.
        """
        self._last_boundary = step
        found = []
        for block, share in unexplained.items():
            trend = self._unexplained.setdefault(block, Trend(SETTLED))
            trend.add(min(share, 10.0), step)  # a target without variance makes it infinite
            if trend.count >= SETTLED and trend.mean >= UNEXPLAINED:
                text = (
                    f"the head of block {block + 1} reconstructs no better than a constant would: its local "
                    f"loss is {trend.mean:.2f} times the variance of what it should predict"
                )
                found.append(Divergence(block, "unexplained", trend.mean, text))
        for block, value in spread.items():
            trend = self._spread.setdefault(block, Trend(SETTLED))
            # Geometric as well, and bounded from below: one measurement on odd rows is not enough.
            least = trend.first + math.log(SPREAD**2) if trend.count else -math.inf
            trend.add(max(math.log(max(value, 1e-30)), least), step)
            if trend.count >= SETTLED and trend.mean < trend.first + math.log(SPREAD):
                text = (
                    f"the hidden states behind block {block + 1} collapse: their spread over tokens is "
                    f"{value:.3g}, at the start it was {math.exp(trend.first):.3g}"
                )
                found.append(Divergence(block, "spread", value, text))
        return found

    def first_time(self, divergence: Divergence) -> bool:
        """Return whether this kind is reported of this block for the first time, and remember that it was."""
        key = (divergence.kind, divergence.block)
        new = key not in self._reported
        self._reported.add(key)
        return new

    def state(self) -> dict[str, Any]:
        """Return everything it remembers, for JSON."""
        trends = {"losses": self._losses, "unexplained": self._unexplained, "spread": self._spread}
        kept: dict[str, Any] = {
            name: {
                # JSON has no infinity.
                str(block): asdict(trend) | {"low": trend.low if math.isfinite(trend.low) else None}
                for block, trend in by_block.items()
            }
            for name, by_block in trends.items()
        }
        return kept | {"told": sorted(map(list, self._reported)), "last_look": self._last_boundary}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned; `factor` and `steps` stay those of this run."""
        for name, window in (("losses", self.steps), ("unexplained", SETTLED), ("spread", SETTLED)):
            trends = {int(block): Trend(**kept) for block, kept in state[name].items()}
            for trend in trends.values():
                trend.window = window
                trend.low = math.inf if trend.low is None else trend.low
            setattr(self, f"_{name}", trends)
        self._reported = {(kind, block) for kind, block in state["told"]}
        self._last_boundary = state["last_look"]


def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one state of those of several monitors, each of which follows other blocks."""
    by_block = {
        name: {block: trend for state in states for block, trend in state[name].items()}
        for name in ("losses", "unexplained", "spread")
    }
    told = sorted({(kind, block) for state in states for kind, block in state["told"]})
    looks = [state["last_look"] for state in states if state["last_look"] is not None]
    return by_block | {"told": [list(pair) for pair in told], "last_look": max(looks, default=None)}
