"""Rows of a filled table: their cells, the best of them, and how sure the differences between rows are."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import ttest_ind

from rome.evaluation.evaluate import Report
from rome.evaluation.result import UNION
from rome.evaluation.statistics import LEVEL, paired_difference
from rome.report.compared import same_examples
from rome.report.tables.paper_rows import BALLS, CASES, UNITS
from rome.runs.config import Config

SAME = ("suite", "data", "threats", "seed")
"""Settings of evaluations in which runs must agree for a difference between them to mean anything."""


@dataclass
class Cell:
    """One number: the paper's and ours, as shares of 1 (:data:`UNITS` as they are); NaN where there is none."""

    paper: float
    values: tuple[float, ...] = ()
    """Of each run of this row."""
    best: bool = False
    ratio: float = math.nan
    """Of costs: ours to that of the row that costs are compared with."""
    paper_ratio: float = math.nan

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def deviation(self) -> float:
        """Sample standard deviation over the runs; NaN for fewer than two."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan


@dataclass
class Line:
    """One row of a table."""

    section: str
    label: str
    config: Config | None
    """Of the experiment that defines the row; None for a model without a run."""
    cells: dict[str, Cell]
    reports: tuple[Report, ...] = ()
    others: tuple[Report, ...] = ()
    """Further evaluations of the same runs that cells were taken from."""
    gain: tuple[float, float, float] | None = None
    """Union minus that of the row ``against``, with its interval; shares. All of a table hold together with 95%."""
    against: str = ""
    """Label of the row that this one is compared with: the same method without experts; RoME where it has none."""

    @property
    def attack(self) -> str:
        """What it was trained with."""
        return "" if self.config is None else self.config.method.own_attack or self.config.attack.kind


def value_of(report: Report, column: str) -> float:
    """A column of a table in percent, as a share; NaN where the report does not have it."""
    if column == "clean":
        return report.clean
    if column in ("average", UNION):
        if not set(BALLS) <= set(report.cases):
            return math.nan
        return report.union_of(BALLS) if column == UNION else statistics.fmean(report.robust[ball] for ball in BALLS)
    case = CASES.get(column, column)
    return report.robust.get(case, report.groups.get(case, math.nan))


def mark_best(lines: Sequence[Line], *, least: bool = False) -> None:
    """Mark the best of our accuracies, as printed, in every column of a section and kind of attack.

    Args:
        least: the smallest is the best, of a section whatever the attack.
    """
    groups: dict[tuple[str, ...], list[tuple[float, Cell]]] = {}
    for line in lines:
        for column, cell in line.cells.items():
            if cell.values and (least or column not in UNITS):
                printed = -float(f"{cell.mean:.4g}") if least else round(cell.mean, 3)
                group = (line.section, column, "" if least else line.attack)
                groups.setdefault(group, []).append((printed, cell))
    for cells in groups.values():
        for printed, cell in cells:
            cell.best = printed == max(number for number, _ in cells)


def add_gains(lines: Sequence[Line], ours: str) -> None:
    """Add differences in union to every row with experts: to the same method without them, else to RoME.

    Paired examples for one run each, Welch's interval for several; all hold together with 95% (Bonferroni).

    Args:
        ours: name of the experiment that is RoME's row in the tables that take it apart.
    """
    trained = [(line, line.config) for line in lines if line.config is not None and UNION in line.cells]
    plain = any(config.experts is None for _, config in trained)
    found = []
    for line, config in trained:
        measured = []
        for base, other in trained:
            alike = (base.section, base.attack, other.method.kind) == (line.section, line.attack, config.method.kind)
            without = other.experts is None and alike
            whole = other.name == ours and base.section == line.section and base is not line
            if config.experts is not None and (without if plain else whole) and (both := _comparable(line, base)):
                measured.append((base, other.method, both))
        # of two forms of a method, as of E-AT, the later row; of two trainings of one form, none
        measured = [each for each in measured if each[1] == measured[-1][1]]
        if len(measured) == 1:
            found.append((line, measured[0][0], measured[0][2]))
    for line, base, (a, b) in found:
        line.gain, line.against = _gain(a, b, comparisons=len(found)), base.label


def _comparable(line: Line, base: Line) -> tuple[list[Report], list[Report]] | None:
    """The evaluations of both that have a union; None where they are too few, or were made differently."""
    ours, theirs = (
        [report for report in each.reports if not math.isnan(value_of(report, UNION))] for each in (line, base)
    )
    every = [*ours, *theirs]
    if any(report.settings.get(key) != every[0].settings.get(key) for report in every for key in SAME):
        return None
    if len(ours) == len(theirs) == 1:
        return (ours, theirs) if same_examples(ours[0], theirs[0]) else None
    return (ours, theirs) if len(ours) > 1 and len(theirs) > 1 else None


def _gain(ours: list[Report], theirs: list[Report], *, comparisons: int) -> tuple[float, float, float]:
    """Mean union of the first minus that of the second, with an interval that holds together with so many."""
    if len(ours) == 1:
        return paired_difference(ours[0].right(BALLS), theirs[0].right(BALLS), comparisons=comparisons)[:3]
    a, b = ([value_of(report, UNION) for report in each] for each in (ours, theirs))
    difference = statistics.fmean(a) - statistics.fmean(b)
    if statistics.pstdev(a) == statistics.pstdev(b) == 0:
        return difference, math.nan, math.nan  # runs that agree by chance say nothing of how far others would not
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(1 - LEVEL / comparisons)
    return difference, float(interval.low), float(interval.high)
