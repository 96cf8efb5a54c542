"""Rows of a filled table: their cells, the best of them, and how sure the differences between rows are."""

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
    def method(self) -> Method | None:
        """What trained it."""
        return None if self.config is None else self.config.method

    @property
    def attack(self) -> str:
        """What it was trained with."""
        return "" if self.config is None else self.config.method.own_attack or self.config.attack.kind

    @property
    def measured(self) -> bool:
        """Whether there is a number of ours."""
        return any(cell.values for cell in self.cells.values())

    @property
    def chance(self) -> float:
        """Accuracy of guessing, for whichever of its evaluations guessing is easiest."""
        return max((report.chance for report in self.reports), default=0.0)

    @property
    def guesses(self) -> bool:
        """Whether guessing reaches its accuracy, without an attack or under all."""
        cells = [self.cells[column] for column in (CLEAN, UNION) if column in self.cells]
        return any(cell.values and round(cell.mean, 3) <= self.chance for cell in cells)

    @property
    def unions(self) -> list[tuple[Report, float]]:
        """The evaluations that have a union, with it."""
        found = [(report, value_of(report, UNION)) for report in self.reports]
        return [(report, union) for report, union in found if not math.isnan(union)]


def value_of(report: Report, column: str) -> float:
    """A column of a table in percent, as a share; NaN where the report does not have it."""
    if column == CLEAN:
        return report.clean
    if column in ("average", UNION):
        if not set(BALLS) <= set(report.cases):
            return math.nan
        return report.union_of(BALLS) if column == UNION else statistics.fmean(report.robust[ball] for ball in BALLS)
    case = CASES.get(column, column)
    return report.robust.get(case, report.groups.get(case, math.nan))


def mark_best(lines: Sequence[Line]) -> None:
    """Mark the best of ours, as printed, in every column of a section: the largest accuracy of a kind of attack, the
    least cost of all. None is best of its like, and nothing that guessing reaches. Sizes beside accuracies are not
    compared."""
    groups: dict[tuple[str, ...], list[tuple[float, Cell, bool]]] = defaultdict(list)
    for line in lines:
        costs = tuple(line.cells) == COST
        for column, cell in line.cells.items():
            if cell.values and (costs or column not in UNITS):
                printed = -float(f"{cell.mean:.4g}") if costs else round(cell.mean, 3)
                beyond = costs or printed > line.chance
                groups[line.section, column, "" if costs else line.attack].append((printed, cell, beyond))
    for cells in groups.values():
        least, *_, most = sorted([printed for printed, *_ in cells] * 2)
        for printed, cell, beyond in cells:
            cell.best = beyond and least < printed == most


def add_gains(lines: Sequence[Line]) -> None:
    """Add differences in union to every row with experts: to the same method without them, else to RoME.

    Paired examples for one run each, Welch's interval for several; all hold together with 95% (Bonferroni).
    """
    rows = [line for line in lines if line.config is not None and UNION in line.cells]
    plain = any(line.config is not None and line.config.experts is None for line in rows)
    found = []
    for line in rows:
        bases = [base for base in rows if _is_base(base, line, plain=plain) and _comparable(line, base)]
        # of two forms of a method, as of E-AT, the later row; of two trainings of one form, none
        bases = [base for base in bases if base.method == bases[-1].method]
        if len(bases) == 1:
            found.append((line, bases[0]))
    for line, base in found:
        line.gain, line.against = _gain(line, base, comparisons=len(found)), base.label


def _is_base(base: Line, line: Line, *, plain: bool) -> bool:
    """Whether a row is the one that another with experts is compared with; ``plain``: the table has rows without."""
    ours, theirs = line.config, base.config
    if ours is None or theirs is None or ours.experts is None or base.section != line.section:
        return False
    if plain:
        return theirs.experts is None and (base.attack, theirs.method.kind) == (line.attack, ours.method.kind)
    return theirs.name == OURS and base is not line


def _comparable(line: Line, base: Line) -> bool:
    """Whether both have as many evaluations as a difference takes, made alike: one each of the same examples, or
    several."""
    ours, theirs = ([report for report, _ in each.unions] for each in (line, base))
    every = [*ours, *theirs]
    if any(report.settings.get(key) != every[0].settings.get(key) for report in every for key in SAME):
        return False
    if len(ours) == len(theirs) == 1:
        return same_examples(ours[0], theirs[0])
    return len(ours) > 1 and len(theirs) > 1


def _gain(line: Line, base: Line, *, comparisons: int) -> tuple[float, float, float]:
    """Mean union of the first minus that of the second, with an interval that holds together with so many."""
    ours, theirs = line.unions, base.unions
    if len(ours) == 1:
        return paired_difference(ours[0][0].right(BALLS), theirs[0][0].right(BALLS), comparisons=comparisons)[:3]
    a, b = ([union for _, union in each] for each in (ours, theirs))
    return welch(a, b, comparisons=comparisons)
