"""Checks of a user's values. Messages name the argument in backticks; the command line shows it as a flag."""

from __future__ import annotations

import math
from collections.abc import Iterable

LARGEST_COUNT = 2**31 - 1
"""Of steps, rows or tokens; with more, a run would have no end, or a tensor no size."""


def check(condition: bool, name: str, value: object, rule: str) -> None:
    """Raise a ValueError such as "`num_blocks` must be >= 1 (got 0)" unless `condition` holds."""
    if not condition:
        raise ValueError(f"`{name}` must be {rule} (got {value})")


def check_number(
    name: str,
    value: float | None,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> None:
    """Raise a ValueError unless `value` is None or a finite number within the bounds that are given.

    Without a `maximum`, whole numbers are bounded by `LARGEST_COUNT`.
    """
    if value is None:
        return
    if maximum is None and isinstance(value, int) and value > LARGEST_COUNT:
        maximum = LARGEST_COUNT
    bounds = [
        (minimum, ">=", lambda bound: value >= bound),
        (above, ">", lambda bound: value > bound),
        (maximum, "<=", lambda bound: value <= bound),
        (below, "<", lambda bound: value < bound),
    ]
    given = [(bound, sign, holds) for bound, sign, holds in bounds if bound is not None]
    rule = " and ".join(f"{sign} {number_text(bound)}" for bound, sign, _ in given)
    kept = math.isfinite(value) and all(holds(bound) for bound, _, holds in given)
    check(kept, name, value, rule if math.isfinite(value) else f"finite and {rule}".removesuffix(" and "))


def number_text(value: float) -> str:
    """Return a number for a message: 1234567 rather than 1.23457e+06, and 1 for 1.0."""
    return str(value) if isinstance(value, int) else f"{value:.15g}"


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raise a ValueError unless `value` is one of `choices`."""
    choices = list(choices)
    check(value in choices, name, value, "one of " + ", ".join(map(str, choices)))
