"""Rows of a filled table: their cells, the best of each column, and the intervals of differences between rows."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from rome.evaluation.evaluate import Report
from rome.evaluation.result import CLEAN, UNION
from rome.evaluation.statistics import paired_difference, welch
from rome.methods import Method
from rome.report.compared import same_examples
from rome.report.tables.paper_rows import BALLS, CASES, COST, OURS, UNITS
from rome.runs.config import Config

SAME = ("suite", "data", "threats", "seed", "search_precision")
"""Settings of evaluations that must be equal for the results of runs to be comparable."""


@dataclass
class Cell:
    """One number, the paper's and ours, as a share of 1 (columns in :data:`UNITS` in their units); NaN if missing."""

    paper: float
    values: tuple[float, ...] = ()
    """Our value for each run of this row."""
    best: bool = False
    ratio: float = math.nan
    """For costs: ratio of ours to ours in the first row."""
    paper_ratio: float = math.nan
    """For costs: ratio of the paper's to the paper's in the first row."""

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
    """Config of the experiment that defines the row; None for a model without a run."""
    cells: dict[str, Cell]
    reports: tuple[Report, ...] = ()
    others: tuple[Report, ...] = ()
    """Further evaluations of the same runs that supplied cells."""
    gain: tuple[float, float, float] | None = None
    """Union minus the union of the row ``against``, and the ends of its interval, as shares of 1. All intervals of a
    table hold simultaneously with 95% confidence."""
    against: str = ""
    """Label of the row that this one is compared with: the same method without experts; RoME if the table has none."""

    @property
    def method(self) -> Method | None:
        """Training method of the row."""
        return None if self.config is None else self.config.method

    @property
    def attack(self) -> str:
        """Kind of attack that the row was trained with."""
        return "" if self.config is None else self.config.method.own_attack or self.config.attack.kind

    @property
    def measured(self) -> bool:
        """Whether the row has any number of ours."""
        return any(cell.values for cell in self.cells.values())

    @property
    def chance(self) -> float:
        """Accuracy of guessing, the largest over the row's evaluations."""
        return max((report.chance for report in self.reports), default=0.0)

    @property
    def at_chance(self) -> bool:
        """Whether clean accuracy or union is no better than guessing."""
        cells = [self.cells[column] for column in (CLEAN, UNION) if column in self.cells]
        return any(cell.values and round(cell.mean, 3) <= self.chance for cell in cells)

    @property
    def unions(self) -> list[tuple[Report, float]]:
        """The evaluations that have a union, each with its union."""
        return [(report, union) for report in self.reports if not math.isnan(union := value_of(report, UNION))]


def value_of(report: Report, column: str) -> float:
    """Return a percentage column of a table as a share of 1; NaN if the report does not have it."""
    if column == CLEAN:
        return report.clean
    if column in ("average", UNION):
        if not set(BALLS) <= set(report.cases):
            return math.nan
        return report.union_of(BALLS) if column == UNION else statistics.fmean(report.robust[ball] for ball in BALLS)
    case = CASES.get(column, column)
    return report.robust.get(case, report.groups.get(case, math.nan))


def mark_best(lines: Sequence[Line]) -> None:
    """Mark the best of our numbers, as printed, in each column of each section: the highest accuracy for each kind of
    training attack, the lowest cost of all rows.

    Nothing is marked if all numbers are equal, or if guessing does as well. Model sizes in tables of accuracies are not
    compared.
    """
    groups: dict[tuple[str, ...], list[tuple[float, Cell, bool]]] = defaultdict(list)
    for line in lines:
        costs = tuple(line.cells) == COST
        for column, cell in line.cells.items():
            if cell.values and (costs or column not in UNITS):
                printed = -float(f"{cell.mean:.4g}") if costs else round(cell.mean, 3)
                eligible = costs or printed > line.chance
                groups[line.section, column, "" if costs else line.attack].append((printed, cell, eligible))
    for cells in groups.values():
        scores = [printed for printed, *_ in cells]
        for printed, cell, eligible in cells:
            cell.best = eligible and min(scores) < printed == max(scores)


def add_gains(lines: Sequence[Line]) -> None:
    """Add to every row with experts the difference in union from the same method without experts, else from RoME.

    Intervals are for paired examples if both rows have one run, else Welch's; all hold simultaneously with 95%
    confidence (Bonferroni).
    """
    rows = [line for line in lines if line.config is not None and UNION in line.cells]
    plain = any(line.config is not None and line.config.experts is None for line in rows)
    pairs = []
    for line in rows:
        bases = [base for base in rows if _is_base(base, line, plain=plain) and _comparable(line, base)]
        # of two variants of a method, such as E-AT's, the later row; of two trainings of one variant, none
        bases = [base for base in bases if base.method == bases[-1].method]
        if len(bases) == 1:
            pairs.append((line, bases[0]))
    for line, base in pairs:
        line.gain, line.against = _gain(line, base, comparisons=len(pairs)), base.label


def _is_base(base: Line, line: Line, *, plain: bool) -> bool:
    """Whether ``line`` is compared with ``base``; ``plain``: the table has rows without experts."""
    ours, theirs = line.config, base.config
    if ours is None or theirs is None or ours.experts is None or base.section != line.section:
        return False
    if plain:
        return theirs.experts is None and (base.attack, theirs.method.kind) == (line.attack, ours.method.kind)
    return theirs.name == OURS and base is not line


def _comparable(line: Line, base: Line) -> bool:
    """Whether both rows have comparable evaluations, and enough: one each on the same examples, or several each."""
    ours, theirs = ([report for report, _ in each.unions] for each in (line, base))
    every = [*ours, *theirs]
    if any(report.settings.get(key) != every[0].settings.get(key) for report in every for key in SAME):
        return False
    if len(ours) == len(theirs) == 1:
        return same_examples(ours[0], theirs[0])
    return len(ours) > 1 and len(theirs) > 1


def _gain(line: Line, base: Line, *, comparisons: int) -> tuple[float, float, float]:
    """Return the mean union of ``line`` minus that of ``base``, with its interval corrected for ``comparisons``."""
    ours, theirs = line.unions, base.unions
    if len(ours) == 1:
        return paired_difference(
            ours[0][0].all_correct(BALLS), theirs[0][0].all_correct(BALLS), comparisons=comparisons
        )[:3]
    a, b = ([union for _, union in each] for each in (ours, theirs))
    return welch(a, b, comparisons=comparisons)
