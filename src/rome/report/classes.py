"""Accuracy of each class: where a model's errors lie."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rome.evaluation.evaluate import Report

SHOWN = 20
"""Classes; of more, those with the lowest union."""


class ClassLine(NamedTuple):
    """One class in every run."""

    name: str
    n: int
    """Its examples."""
    shares: list[tuple[float, float]]
    """Clean and union accuracy of each run; NaN where an attack is missing."""


def by_class(reports: Sequence[Report], names: Sequence[str] | None = None) -> list[ClassLine]:
    """The classes that occur, in order; of more than 20 those whose union, averaged over runs, is lowest.

    Args:
        reports: on the same examples.
        names: of the classes; their numbers if not given.
    """
    labels, lines = reports[0].labels, []
    for label in np.unique(labels).tolist():
        rows = labels == label
        unions = [report.right() if not math.isnan(report.union) else np.full(report.n, np.nan) for report in reports]
        shares = [
            (float(report.correct[rows, 0].mean()), float(union[rows].mean()))
            for report, union in zip(reports, unions, strict=True)
        ]
        lines.append(ClassLine(str(label) if names is None else names[label], int(rows.sum()), shares))
    hardest = sorted(lines, key=lambda line: np.nansum([union for _, union in line.shares]))[:SHOWN]
    return [line for line in lines if line in hardest]
