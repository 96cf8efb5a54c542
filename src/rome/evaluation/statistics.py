"""How sure a share is, and a difference of two shares on the same examples."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

Z95 = 1.959963984540054
"""Normal quantile of a two-sided 95% interval."""


class Difference(NamedTuple):
    """Of two accuracies on the same examples, with a 95% interval; shares, not percent."""

    value: float
    low: float
    high: float
    p: float
    """McNemar's exact p-value of no difference (:func:`mcnemar`)."""

    @property
    def clear(self) -> bool:
        """Whether the interval leaves out zero and the exact test agrees."""
        return (self.low > 0 or self.high < 0) and self.p < 0.05


def wilson(correct: int, n: int) -> tuple[float, float]:
    """95% score interval of a share of n examples (Wilson 1927).

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = correct/n, z = 1.96.
    """
    share, z2 = correct / n, Z95**2
    middle = share + z2 / (2 * n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    scale = 1 + z2 / n
    # the ends of none and all are 0 and 1, which rounding would miss by a hair
    return (middle - half) / scale if correct else 0.0, (middle + half) / scale if correct < n else 1.0


def mcnemar(b: int, c: int) -> float:
    """Exact two-sided p-value for b examples that only one of two models gets right and c that only the other does.

    Under the hypothesis of no difference b is binomial, one half of b + c (McNemar 1947; the exact form):
    p = min(1, 2 sum_{i <= min(b, c)} C(b + c, i) / 2^(b + c)).
    """
    n, total, term = b + c, 0, 1
    for i in range(min(b, c) + 1):
        total += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def paired_difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """The share of ``a`` minus that of ``b``, bool (n,) each, with Agresti and Min's 95% interval (2005).

    With b and c examples that only one of the two gets right, half an example added to each cell of the 2 x 2 table:
    d = (b - c) / (n + 2), standard error sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2).
    """
    only_a, only_b, n = int((a & ~b).sum()), int((~a & b).sum()), len(a) + 2
    middle = (only_a - only_b) / n
    half = Z95 * math.sqrt(max(only_a + only_b + 1 - (only_a - only_b) ** 2 / n, 0)) / n
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    return Difference(float(np.mean(a) - np.mean(b)), low, high, mcnemar(only_a, only_b))
