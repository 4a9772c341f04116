"""The table of a run's figures: which columns there are, and which of them a terminal has room for."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from rich.text import Text

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
    **dict.fromkeys(("sft", "demo"), (_STEP, _LOSS, _HELD_OUT, *_END)),
    "dpo": (_STEP, _LOSS, _HELD_OUT, _CHOSEN, _MARGIN, *_END),
    "grpo": (_STEP, _REWARD, _HELD_OUT_REWARD, _LENGTH, _LOSS, _KL, *_END),
}
"""Command -> its columns, in their order on the screen."""
_FIRST_TO_GO = (
    *("grad", "kl", "time", "rate", "margin", "memory", "length"),
    *("local 3", "local 2", "local 1", "tokens/s", "forgot", "chosen", "loss"),
)
"""Columns that a narrow terminal has no room for, in the order in which they are left out."""


def value_of(column: Column, row: Row) -> float | None:
    """Return what a column shows of a row of the log; None if it is not there."""
    value = row.get(column.key)
    return value if isinstance(value, int | float) else None


class Table:
    """Rows of figures below headings, which appear again after every 20 rows and when the width changes.

    Args:
        command: a key of `COLUMNS`.
        keys: names in the log that the run will have; other columns are left out.
    """

    def __init__(self, command: str, keys: Collection[str]) -> None:
        self._columns = [column for column in COLUMNS[command] if column.key in keys]
        self._shown: list[Column] = []
        self._rows = 0

    def lines(self, row: Row, width: int) -> list[Text]:
        """Return the lines of a row, headings included where they are due; none without any figure."""
        if all(value_of(column, row) is None for column in self._columns if column not in (_STEP, _TIME)):
            return []  # a warning of a monitor, which says more in its own words
        lines, shown = [], self._fitting(width)
        if shown != self._shown or self._rows % 20 == 0:
            lines.append(Text("  ".join(column.title.rjust(column.width) for column in shown), "bold"))
            self._shown, self._rows = shown, 0
        self._rows += 1
        values = [(column, value_of(column, row)) for column in shown]
        cells = [
            ("" if value is None else column.show(value)).rjust(column.width) for column, value in values
        ]
        return [*lines, Text("  ".join(cells).rstrip())]

    def _fitting(self, width: int) -> list[Column]:
        shown = self._columns
        for title in _FIRST_TO_GO:
            if sum(column.width + 2 for column in shown) - 2 <= width:
                break
            shown = [column for column in shown if column.title != title]
        return shown
