"""Estimates with 95 % intervals: shares, paired differences, means over seeds.

Which interval is used for what:

- a share (right answers of one model): Wilson's score interval, `wilson_interval`
- paired outcomes that are 0 or 1 (the same questions to two models): the Wald interval with Bonett and
  Price's adjustment, `paired_difference`; whether the two differ: McNemar's exact test, `mcnemar`
- paired outcomes of any other kind (losses, probabilities): the bootstrap over items, `paired_bootstrap`
- a mean over seeds: Student's t, `mean_interval`

Quantiles and tails are SciPy's, imported only where they are needed: plots need `Estimate` alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from lopt.validation import check

_Z = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A value with the ends of its interval."""

    value: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Items that only the second model got right, items that only the first got right, two-sided p-value."""

    gained: int
    lost: int
    p_value: float


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """Return the ends of the 95 % Wilson score interval of the share `correct / total`.

    Raises:
        ValueError: `total` is not positive or `correct` is not between 0 and `total`.
    """
    check(total >= 1, "total", total, ">= 1")
    check(0 <= correct <= total, "correct", correct, f"between 0 and {total}")
    share, extra = correct / total, _Z * _Z / total
    half = _Z * math.sqrt(share * (1 - share) / total + extra / (4 * total))
    low, high = ((share + extra / 2 + side * half) / (1 + extra) for side in (-1, 1))
    return max(0.0, low) if correct else 0.0, min(1.0, high) if correct < total else 1.0


def paired_difference(base: Sequence[float], tuned: Sequence[float]) -> Estimate:
    """Return the mean of `tuned - base` with the 95 % interval that suits the outcomes.

    Outcomes that are all 0 or 1: Bonett and Price's adjusted Wald interval, which keeps its coverage for few
    items and where no or hardly any item changed (https://doi.org/10.3102/1076998611411915; recommended by
    https://doi.org/10.1002/sim.6148). There a bootstrap is too short; at no change at all it has no length.
    Others: `paired_bootstrap`.

    Raises:
        ValueError: no items, or not as many in one as in the other.
    """
    before, after = _pairs(base, tuned)
    if not _binary(before, after):
        return paired_bootstrap(base, tuned)
    n, gained, lost = len(before), int((after > before).sum()), int((after < before).sum())
    up, down = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = _Z * math.sqrt((up + down - (up - down) ** 2) / (n + 2))
    value = (gained - lost) / n
    return Estimate(value, max(-1.0, min(value, up - down - half)), min(1.0, max(value, up - down + half)))


def paired_bootstrap(
    base: Sequence[float], tuned: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> Estimate:
    """Return the mean of `tuned - base` with a 95 % bootstrap interval over items.

    The plain percentile interval is too short for few items. Its percentiles are therefore taken further out,
    as far as Student's t and the n - 1 of a variance ask for (the expanded percentile interval of Hesterberg,
    https://doi.org/10.1080/00031305.2015.1089789; not among those of `scipy.stats.bootstrap`).
    Fewer than 8 items cannot be drawn far enough out: theirs is Student's t. A single item has no interval:
    its ends are NaN.

    Args:
        resamples: draws of all items with replacement.

    Raises:
        ValueError: no items, or not as many in one as in the other.
    """
    before, after = _pairs(base, tuned)
    differences = after - before
    n, value = len(differences), float(differences.mean())
    if n < 8:
        return mean_interval(list(differences))
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, 4_000_000 // n)  # at most 32 MB of indices at a time
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        means[start : start + rows] = differences[random.integers(0, n, (rows, n))].mean(axis=1)
    tail = NormalDist().cdf(-math.sqrt(n / (n - 1)) * t_quantile(n - 1))
    low, high = np.quantile(means, (tail, 1 - tail))
    return Estimate(value, float(low), float(high))


def mcnemar(base: Sequence[float], tuned: Sequence[float]) -> McNemar:
    """Return McNemar's exact test of whether as many items were gained as were lost.

    Under the null hypothesis each changed item is a fair coin: the p-value is the binomial's, two-sided.

    Raises:
        ValueError: an outcome is neither 0 nor 1, no items, or not as many in one as in the other.
    """
    from scipy.special import bdtr

    before, after = _pairs(base, tuned)
    if not _binary(before, after):
        raise ValueError("McNemar's test is for outcomes that are 0 or 1: use paired_bootstrap")
    gained, lost = int((after > before).sum()), int((after < before).sum())
    tail = float(bdtr(float(min(gained, lost)), gained + lost, 0.5))
    return McNemar(gained, lost, min(1.0, 2 * tail))


def mean_interval(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values (one per seed, say) with its 95 % Student-t interval.

    One value has no interval: its ends are NaN.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("`values` must have at least one value")
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return Estimate(mean, math.nan, math.nan)
    half = t_quantile(n - 1) * math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return Estimate(mean, mean - half, mean + half)


def t_quantile(freedom: int) -> float:
    """Return the t for which Student's t with `freedom` (>= 1) degrees is in [-t, t] 95 % of the time."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.975))


def _pairs(base: Sequence[float], tuned: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    if len(base) != len(tuned) or not len(base):
        raise ValueError(
            f"{len(base)} and {len(tuned)} outcomes are not pairs: give the same items of both models"
        )
    return np.asarray(base, dtype=float), np.asarray(tuned, dtype=float)


def _binary(*outcomes: np.ndarray) -> bool:
    return all(bool(((values == 0) | (values == 1)).all()) for values in outcomes)
