"""Confidence intervals and tests for shares of examples, and for differences of two shares on the same examples."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, ttest_ind

LEVEL = 0.05
"""Highest probability of a false claim in one table or report, however many claims it makes."""


class Difference(NamedTuple):
    """Difference of two accuracies on the same examples, with a 95% interval; as shares, not percent."""

    value: float
    low: float
    high: float
    p: float
    """McNemar's exact p-value (:func:`mcnemar`) of no difference, adjusted if it is one of several."""

    @property
    def clear(self) -> bool:
        """Whether the exact test rejects the hypothesis of no difference."""
        return self.p < LEVEL

    @property
    def p_text(self) -> str:
        """The p-value as text, such as ``p = 0.4``."""
        return "p < 0.0001" if self.p < 0.0001 else f"p = {self.p:.2g}"


def wilson(correct: float, n: float) -> tuple[float, float]:
    """95% score interval of a share, given ``correct`` of ``n`` examples (Wilson 1927)."""
    z, share = NormalDist().inv_cdf(1 - LEVEL / 2), correct / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # with none or all correct, an end is exactly 0 or 1, which rounding would miss
    return middle - half if correct else 0.0, middle + half if correct < n else 1.0


def wilson_mean(shares: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean m of ``shares`` (n,), one in [0, 1] for each example.

    It is :func:`wilson` with the effective number of examples n m (1 - m) / variance (Korn and Graubard 1998), or n
    if all shares are equal. It is never wider than the interval for n right or wrong answers, and equal to that if all
    shares are 0 or 1.
    """
    mean, variance = float(shares.mean()), float(shares.var())
    n = len(shares) * (mean * (1 - mean) / variance if variance else 1.0)
    return wilson(mean * n, n)


@functools.cache
def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value for b examples that only one of two models gets right and c that only the other does.

    Under the hypothesis of no difference, b is Binomial(b + c, 1/2) (McNemar 1947, in its exact form).
    """
    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for their number m by Holm's step-down procedure (1979).

    With p_(1) <= ... <= p_(m), the adjusted p_(i) is the largest of min(1, (m - j + 1) p_(j)) over j <= i. Rejecting
    the hypotheses with values below .05 makes any false rejection with probability at most .05, however the tests
    depend on each other.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def paired_differences(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Difference]:
    """Differences (:func:`paired_difference`) that are claimed together.

    The p-values are adjusted by :func:`holm`; the intervals cover all differences jointly with 95% (Bonferroni).
    """
    found = [paired_difference(a, b, comparisons=len(pairs)) for a, b in pairs]
    adjusted = holm([each.p for each in found])
    return [each._replace(p=p) for each, p in zip(found, adjusted, strict=True)]


def welch(a: Sequence[float], b: Sequence[float], *, comparisons: int = 1) -> tuple[float, float, float]:
    """Mean of ``a`` minus mean of ``b``, and the low and high end of Welch's 95% interval (1947).

    Args:
        a: at least two values.
        b: at least two values. If neither ``a`` nor ``b`` varies, the ends are NaN, as the spread is then unknown.
        comparisons: number of intervals, including this one, that are to hold jointly with 95%.
    """
    difference = statistics.fmean(a) - statistics.fmean(b)
    if statistics.pstdev(a) == statistics.pstdev(b) == 0:
        return difference, math.nan, math.nan
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(1 - LEVEL / comparisons)
    return difference, float(interval.low), float(interval.high)


def paired_difference(a: np.ndarray, b: np.ndarray, *, comparisons: int = 1) -> Difference:
    """The share of ``a`` minus that of ``b``, bool (n,) each, with Agresti and Min's interval (2005).

    If ``a`` alone is right on b examples and ``b`` alone on c, adding half an example to each cell of the 2 x 2 table
    gives d = (b - c) / (n + 2) with standard error sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2).

    Args:
        comparisons: number of intervals, including this one, that are to hold jointly with 95%.
    """
    z = NormalDist().inv_cdf(1 - LEVEL / comparisons / 2)
    only_a, only_b, n = int((a & ~b).sum()), int((~a & b).sum()), len(a) + 2
    middle = (only_a - only_b) / n
    half = z * math.sqrt(max(only_a + only_b + 1 - (only_a - only_b) ** 2 / n, 0)) / n
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Difference(float(np.mean(a) - np.mean(b)), low, high, mcnemar(only_a, only_b))
