"""Models ranked by their union, with tests of their differences: printed, in Markdown, as data, and on an HTML page
with sorting and filtering."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from rome.core.console import print_table
from rome.core.files import csv_text, now, replace_file
from rome.evaluation.result import UNION
from rome.evaluation.statistics import Difference, paired_differences, wilson
from rome.report import charts
from rome.report.bench import comparable
from rome.report.columns import Cell, columns_of, covered, remarks, show
from rome.report.compared import findings
from rome.report.evaluated import Evaluated
from rome.report.robustbench import entries_of, write_entries
from rome.report.seeds import csv_rows
from rome.report.templating import filled
from rome.threats import LpBall

ROBUSTBENCH = "robustbench"
"""Folder beside a leaderboard for entries in RobustBench's format."""


class Group(NamedTuple):
    """Models evaluated with the same attacks on the same examples, sorted by union, largest first."""

    title: str
    """Data, budgets, number of examples and suite."""
    models: list[Evaluated]
    columns: list[str]
    cells: list[list[Cell]]
    """One row for each model."""
    findings: list[str]
    pairs: dict[tuple[int, int], Difference]
    """(i, j) with i < j -> union of model i minus union of model j; empty if a model has no union."""
    curves: dict[str, list[Curve]]
    """Norm -> accuracy over radii, for norms with several radii."""


class Curve(NamedTuple):
    """Robust accuracy of a model over the radii of one norm."""

    model: str
    radii: list[float]
    """In ascending order, from 0 (no attack)."""
    values: list[float]
    """Accuracies as shares; an example counts at a radius if no attack within that radius or a smaller one broke it."""
    intervals: list[tuple[float, float]]
    """95% intervals."""


def write_leaderboard(models: Sequence[Evaluated], out: Path, failed: Mapping[str, str]) -> Path:
    """Print the leaderboard and write ``leaderboard.md``, ``.html``, ``.csv`` and ``.json`` into ``out``, with
    RobustBench's entries for models evaluated with the standard AutoAttack.

    Args:
        failed: name -> reason why the model has no result.

    Returns:
        The HTML file, which needs no other file and no network.
    """
    groups = [group_of(each) for each in comparable(models)]
    for group in groups:
        if len(groups) > 1:
            print(f"\n{group.title}")
        show([(one.name, one.report) for one in group.models])
        for sentence in group.findings:
            print(sentence)
        for norm, curves in group.curves.items():
            titles = [norm, *(f"{radius:.4g}" for radius in curves[0].radii)]
            print_table([[each.model, *(f"{100 * value:.1f}" for value in each.values)] for each in curves], titles)
    standard = [one for one in models if one.data is not None and entries_of(one)]  # which name the data
    entries = write_entries(standard, out / ROBUSTBENCH) if standard else []
    context: dict[str, Any] = {
        "groups": groups,
        "charts": [_charts(group) for group in groups],
        "failed": failed,
        "entries": [entry.relative_to(out).as_posix() for entry in entries],
        "date": now(),
        "remarks": remarks,
    }
    rows = [{"group": i, **row} for i, group in enumerate(groups) for row in csv_rows(group.models)]
    replace_file(out / "leaderboard.csv", csv_text(rows).encode())
    replace_file(out / "leaderboard.json", json.dumps([_as_json(group) for group in groups], indent=2).encode())
    for name in ("leaderboard.md", "leaderboard.html"):
        replace_file(out / name, filled(name, **context).encode())
    return out / "leaderboard.html"


def group_of(models: list[Evaluated]) -> Group:
    """Collect a leaderboard's contents for models that can be compared with each other."""
    reports = [one.report for one in models]
    columns = columns_of(reports)
    cells = [[column.cell(report) for column in columns] for report in reports]
    pairs: dict[tuple[int, int], Difference] = {}
    if not any(math.isnan(report.union) for report in reports):
        places = list(combinations(range(len(models)), 2))
        correct = [report.all_correct() for report in reports]
        pairs = dict(zip(places, paired_differences([(correct[i], correct[j]) for i, j in places]), strict=True))
    balls = [threat for threat in models[0].threats.values() if isinstance(threat, LpBall)]
    radii = {norm: ", ".join(ball.radius for ball in balls if ball.norm == norm) for norm in (b.norm for b in balls)}
    budgets = "".join(f"; {norm} {text}" for norm, text in radii.items())
    title = f"{models[0].source}{budgets}; {covered([(one.name, one.report) for one in models])}"
    return Group(title, models, [each.title for each in columns], cells, findings(models), pairs, _curves(models))


def _curves(models: Sequence[Evaluated]) -> dict[str, list[Curve]]:
    balls: dict[str, dict[float, str]] = {}
    for name, threat in models[0].threats.items():
        if isinstance(threat, LpBall) and all(name in one.report.cases for one in models):
            balls.setdefault(threat.norm, {})[threat.eps] = name
    return {
        norm: [_curve(one, dict(sorted(cases.items()))) for one in models]
        for norm, cases in balls.items()
        if len(cases) > 1
    }


def _curve(one: Evaluated, cases: Mapping[float, str]) -> Curve:
    """Compute accuracy over radii, given radius -> case with the smallest radius first."""
    report, correct = one.report, [np.asarray(one.report.correct[:, 0])]
    for case in cases.values():  # what breaks an example in a ball breaks it in every larger one
        correct.append(correct[-1] & report.correct[:, report.cases.index(case)])
    shares = [float(each.mean()) for each in correct]
    return Curve(one.name, [0.0, *cases], shares, [wilson(int(each.sum()), report.n) for each in correct])


def _charts(group: Group) -> list[Markup]:
    return [
        charts.accuracy_over_radii(norm, [(each.radii, each.values, each.intervals) for each in curves])
        for norm, curves in group.curves.items()
    ]


def _as_json(group: Group) -> dict[str, Any]:
    """Convert the group to JSON data."""

    def number(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "title": group.title,
        "models": [
            {
                "name": one.name,
                "architecture": one.architecture,
                "facts": one.facts,
                "accuracies": {
                    title: {"value": number(cell.value), "interval": cell.interval and list(cell.interval)}
                    for title, cell in zip(group.columns, row, strict=True)
                },
            }
            for one, row in zip(group.models, group.cells, strict=True)
        ],
        "pairs": [
            {"first": group.models[i].name, "second": group.models[j].name, "column": UNION, **found._asdict()}
            for (i, j), found in group.pairs.items()
        ],
        "curves": {norm: [curve._asdict() for curve in curves] for norm, curves in group.curves.items()},
    }
