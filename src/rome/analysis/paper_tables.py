"""The paper's tables, filled from runs: our numbers beside the paper's.

A row of a table is an experiment that comes with rome. A run belongs to a row if it trains the same way: same method,
kind of attack, experts and, where a table compares architectures, model. So a small run on another data set fills the
same row as the full one, and the caption says what the runs are. Where a table has the same training on several data
sets, a run fills the rows of its own; on data that the table does not have, those of the first. Models that no run made
were trained nobody knows how: they get rows of their own, at the end.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rome.analysis.compared import PREFERRED_SUITES, paired
from rome.analysis.evaluated import EvaluatedModel, is_evaluation, load_evaluation
from rome.analysis.paper_rows import BALLS, BY_MODEL, CASES, OURS, SIZE, TABLES, UNITS, UNSEEN
from rome.analysis.subject import names_of
from rome.config import Config, load
from rome.cost import count
from rome.errors import UserError, did_you_mean
from rome.evaluating import Report
from rome.evaluation.report import UNION
from rome.evaluation.store import RESULT
from rome.experiments import folder
from rome.runs import Run

GIVEN = "Given models"
"""Section of the models that no run made."""
LEARNED = "learned"
"""Gate weights of an evaluation that says nothing of them."""
_SAME = ("suite", "data", "threats", "seed")
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
    """Union minus that of the row ``against``, with its 95% interval; shares."""
    against: str = ""
    """Label of the row that this one is compared with: the same method without experts; RoME where it has none."""
    others: tuple[Report, ...] = ()
    """Further evaluations of the same runs that cells were taken from."""


def fill(table: str, runs: Sequence[Path]) -> list[Line]:
    """The rows of a table, filled with the finished evaluations of runs.

    Args:
        table: ``1`` to ``6``, ``A1`` to ``A5``.
        runs: folders of evaluated runs; several of one row (seeds) are joined. And folders of evaluations of given
            models; several of one model fill one row, as several of a run do.

    Of a run's evaluations that is taken which has most of the columns; then the suite and number of examples that most
    of the runs have, so that rows can be compared; then AutoAttack's; then the one on most examples. What it lacks of
    Table 2, whose columns stand each for itself, is taken from others on as many examples.

    Raises:
        UserError: no such table, a folder that is no run, a run that belongs to no row, or one without an evaluation.
    """
    number = table.upper()
    if number not in TABLES:
        raise UserError(f"no table {table!r}.{did_you_mean(table, TABLES)}")
    columns, sections = TABLES[number]
    rows = [
        (section, load(folder() / f"{name}.yaml")) for section, experiments in sections.items() for name in experiments
    ]
    members: list[list[Run]] = [[] for _ in rows]
    places = [Path(each) for each in {Path(each).resolve(): each for each in runs}.values()]  # each counts once
    given = _by_model([place for place in places if is_evaluation(place)], columns, number)
    for run in (Run(place) for place in places if not is_evaluation(place)):
        for i in _rows_of(run, [row for _, row in rows], number):
            members[i].append(run)
    found = {run.folder: _evaluations(run, columns) for own in members for run in own}
    shared = Counter(key for each in (*found.values(), *given.values()) for key in {(suite, n) for _, suite, n in each})
    lines, used = [], set()
    for (section, row), own in zip(rows, members, strict=True):
        reports = []
        for run in own:
            shown = _shown(found[run.folder], row.evaluation.routing, columns, shared)
            if shown:
                used.add(run.folder)
                reports.append(shown)
        assert row.paper is not None
        lines.append(_line(section, row.paper.row, row, columns, reports, [run.config for run in own]))
    for run in (run for own in members for run in own if run.folder not in used):
        raise UserError(_nothing_of(run.folder, f"rome evaluate {run.folder}", columns, number))
    firsts = [place for place, _ in given]
    for name, evaluations in zip(names_of([name for _, name in given], firsts), given.values(), strict=True):
        lines.append(_line(GIVEN, name, None, columns, [_shown(evaluations, LEARNED, columns, shared)], []))
    return _with_gains(with_best(lines), OURS.rpartition("/")[2])


def _by_model(
    places: Sequence[Path], columns: Sequence[str], number: str
) -> dict[tuple[Path, str], dict[tuple[str, str, int], Report]]:
    """(first folder, name) of each model -> the evaluations in these folders, as :func:`_evaluations` has a run's.

    A model is told by its name, state and code, and fills a row for each set of budgets. One without a hash, which is
    a function, may be another in every folder.

    Raises:
        UserError: one of them is not finished, has none of the columns, or is of the same model, budgets, suite and
            number of examples as another: a row cannot show both.
    """
    found: dict[tuple[str, ...], dict[tuple[str, str, int], Report]] = {}
    sources: dict[tuple[str, ...], dict[tuple[str, int], Path]] = {}
    for place in places:
        model = EvaluatedModel(name="", folder=place, report=load_evaluation(place))
        if not _known(model.report, columns):
            raise UserError(_nothing_of(place, model.command, columns, number))
        settings, evaluation = model.report.settings, (model.report.suite, model.report.n)
        state = settings["model"]["sha256"] or str(place.resolve())
        key = (
            model.architecture,
            state,
            json.dumps(settings["model"], sort_keys=True),
            json.dumps(settings.get("threats"), sort_keys=True),
        )
        own = sources.setdefault(key, {})
        if evaluation in own:
            raise UserError(
                f"{own[evaluation]} and {place} are both evaluations of {model.architecture} by suite {evaluation[0]} "
                f"on {evaluation[1]} examples, and a row shows one of them: leave the other out"
            )
        own[evaluation] = place
        found.setdefault(key, {})[LEARNED, *evaluation] = model.report
    return {(next(iter(sources[key].values())), key[0]): own for key, own in found.items()}


def _nothing_of(place: Path, command: str, columns: Sequence[str], number: str) -> str:
    suite = " --suite unseen,corruptions" if columns is UNSEEN else ""
    return (
        f"{place} has no finished evaluation with a column of table {number}: "
        f"run `{command}{suite}` first, or leave it out"
    )


def _rows_of(run: Run, rows: Sequence[Config], number: str) -> list[int]:
    """Places of the rows that a run fills.

    Raises:
        UserError: there are none.
    """
    config, models = run.config, number in BY_MODEL
    found = [i for i, row in enumerate(rows) if same_row(config, row, models=models)]
    if not found:
        what = "method, kind of attack, experts" + (", model" if models else "")
        raise UserError(f"{run.folder} trains like no row of table {number} ({what}); leave it out")
    kinds = [rows[i].data.kind for i in found]
    kind = config.data.kind if config.data.kind in kinds else kinds[0]
    return [i for i in found if rows[i].data.kind == kind]


def same_row(run: Config, row: Config, *, models: bool = False) -> bool:
    """Whether a run trains as the experiment of a row does; with ``models``, the same model too."""
    same = run.method == row.method and (run.method.own_attack or run.attack.kind == row.attack.kind)
    return bool(same and _experts(run) == _experts(row) and (not models or run.model.name == row.model.name))


def _experts(config: Config) -> dict[str, Any] | None:
    if config.experts is None:
        return None
    plain = config.experts.dump()
    if plain.get("layers") in (None, ["qkv", "proj"]):  # what None picks in a transformer
        plain["layers"] = None
    return plain


def _evaluations(run: Run, columns: Sequence[str]) -> dict[tuple[str, str, int], Report]:
    """(routing, suite, n) -> the run's finished evaluation; those with none of the columns are left out."""
    found = {}
    for result in sorted((run.folder / "evaluation").glob(f"*/{RESULT}")):
        report = Report.load(result.parent)
        if _known(report, columns):
            routing = (report.settings.get("provenance") or {}).get("routing", LEARNED)
            found[routing, report.suite, report.n] = report
    return found


def _known(report: Report, columns: Sequence[str]) -> int:
    """How many of the columns it has."""
    return sum(not math.isnan(_value(report, column)) for column in columns if column not in UNITS)


def _ranked(
    found: dict[tuple[str, str, int], Report], routing: str, columns: Sequence[str], shared: Counter[tuple[str, int]]
) -> list[Report]:
    """The evaluations with these gates, the one that a row shows first."""

    def rank(key: tuple[str, str, int]) -> tuple[int, int, bool, int, str]:
        _, suite, n = key
        preferred = any(part in PREFERRED_SUITES for part in suite.split("+"))
        return _known(found[key], columns), shared[suite, n], preferred, n, suite

    return [found[key] for key in sorted((key for key in found if key[0] == routing), key=rank, reverse=True)]


def _shown(
    found: dict[tuple[str, str, int], Report], routing: str, columns: Sequence[str], shared: Counter[tuple[str, int]]
) -> list[Report]:
    """The evaluations that a row takes its cells from; of Table 2, whose columns stand each for itself, several."""
    ranked = _ranked(found, routing, columns, shared)
    return [each for each in ranked if columns is UNSEEN and each.n == ranked[0].n] or ranked[:1]


def _line(
    section: str,
    label: str,
    config: Config | None,
    columns: Sequence[str],
    reports: Sequence[Sequence[Report]],
    runs: Sequence[Config],
) -> Line:
    """A row from the evaluations of each of its runs; of several the first that has a column."""
    numbers = {} if config is None or config.paper is None else config.paper.numbers
    cells = {}
    for column in columns:
        paper = numbers.get(column, math.nan) / (1 if column in UNITS else 100)
        if column in SIZE:
            values = sorted({size for run in runs if not math.isnan(size := _size(run, SIZE[column]))})
        else:
            known = [[value for report in own if not math.isnan(value := _value(report, column))] for own in reports]
            values = [own[0] for own in known if own]
        cells[column] = Cell(paper, tuple(values))
    first, others = tuple(own[0] for own in reports), tuple(report for own in reports for report in own[1:])
    return Line(section, label, config, cells, first, others=others)


def _size(config: Config, what: str) -> float:
    """Millions of parameters of a run's model; NaN where its data are gone, which say how many classes it has."""
    try:
        return count(config)[what] / 1e6
    except UserError:
        return math.nan


def _value(report: Report, column: str) -> float:
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


def _with_gains(lines: list[Line], ours: str) -> list[Line]:
    """Adds differences in union to every row with experts: to the same method without them, else to RoME.

    Paired examples for one run each, Welch's interval for several.

    Args:
        ours: name of the experiment that is RoME's row in the tables that take it apart.
    """
    if UNION not in lines[0].cells:
        return lines
    trained = [(line, line.config) for line in lines if line.config is not None]
    plain = {(*_group(line), config.method.kind): line for line, config in trained if config.experts is None}
    whole = {line.section: line for line, config in trained if config.name == ours}
    gained = []
    for line in lines:
        config = line.config
        if config is None or config.experts is None:
            gained.append(line)
            continue
        base = plain.get((*_group(line), config.method.kind)) if plain else whole.get(line.section)
        if base is not None and base is not line:
            line = replace(line, gain=_gain(line, base), against=base.label)
        gained.append(line)
    return gained


def _gain(line: Line, base: Line) -> tuple[float, float, float] | None:
    """None where there are too few runs, or runs that were evaluated differently."""
    reports = [report for report in (*line.reports, *base.reports) if not math.isnan(_value(report, UNION))]
    if any(report.settings.get(key) != reports[0].settings.get(key) for report in reports for key in _SAME):
        return None
    ours, theirs = ([report for report in reports if report in each.reports] for each in (line, base))
    if len(ours) == len(theirs) == 1:
        on_examples = paired(ours[0], theirs[0], BALLS)
        return on_examples.value, on_examples.low, on_examples.high
    if len(ours) < 2 or len(theirs) < 2:
        return None
    from scipy.stats import ttest_ind

    a, b = ([_value(report, UNION) for report in each] for each in (ours, theirs))
    difference = statistics.fmean(a) - statistics.fmean(b)
    if statistics.pstdev(a) == statistics.pstdev(b) == 0:
        return difference, difference, difference
    interval = ttest_ind(a, b, equal_var=False).confidence_interval()
    return difference, float(interval.low), float(interval.high)
