"""The table of a run's figures: which columns there are, and which of them a terminal has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lopt.instruments.memory import format_bytes

Row = Mapping[str, Any]
"""A row of a trainer's log."""


def figure(value: float) -> str:
    """Return a number in at most 8 characters, with four digits that count."""
    if not math.isfinite(value):
        return str(value)
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    return f"{value:.{max(0, 4 - whole)}f}"


def clock(seconds: float) -> str:
    """Return a time as 4:05 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Column(NamedTuple):
    """A column of the table.

    Attributes:
        title: its heading.
        key: its name in the log.
        show: from the value to its text.
    """

    title: str
    key: str
    show: Callable[[float], str] = figure
    width: int = 8


_STEP = Column("step", "step", lambda step: f"{step:,.0f}", 7)
_LOSS = Column("loss", "loss")
_HELD_OUT = Column("held out", "eval_loss")
_LOCAL = [Column(f"local {block}", f"local_loss/block_{block}") for block in (1, 2, 3)]
_FORGOT = Column("forgot", "retention/change", lambda change: f"{change:+.4f}")
_RATE = Column("rate", "learning_rate", "{:.2e}".format)
_NORM = Column("grad", "grad_norm")
_SPEED = Column("tokens/s", "tokens_per_second", lambda speed: f"{speed:,.0f}")
_MEMORY = Column("memory", "peak_memory_gib", lambda gib: format_bytes(round(gib * 2**30)), 10)
_TIME = Column("time", "elapsed", clock)
_CHOSEN = Column("chosen", "rewards/accuracies")
_MARGIN = Column("margin", "rewards/margins")
_REWARD = Column("reward", "reward")
_HELD_OUT_REWARD = Column("held out", "eval_reward")
_LENGTH = Column("length", "completions/mean_length")
_KL = Column("kl", "kl")
_END = (*_LOCAL, _FORGOT, _RATE, _SPEED, _MEMORY, _TIME, _NORM)

COLUMNS: dict[str, tuple[Column, ...]] = {
    "sft": (_STEP, _LOSS, _HELD_OUT, *_END),
    "dpo": (_STEP, _LOSS, _HELD_OUT, _CHOSEN, _MARGIN, *_END),
    "grpo": (_STEP, _REWARD, _HELD_OUT_REWARD, _LENGTH, _LOSS, _KL, *_END),
}
"""Command -> its columns, in their order on the screen."""
_FIRST_TO_GO = (
    *("grad", "kl", "time", "rate", "margin", "memory", "length"),
    *("local 3", "local 2", "local 1", "tokens/s", "forgot"),
)
"""Columns that a narrow terminal has no room for, in the order in which they are left out."""


def value_of(column: Column, row: Row) -> float | None:
    """Return what a column shows of a row of the log; None if it is not there."""
    value = row.get(column.key)
    return value if isinstance(value, int | float) else None


class Table:
    """Rows of figures below headings, which appear again after every 20 rows and with every new column.

    Args:
        command: a key of `COLUMNS`.
        expected: names in the log of what will come later, which have a column from the first row on.
    """

    def __init__(self, command: str, expected: tuple[str, ...] = ()) -> None:
        self._columns, self._expected = COLUMNS[command], expected
        self._shown: tuple[Column, ...] = ()
        self._rows = 0
        self._seen: set[str] = set()

    def lines(self, row: Row, width: int) -> list[str]:
        """Return the lines of a row, headings included where they are due."""
        values = {column.title: value_of(column, row) for column in self._columns}
        if all(value is None for title, value in values.items() if title not in ("step", "time")):
            return []  # a warning of a monitor, which says more in its own words
        self._seen |= {title for title, value in values.items() if value is not None}
        shown = self._fitting(width)
        lines = []
        if shown != self._shown or self._rows % 20 == 0:
            lines.append("  ".join(column.title.rjust(column.width) for column in shown))
            self._shown, self._rows = shown, 0
        self._rows += 1
        texts = [(values[column.title], column) for column in shown]
        cells = [("" if value is None else column.show(value)).rjust(column.width) for value, column in texts]
        return [*lines, "  ".join(cells).rstrip()]

    def _fitting(self, width: int) -> tuple[Column, ...]:
        shown = [c for c in self._columns if c.title in self._seen or c.key in self._expected]
        for title in _FIRST_TO_GO:
            if sum(column.width + 2 for column in shown) - 2 <= width:
                break
            shown = [column for column in shown if column.title != title]
        return tuple(shown)
