"""Accuracies of evaluation reports in columns, and the table printed on a terminal or into a pipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from rome.attacks.suites.base import LP
from rome.core.console import print_table
from rome.core.errors import some
from rome.evaluation.evaluate import Report
from rome.evaluation.result import AVERAGE, CLEAN, UNION

MEAN = " mean"
DASH = "\N{EN DASH}"
WIDE = 9
"""Tables with at least this many columns are printed transposed."""
SHOWN_CLASSES = 20
"""If there are more classes, only this many with the lowest union are shown."""


class Cell(NamedTuple):
    """One number of the table, as a share in 0..1; NaN if there is none."""

    value: float
    interval: tuple[float, float] | None = None
    """95% interval."""
    best: bool = False

    @property
    def percent(self) -> str:
        return DASH if math.isnan(self.value) else f"{100 * self.value:.1f}"

    @property
    def span(self) -> str:
        """The interval in percent, such as ``68.2–77.4``."""
        return "" if self.interval is None else DASH.join(f"{100 * end:.1f}" for end in self.interval)


class Column(NamedTuple):
    """A quantity that every report has a number for."""

    title: str
    union: Sequence[str] | None = None
    """The cases whose union is shown; None for one of the report's own numbers, named by the title."""

    def cell(self, report: Report) -> Cell:
        """Return a report's number with its interval."""
        means = {f"{group}{MEAN}": names for group, names in report.members.items()}
        if self.title in means:
            value = report.groups[self.title.removesuffix(MEAN)]
            return Cell(value, None if math.isnan(value) else report.mean_interval(means[self.title]))
        if self.union is not None:
            known = set(self.union) <= set(report.cases)
            return Cell(report.union_of(self.union), report.union_interval(self.union)) if known else Cell(math.nan)
        values = {CLEAN: report.clean, **report.robust, AVERAGE: report.average, UNION: report.union}
        value = values.get(self.title, math.nan)
        return Cell(value, None if math.isnan(value) else report.interval(self.title))

    def correct(self, report: Report) -> np.ndarray | None:
        """Return the examples counted by the number, bool (n,); None for a mean and for a missing number."""
        if self.title in report.cases:
            return np.asarray(report.correct[:, report.cases.index(self.title)])
        cases = report.attacks if self.title == UNION else self.union
        return report.all_correct(cases) if cases and set(cases) <= set(report.cases) else None


def columns_of(reports: Sequence[Report], unions: Sequence[Sequence[str]] = ()) -> list[Column]:
    """List the columns: clean, every attack, the means of groups, average and union over all attacks.

    A group gets a column unless it contains all attacks; Lp balls among other attacks also get their union, the one
    that papers report. Fixed changes such as corruptions, of which there may be 75, appear only as the mean of their
    group.

    Args:
        unions: sets of cases, each of which gets a further column with its union.
    """
    attacks = list(dict.fromkeys(name for report in reports for name in report.attacks))
    members = {group: names for report in reports for group, names in report.members.items() if len(names) > 1}
    columns = [Column(CLEAN), *map(Column, attacks)]
    for group, names in members.items():
        if set(names) != set(attacks):
            columns.append(Column(f"{group}{MEAN}"))
            columns += [Column(f"{group} union", names)] if group == LP else []
    grouped = {*attacks, *sum(members.values(), ())}
    columns += map(Column, sorted({name for report in reports for name in report.cases[1:]} - grouped))
    columns += [Column(AVERAGE), Column(UNION)] if attacks else []
    return columns + [Column(f"union {'+'.join(names)}", names) for names in unions]


def tabulate(
    rows: Sequence[tuple[str, Report]], unions: Sequence[Sequence[str]] = ()
) -> tuple[list[str], list[list[Cell]]]:
    """Return the titles of the columns (:func:`columns_of`) and a row of cells for each report.

    The best of a column is its largest number as printed. A column has no best if there is only one row, or if guessing
    would reach the number.
    """
    columns = columns_of([report for _, report in rows], unions)
    marked = []
    for column in columns:
        cells = [column.cell(report) for _, report in rows]
        printed = [-1.0 if math.isnan(cell.value) else round(100 * cell.value, 1) for cell in cells]
        guessed = max(100 * report.chance for _, report in rows)
        best = max(printed) if len(rows) > 1 and max(printed) > guessed else math.inf
        marked.append([cell._replace(best=number == best) for cell, number in zip(cells, printed, strict=True)])
    return [column.title for column in columns], [list(row) for row in zip(*marked, strict=True)]


def show(rows: Sequence[tuple[str, Report]], unions: Sequence[Sequence[str]] = ()) -> None:
    """Print accuracies in percent with 95% intervals; the best of each column is bold, or starred in a pipe."""
    columns, cells = tabulate(rows, unions)
    console = Console(highlight=False, markup=False)
    star = "" if console.is_terminal and not console.no_color else "*"
    transposed = len(columns) >= WIDE

    def text(cell: Cell) -> Text:
        number = Text(star * cell.best + cell.percent, style="bold" if cell.best else "")
        between = "  " if transposed else "\n"
        return number.append(f"{between}{cell.span}", style="not bold dim") if cell.span else number

    lines: list[Sequence[str | Text]] = [["under" if transposed else "method", *columns]]
    lines += [[Text(name, style="bold"), *map(text, row)] for (name, _), row in zip(rows, cells, strict=True)]
    head, *body = zip(*lines, strict=True) if transposed else lines
    print_table(body, head, wrapped=range(1, len(head)) if transposed else (0,), console=console)
    best = f"; {star or 'bold'} marks the largest" if len(rows) > 1 else ""
    caption = f"{covered(rows)}; accuracy in %, 95% interval{best}"
    console.print(caption, style="dim", soft_wrap=not console.is_terminal)
    for name, report in rows:
        for sentence in (*report.corruptions, *remarks(report)):
            console.print(Text(f"{name}: {sentence}"), soft_wrap=True)


def remarks(report: Report) -> list[str]:
    """Describe which numbers are missing and why, and which accuracies guessing would reach."""
    by_reason: dict[str, list[str]] = {}
    for case, reason in report.failed.items():
        by_reason.setdefault(reason, []).append(case)
    sentences = [report.chance_remark] if report.chance_remark else []
    sentences += [f"{', '.join(names)} failed: {reason}" for reason, names in by_reason.items()]
    sentences += [f"{case} left out: it {reason}" for case, reason in report.settings.get("left_out", {}).items()]
    if report.pending:
        sentences.append(f"not run yet: {some(report.pending, 5)}; the same command without --cases runs the rest")
    if {*report.failed, *report.pending} & set(report.attacks):
        sentences.append("there is no average and no union until all attacks have run")
    return sentences


def covered(rows: Sequence[tuple[str, Report]]) -> str:
    """Describe what was evaluated: ``360 test examples, suite apgd``; differing numbers and suites are separated by
    slashes."""
    counts = dict.fromkeys(str(report.n) for _, report in rows)
    suites = dict.fromkeys(protocol(report) for _, report in rows)
    return f"{' / '.join(counts)} test examples, suite {' / '.join(suites)}"


def protocol(report: Report) -> str:
    """Describe a report's suite and, unless it is fp32, the precision that its attacks searched in, such as
    ``apgd (30 iterations), searched in TF32``."""
    searched = "" if report.search_precision == "fp32" else f", searched in {report.search_precision.upper()}"
    return f"{_suite_text(report.settings.get('suite', {}))}{searched}"


def _suite_text(settings: dict[str, Any]) -> str:
    if settings.get("kind") == "several":
        return "+".join(map(_suite_text, settings["suites"]))
    iterations = settings.get("iterations", 100)
    return str(settings.get("kind") or "custom") + (f" ({iterations} iterations)" if iterations != 100 else "")


class ClassLine(NamedTuple):
    """Accuracies of all runs on one class."""

    name: str
    n: int
    """Number of its examples."""
    shares: list[tuple[float, float]]
    """Clean and union accuracy of each run; NaN if an attack is missing."""


def by_class(reports: Sequence[Report], names: Sequence[str] | None = None) -> list[ClassLine]:
    """Split accuracies by the classes that occur, in order; of more than 20, return those with the lowest mean union.

    Args:
        reports: reports on the same examples.
        names: names of the classes; their numbers if not given.
    """
    labels, lines = reports[0].labels, []
    for label in np.unique(labels).tolist():
        rows = labels == label
        unions = [
            report.all_correct() if not math.isnan(report.union) else np.full(report.n, np.nan) for report in reports
        ]
        shares = [
            (float(report.correct[rows, 0].mean()), float(union[rows].mean()))
            for report, union in zip(reports, unions, strict=True)
        ]
        lines.append(ClassLine(str(label) if names is None else names[label], int(rows.sum()), shares))
    hardest = sorted(lines, key=lambda line: np.nansum([union for _, union in line.shares]))[:SHOWN_CLASSES]
    return [line for line in lines if line in hardest]
