"""Checks of a user's values: what passes, and what the message says of what does not."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from lopt.validation import check, check_choice, check_number


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (None, dict(minimum=1)),
        (1, dict(minimum=1)),
        (1.0, dict(maximum=1)),
        (1e-300, dict(above=0)),
        (0.5, dict(above=0, below=1)),
        (-5, {}),
    ],
)
def test_numbers_within_bounds(value: float | None, bounds: dict[str, float]) -> None:
    check_number("x", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "message"),
    [
        (0, dict(minimum=1), "`x` must be >= 1 (got 0)"),
        (0, dict(above=0), "`x` must be > 0 (got 0)"),
        (1, dict(below=1), "`x` must be < 1 (got 1)"),
        (2, dict(minimum=0, maximum=1), "`x` must be >= 0 and <= 1 (got 2)"),
        (
            0,
            dict(minimum=1_234_567, maximum=2**64 - 1),
            "`x` must be >= 1234567 and <= 18446744073709551615 (got 0)",
        ),
        (9, dict(minimum=1e-5, maximum=1.0), "`x` must be >= 1e-05 and <= 1 (got 9)"),
        (math.nan, dict(minimum=0), "`x` must be finite and >= 0 (got nan)"),
        (math.inf, {}, "`x` must be finite (got inf)"),
    ],
)
def test_numbers_out_of_bounds(value: float, bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_number("x", value, **bounds)


def test_choices_and_conditions() -> None:
    check_choice("clip", "block", ("block", "global"))
    with pytest.raises(ValueError, match=re.escape("`clip` must be one of block, global (got off)")):
        check_choice("clip", "off", iter(("block", "global")))
    check(True, "x", 1, "odd")
    with pytest.raises(ValueError, match=re.escape("`x` must be odd (got 2)")):
        check(False, "x", 2, "odd")
