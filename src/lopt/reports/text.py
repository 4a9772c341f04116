"""Numbers and tables as plain text, for pages and for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def number(value: float, form: str = ".3g") -> str:
    """Return `value` in a format such as ".3f" or "+.1%", with a minus sign and a space before "%"."""
    return f"{value:{form}}".replace("-", "−").replace("%", "\u00a0%")


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as aligned lines; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Return a time such as "4.6 s", "5 min 40 s" or "1 h 01 min"."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def setting_text(value: Any, nothing: str = "none") -> str:
    """Return a value of a setting as text; `nothing` stands for a mapping that is empty."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {setting_text(part, nothing)}" for key, part in value.items()) or nothing
    if isinstance(value, list | tuple):
        return ", ".join(setting_text(part, nothing) for part in value)
    return str(value)
