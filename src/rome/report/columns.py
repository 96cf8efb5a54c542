"""Accuracies in columns: what is shown of a report, and the table on a terminal or in a pipe."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rome.attacks.suites.base import LP
from rome.core.console import print_table
from rome.evaluation.evaluate import Report

AVERAGE, UNION = "average", "union"
DASH = "\N{EN DASH}"
WIDE = 9
"""Columns from which a table is printed with its rows and columns exchanged."""


class Column(NamedTuple):
    """One number of every report."""

    title: str
    value: Callable[[Report], float]
    """As a share; NaN where there is none."""
    interval: Callable[[Report], tuple[float, float]] | None = None
    """95% interval, if it has one."""


class Cell(NamedTuple):
    """One number of the table, as shares; NaN where there is none."""

    value: float
    interval: tuple[float, float] | None
    best: bool

    @property
    def percent(self) -> str:
        return DASH if math.isnan(self.value) else f"{100 * self.value:.1f}"

    @property
    def span(self) -> str:
        """The 95% interval, ``68.2–77.4``."""
        if self.interval is None or math.isnan(self.interval[0]):
            return ""
        return DASH.join(f"{100 * end:.1f}" for end in self.interval)


def columns_of(reports: Sequence[Report], unions: Sequence[Sequence[str]] = ()) -> list[Column]:
    """Clean, every attack, the means of groups, average and union over all attacks.

    A group is shown if it is not all there is; of Lp balls among other attacks the union too, which is the one that
    papers report. Fixed changes, of which there may be 75, are shown by their group's mean.

    Args:
        unions: further unions, each over these cases.
    """
    shown = [Column("clean", lambda report: report.clean, lambda report: report.interval("clean"))]
    attacks = list(dict.fromkeys(name for report in reports for name in report.attacks))
    shown += [_of_case(name) for name in attacks]
    members = {group: names for report in reports for group, names in report.members.items() if len(names) > 1}
    for group, names in members.items():
        if set(names) == set(attacks):
            continue
        shown.append(_of_group(group))
        if group == LP:
            shown.append(_of_union(names, f"{group} union"))
    loose = {name for report in reports for name in report.cases[1:]} - {*attacks, *sum(members.values(), ())}
    shown += [_of_case(name) for name in sorted(loose)]
    if attacks:
        shown.append(Column(AVERAGE, lambda report: report.average))
        shown.append(Column(UNION, lambda report: report.union, lambda report: report.interval(UNION)))
    return shown + [_of_union(names, f"union {'+'.join(names)}") for names in unions]


def _of_case(name: str) -> Column:
    return Column(name, lambda report: report.robust.get(name, math.nan), lambda report: report.interval(name))


def _of_group(group: str) -> Column:
    return Column(f"{group} mean", lambda report: report.groups.get(group, math.nan))


def _of_union(names: Sequence[str], title: str) -> Column:
    def value(report: Report) -> float:
        return report.union_of(names) if set(names) <= set(report.cases) else math.nan

    return Column(title, value, lambda report: report.union_interval(names))


def tabulate(
    rows: Sequence[tuple[str, Report]], unions: Sequence[Sequence[str]] = ()
) -> tuple[list[str], list[list[Cell]]]:
    """Titles of the columns (:func:`columns_of`) and a row of cells for each report.

    The largest number of a column, as printed, is its best; there is none where there is one row.
    """
    columns = columns_of([report for _, report in rows], unions)
    values = [[column.value(report) for column in columns] for _, report in rows]
    shown = [[-1.0 if math.isnan(value) else round(100 * value, 1) for value in row] for row in values]
    best = [max(column) for column in zip(*shown, strict=True)]
    cells = []
    for (_, report), row, rounded in zip(rows, values, shown, strict=True):
        intervals = [
            None if column.interval is None or math.isnan(value) else column.interval(report)
            for column, value in zip(columns, row, strict=True)
        ]
        marks = [len(rows) > 1 and number == top >= 0 for number, top in zip(rounded, best, strict=True)]
        cells.append([Cell(*cell) for cell in zip(row, intervals, marks, strict=True)])
    return [column.title for column in columns], cells


def show(rows: list[tuple[str, Report]], unions: Sequence[Sequence[str]] = ()) -> None:
    """Print accuracies in percent with their 95% intervals; the best of each column is bold, or starred in a pipe."""
    columns, cells = tabulate(rows, unions)
    console = Console(highlight=False, markup=False)
    star = "" if console.is_terminal and not console.no_color else "*"

    def text(cell: Cell, between: str) -> Text:
        number = Text(star * cell.best + cell.percent, style="bold" if cell.best else "")
        return number.append(f"{between}{cell.span}", style="not bold dim") if cell.span else number

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    if len(columns) < WIDE:
        table.add_column("method", overflow="fold", min_width=8)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for (name, _), row in zip(rows, cells, strict=True):
            table.add_row(Text(name, style="bold"), *(text(cell, "\n") for cell in row))
    else:
        table.add_column("under", no_wrap=True)
        for name, _ in rows:
            table.add_column(Text(name, style="bold"), justify="right", overflow="fold")
        for column, across in zip(columns, zip(*cells, strict=True), strict=True):
            table.add_row(column, *(text(cell, "  ") for cell in across))
    print_table(table, console)
    counts, suites = counts_and_suites(rows)
    best = f"; {star or 'bold'} is the largest" if len(rows) > 1 else ""
    over = "over" if len(columns) < WIDE else "before"
    caption = f"n = {counts}, suite {suites}; percent right {over} its 95% interval{best}"
    console.print(caption, style="dim", soft_wrap=not console.is_terminal)
    for name, report in rows:
        for sentence in (*report.corruptions, *missing(report)):
            console.print(Text(f"{name}: {sentence}"), soft_wrap=True)


def markdown(value: object) -> str:
    """Text that Markdown, its tables and a renderer of HTML leave as it is."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(re.sub(r"[\\`*\[\]|$~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text).split())


def missing(report: Report) -> list[str]:
    """What has no number, and why."""
    alike: dict[str, list[str]] = {}
    for case, reason in report.failed.items():
        alike.setdefault(reason, []).append(case)
    sentences = [f"{', '.join(names)} failed: {reason}" for reason, names in alike.items()]
    sentences += [f"{case} left out: it {reason}" for case, reason in report.settings.get("left_out", {}).items()]
    if report.pending:
        names = ", ".join(report.pending[:5]) + (f" and {len(report.pending) - 5} more" * (len(report.pending) > 5))
        sentences.append(f"not run yet: {names}; the same command without --cases runs the rest")
    if {*report.failed, *report.pending} & set(report.attacks):
        sentences.append("without all attacks there is no average and no union")
    return sentences


def covered(rows: Sequence[tuple[str, Report]]) -> str:
    """``360 test examples, suite apgd``."""
    counts, suites = counts_and_suites(rows)
    return f"{counts} test examples, suite {suites}"


def counts_and_suites(rows: Sequence[tuple[str, Report]]) -> tuple[str, str]:
    """Numbers of examples and suites, each where they differ with slashes between."""
    counts = dict.fromkeys(str(report.n) for _, report in rows)
    suites = dict.fromkeys(suite_text(report.settings.get("suite", {})) for _, report in rows)
    return " / ".join(counts), " / ".join(suites)


def suite_text(settings: dict[str, Any]) -> str:
    """``apgd (30 iterations)``, from a report's settings."""
    if settings.get("kind") == "several":
        return "+".join(map(suite_text, settings["suites"]))
    iterations = settings.get("iterations", 100)
    return str(settings.get("kind") or "of your own") + (f" ({iterations} iterations)" if iterations != 100 else "")
