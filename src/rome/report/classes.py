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
    labels = reports[0].labels
    lines = []
    for label in np.unique(labels).tolist():
        rows = labels == label
        shares = [
            (
                float(report.correct[rows, 0].mean()),
                math.nan if math.isnan(report.union) else float(report.right()[rows].mean()),
            )
            for report in reports
        ]
        lines.append(ClassLine(str(label) if names is None else names[label], int(rows.sum()), shares))
    if len(lines) <= SHOWN:
        return lines
    hardest = sorted(range(len(lines)), key=lambda i: sum(_number(union) for _, union in lines[i].shares))[:SHOWN]
    return [lines[i] for i in sorted(hardest)]


def _number(share: float) -> float:
    return 0.0 if math.isnan(share) else share
