"""Rows of a filled table: their cells, the best of them, and how sure the differences between rows are."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace

from rome.evaluation.evaluate import Report
from rome.evaluation.result import UNION
from rome.evaluation.statistics import LEVEL, paired_difference
from rome.report.compared import same_examples
from rome.report.tables.paper_rows import BALLS, CASES, UNITS
from rome.runs.config import Config

SAME = ("suite", "data", "threats", "seed")
"""Settings of evaluations in which runs must agree for a difference between them to mean anything."""


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    section: str
    label: str
    config: Config | None
    """Of the experiment that defines the row; None for a given model's."""
    cells: dict[str, Cell]
    reports: tuple[Report, ...] = ()
    gain: tuple[float, float, float] | None = None
    """Union minus that of the row ``against``, with its interval; shares. All of a table hold together with 95%."""
    against: str = ""
    """Label of the row that this one is compared with: the same method without experts; RoME where it has none."""
    others: tuple[Report, ...] = ()
    """Further evaluations of the same runs that cells were taken from."""


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


def with_best(lines: list[Line], *, least: bool = False) -> list[Line]:
    """Marks the best of our accuracies, as printed, in every column of a section and kind of attack.

    Args:
        least: the smallest is the best, of a section whatever the attack.
    """

    def shown(cell: Cell) -> float:
        return -float(f"{cell.mean:.4g}") if least else round(cell.mean, 3)

    def key(line: Line, column: str) -> tuple[str, ...]:
        return (line.section, column) if least else (*_group(line), column)

    def counts(column: str, cell: Cell) -> bool:
        return bool(cell.values) and (least or column not in UNITS)

    top: dict[tuple[str, ...], float] = {}
    for line in lines:
        for column, cell in line.cells.items():
            if counts(column, cell):
                top[key(line, column)] = max(top.get(key(line, column), -math.inf), shown(cell))
    return [
        replace(
            line,
            cells={
                column: replace(cell, best=counts(column, cell) and shown(cell) == top[key(line, column)])
                for column, cell in line.cells.items()
            },
        )
        for line in lines
    ]


def _group(line: Line) -> tuple[str, str]:
    return line.section, "" if line.config is None else line.config.method.own_attack or line.config.attack.kind


def with_gains(lines: list[Line], ours: str) -> list[Line]:
    """Adds differences in union to every row with experts: to the same method without them, else to RoME.

    Paired examples for one run each, Welch's interval for several; all hold together with 95% (Bonferroni).

    Args:
        ours: name of the experiment that is RoME's row in the tables that take it apart.
    """
    if UNION not in lines[0].cells:
        return lines
    trained = [(line, line.config) for line in lines if line.config is not None]
    plain: dict[tuple[str, ...], list[Line]] = {}
    whole: dict[str, list[Line]] = {}
    for line, trained_as in trained:
        if trained_as.experts is None:
            plain.setdefault((*_group(line), trained_as.method.kind), []).append(line)
        elif trained_as.name == ours:
            whole.setdefault(line.section, []).append(line)
    found = {}
    for i, (line, config) in enumerate((line, line.config) for line in lines):
        if config is not None and config.experts is not None:
            bases = plain.get((*_group(line), config.method.kind), []) if plain else whole.get(line.section, [])
            measured = [(base, both) for base in bases if base is not line and (both := _comparable(line, base))]
            # of two forms of a method, as of E-AT, the later row; of two trainings of one form, nobody knows which
            measured = [each for each in measured if _method(each[0]) == _method(measured[-1][0])]
            if len(measured) == 1:
                ((base, both),) = measured
                found[i] = (base, *both)
    return [
        replace(line, gain=_gain(*found[i][1:], comparisons=len(found)), against=found[i][0].label)
        if i in found
        else line
        for i, line in enumerate(lines)
    ]


def _method(line: Line) -> object:
    return None if line.config is None else line.config.method


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
        a_right, b_right = ours[0].right(BALLS), theirs[0].right(BALLS)
        return paired_difference(a_right, b_right, comparisons=comparisons)[:3]
    from scipy.stats import ttest_ind

    a, b = ([value_of(report, UNION) for report in each] for each in (ours, theirs))
    difference = statistics.fmean(a) - statistics.fmean(b)
    if statistics.pstdev(a) == statistics.pstdev(b) == 0:
        return difference, math.nan, math.nan  # runs that agree by chance say nothing of how far others would not
    interval = ttest_ind(a, b, equal_var=False).confidence_interval(1 - LEVEL / comparisons)
    return difference, float(interval.low), float(interval.high)
