"""Mathematics is checked with a time limit, which must not decide a test of verdicts on a busy machine."""

from __future__ import annotations

import pytest

from lopt.rewards import math as math_module


@pytest.fixture
def patient_math_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a comparison two minutes instead of three seconds."""
    monkeypatch.setattr(math_module, "TIME_LIMIT", 120.0)
