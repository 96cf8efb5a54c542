"""Confidence intervals and tests for accuracies, and for differences between accuracies on the same examples."""

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
"""Probability of any false claim in one table or report, however many claims it makes."""


class Difference(NamedTuple):
    """Difference of two accuracies on the same examples, with its 95% interval; shares, not percent."""

    value: float
    low: float
    high: float
    p: float
    """McNemar's exact p-value (:func:`mcnemar`), adjusted if the difference is one of several."""

    @property
    def clear(self) -> bool:
        """Whether the exact test rejects the hypothesis of no difference."""
        return self.p < LEVEL

    @property
    def said(self) -> str:
        """The p-value as text, such as ``p = 0.4``."""
        return "p < 0.0001" if self.p < 0.0001 else f"p = {self.p:.2g}"


def wilson(correct: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95% score interval (1927) of the share ``correct / n``."""
    z, share = NormalDist().inv_cdf(1 - LEVEL / 2), correct / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # exactly 0 and 1 at the extremes, in spite of rounding
    return middle - half if correct else 0.0, middle + half if correct < n else 1.0


def wilson_mean(shares: np.ndarray) -> tuple[float, float]:
    """Return the 95% interval of the mean m of ``shares``, (n,), one value in [0, 1] per example.

    It is :func:`wilson` with the effective sample size n m (1 - m) / variance (Korn and Graubard 1998): never wider
    than the interval for n right or wrong answers, and equal to it if all shares are 0 or 1. If all shares are equal,
    the effective sample size is n.
    """
    mean, variance = float(shares.mean()), float(shares.var())
    n = len(shares) * (mean * (1 - mean) / variance if variance else 1.0)
    return wilson(mean * n, n)


@functools.cache
def mcnemar(b: int, c: int) -> float:
    """Return the exact two-sided p-value of McNemar's test (1947) of no difference between two models, where b examples
    are classified correctly by the first model only and c by the second only.

    Under the hypothesis, b is binomial with b + c trials and probability 1/2.
    """
    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Adjust p-values for multiple tests by Holm's step-down procedure (1979).

    With p_(1) <= ... <= p_(m), the i-th becomes the largest of min(1, (m - j + 1) p_(j)) over j <= i. Rejecting
    adjusted values below .05 makes any false rejection with probability at most .05, however the tests depend on each
    other.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def paired_differences(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Difference]:
    """Return the differences of several pairs that are reported together: p-values adjusted by :func:`holm`, and
    simultaneous 95% intervals (Bonferroni)."""
    found = [paired_difference(a, b, comparisons=len(pairs)) for a, b in pairs]
    adjusted = holm([each.p for each in found])
    return [each._replace(p=p) for each, p in zip(found, adjusted, strict=True)]


def welch(a: Sequence[float], b: Sequence[float], *, comparisons: int = 1) -> tuple[float, float, float]:
    """Return the mean of ``a`` minus the mean of ``b``, at least two values each, and the ends of Welch's 95% interval
    (1947). The ends are NaN if all values of ``a`` are equal and all of ``b`` too, which gives no estimate of the
    spread.

    Args:
        comparisons: number of simultaneous 95% intervals, including this one.
    """
    difference = statistics.fmean(a) - statistics.fmean(b)
    if statistics.pstdev(a) == statistics.pstdev(b) == 0:
        return difference, math.nan, math.nan
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(1 - LEVEL / comparisons)
    return difference, float(interval.low), float(interval.high)


def paired_difference(a: np.ndarray, b: np.ndarray, *, comparisons: int = 1) -> Difference:
    """Return the accuracy of ``a`` minus that of ``b``, bool (n,) each, with Agresti and Min's interval (2005).

    For b examples that only ``a`` has right and c that only ``b`` has, half an example is added to each cell of the 2 x
    2 table: d = (b - c) / (n + 2), with standard error sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2).

    Args:
        comparisons: number of simultaneous 95% intervals, including this one.
    """
    z = NormalDist().inv_cdf(1 - LEVEL / comparisons / 2)
    only_a, only_b, n = int((a & ~b).sum()), int((~a & b).sum()), len(a) + 2
    middle = (only_a - only_b) / n
    half = z * math.sqrt(max(only_a + only_b + 1 - (only_a - only_b) ** 2 / n, 0)) / n
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Difference(float(np.mean(a) - np.mean(b)), low, high, mcnemar(only_a, only_b))
