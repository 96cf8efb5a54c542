"""How sure a share is, and a difference of two shares on the same examples."""

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
"""Of false claims in one table or report, whatever their number."""


class Difference(NamedTuple):
    """Of two accuracies on the same examples, with a 95% interval; shares, not percent."""

    value: float
    low: float
    high: float
    p: float
    """McNemar's exact p-value of no difference (:func:`mcnemar`), adjusted where it is one of several."""

    @property
    def clear(self) -> bool:
        """Whether the exact test rejects that there is no difference."""
        return self.p < LEVEL

    @property
    def said(self) -> str:
        """``p = 0.4``."""
        return "p < 0.0001" if self.p < 0.0001 else f"p = {self.p:.2g}"


def wilson(correct: float, n: float) -> tuple[float, float]:
    """95% score interval of a share of n examples (Wilson 1927)."""
    z, share = NormalDist().inv_cdf(1 - LEVEL / 2), correct / n
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # the ends of none and all are 0 and 1, which rounding would miss by a hair
    return middle - half if correct else 0.0, middle + half if correct < n else 1.0


def wilson_mean(shares: np.ndarray) -> tuple[float, float]:
    """95% interval of the mean m of one share in [0, 1] for each example, (n,).

    :func:`wilson` with the effective number of examples n m (1 - m) / variance (Korn and Graubard 1998): never wider
    than that of n answers right or wrong, and equal to it where all shares are 0 or 1. Where all are alike, it is n.
    """
    mean, variance = float(shares.mean()), float(shares.var())
    n = len(shares) * (mean * (1 - mean) / variance if variance else 1.0)
    return wilson(mean * n, n)


@functools.cache
def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value for b examples that only one of two models gets right and c that only the other does.

    Under the hypothesis of no difference b is binomial, one half of b + c (McNemar 1947; the exact form).
    """
    return float(binomtest(b, b + c).pvalue) if b + c else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for their number by Holm's step-down procedure (1979).

    With p_(1) <= ... <= p_(m): the largest of min(1, (m - j + 1) p_(j)) over j <= i. Rejecting what lies below .05
    makes one or more false rejections with probability .05 at most, however the tests depend on each other.
    """
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def paired_differences(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Difference]:
    """Of all that are claimed together: p-values adjusted by :func:`holm`, intervals that hold together with 95%
    (Bonferroni)."""
    found = [paired_difference(a, b, comparisons=len(pairs)) for a, b in pairs]
    adjusted = holm([each.p for each in found])
    return [each._replace(p=p) for each, p in zip(found, adjusted, strict=True)]


def welch(a: Sequence[float], b: Sequence[float], *, comparisons: int = 1) -> tuple[float, float, float]:
    """Mean of ``a`` minus mean of ``b``, two values at least each, with Welch's 95% interval (1947); its ends are NaN
    where all values of each are equal, which says nothing of how far others would not be.

    Args:
        comparisons: how many intervals hold together with 95%, this one among them.
    """
    difference = statistics.fmean(a) - statistics.fmean(b)
    if statistics.pstdev(a) == statistics.pstdev(b) == 0:
        return difference, math.nan, math.nan
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(1 - LEVEL / comparisons)
    return difference, float(interval.low), float(interval.high)


def paired_difference(a: np.ndarray, b: np.ndarray, *, comparisons: int = 1) -> Difference:
    """The share of ``a`` minus that of ``b``, bool (n,) each, with Agresti and Min's interval (2005).

    With b and c examples that only one of the two gets right, half an example added to each cell of the 2 x 2 table:
    d = (b - c) / (n + 2), standard error sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2).

    Args:
        comparisons: how many intervals hold together with 95%, this one among them.
    """
    z = NormalDist().inv_cdf(1 - LEVEL / comparisons / 2)
    only_a, only_b, n = int((a & ~b).sum()), int((~a & b).sum()), len(a) + 2
    middle = (only_a - only_b) / n
    half = z * math.sqrt(max(only_a + only_b + 1 - (only_a - only_b) ** 2 / n, 0)) / n
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Difference(float(np.mean(a) - np.mean(b)), low, high, mcnemar(only_a, only_b))
