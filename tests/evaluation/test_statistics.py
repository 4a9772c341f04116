"""Intervals against closed forms and against known truth in simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from lopt.evaluation.statistics import (
    mcnemar,
    mean_interval,
    paired_bootstrap,
    paired_difference,
    t_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # Brown, Cai, DasGupta 2001; z² / (n + z²)
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),
        (81, 263, 0.255289, 0.366210),  # Newcombe 1998, table 1, method 3: .2553 to .3662
        (1, 29, 0.006113, 0.171755),  # same table: .0061 to .1718
    ],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=2e-5)


@pytest.mark.parametrize(
    ("correct", "total", "message"),
    [
        (1, 0, "`total` must be >= 1"),
        (0, 0, "`total` must be >= 1"),
        (3, 2, "`correct` must be between 0 and 2"),
        (-1, 5, "`correct` must be between 0 and 5"),
    ],
)
def test_wilson_interval_refuses(correct: int, total: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wilson_interval(correct, total)


@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 12.70620), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (10**6, 1.95996)],
)
def test_t_quantile(freedom: int, t: float) -> None:
    assert t_quantile(freedom) == pytest.approx(t, abs=1e-5)  # any printed table


def test_mean_over_seeds() -> None:
    value, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (value, high - value) == pytest.approx((2.0, 4.30265 / math.sqrt(3)), abs=1e-5)
    assert value - low == pytest.approx(high - value)
    assert mean_interval([5.0])[0] == 5 and math.isnan(mean_interval([5.0]).low)
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([])


def outcomes(gained: int, lost: int, same: int) -> tuple[list[int], list[int]]:
    return [0] * gained + [1] * lost + [1] * same, [1] * gained + [0] * lost + [1] * same


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [(0, 0, 1.0), (3, 3, 1.0), (5, 0, 2 / 32), (1, 5, 2 * 7 / 64), (2, 10, 2 * 79 / 4096), (9, 1, 22 / 1024)],
)
def test_mcnemar_is_the_binomial_test(gained: int, lost: int, p: float) -> None:
    test = mcnemar(*outcomes(gained, lost, 20))
    assert (test.gained, test.lost) == (gained, lost) and test.p_value == pytest.approx(p, rel=1e-12)


def test_mcnemar_of_many_items() -> None:
    # 300 of 2,700 more gained than lost: scipy.stats.binomtest(1200, 2700).pvalue
    assert mcnemar(*outcomes(1500, 1200, 9000)).p_value == pytest.approx(8.412086328628609e-09, rel=1e-9)


def test_paired_outcomes_are_checked() -> None:
    for test in (mcnemar, paired_difference, paired_bootstrap):
        with pytest.raises(ValueError, match="not pairs"):
            test([1, 0], [1])
    with pytest.raises(ValueError, match="0 or 1"):
        mcnemar([0.5], [1])


def test_no_change_is_no_proof_of_none() -> None:
    assert paired_bootstrap([1, 0] * 50, [1, 0] * 50) == (0, 0, 0)  # why binary outcomes have an own interval
    value, low, high = paired_difference([1, 0] * 50, [1, 0] * 50)
    assert value == 0 and low == -high and 0.02 < high < 0.04  # 3 of 100 would not astonish
    assert math.isnan(paired_bootstrap([0.5], [0.7]).high)
    few = paired_bootstrap([0, 0], [0.21, 0.30])  # all that drawing could say is 0.21 to 0.30
    assert few.low < 0 < few.value < few.high


def test_the_bootstrap_is_that_of_the_mean() -> None:
    differences = np.random.default_rng(1).normal(0.3, 2.0, 400)
    value, low, high = paired_bootstrap([0.0] * 400, list(differences))
    assert value == pytest.approx(differences.mean())
    half = 1.96 * differences.std() / 20
    assert (value - low, high - value) == pytest.approx((half, half), rel=0.05)
    assert paired_bootstrap([0.0] * 400, list(differences)) == (value, low, high)  # seeded


Draw = Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]


def binary(n: int, gain: float, loss: float) -> Draw:
    """Items that the second model gains or loses with known probabilities."""

    def draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        what = random.random(n)
        base = np.where(what < gain, 0.0, np.where(what < gain + loss, 1.0, what > 0.6))
        return base, np.where(what < gain, 1.0, np.where(what < gain + loss, 0.0, base))

    return draw


def losses(n: int, change: float, spread: float, skewed: bool) -> Draw:
    """Losses of windows, which differ more from each other than from model to model."""

    def draw(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        base = random.gamma(9.0, 1 / 3, n)
        noise = random.gamma(4.0, 0.5, n) - 2 if skewed else random.normal(size=n)
        return base, base + change + spread * noise

    return draw


@pytest.mark.parametrize(
    ("draw", "truth", "runs"),
    [
        (binary(100, 0.12, 0.08), 0.04, 2000),
        (binary(660, 0.05, 0.09), -0.04, 2000),
        (binary(7000, 0.06, 0.06), 0.0, 800),
        (losses(24, 0.05, 0.1, skewed=False), 0.05, 800),
        (losses(64, 0.05, 0.1, skewed=True), 0.05, 800),
        (losses(200, -0.01, 0.1, skewed=True), -0.01, 500),
    ],
    ids=["binary, 100", "binary, 660", "binary, 7000", "losses, 24", "skewed, 64", "skewed, 200"],
)
def test_95_percent_of_intervals_hold_the_truth(draw: Draw, truth: float, runs: int) -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(runs):
        base, tuned = draw(random)
        continuous = not set(np.unique(tuned)) <= {0.0, 1.0}
        found = paired_bootstrap(base, tuned, 300) if continuous else paired_difference(base, tuned)
        assert found.low <= found.value <= found.high
        held += found.low <= truth <= found.high
    assert 0.93 <= held / runs <= 0.97


def test_the_bootstrap_holds_for_binary_outcomes_of_many_items() -> None:
    random, draw = np.random.default_rng(0), binary(200, 0.10, 0.12)
    found = [paired_bootstrap(*draw(random), 300) for _ in range(400)]
    assert 0.93 <= np.mean([f.low <= -0.02 <= f.high for f in found]) <= 0.97
