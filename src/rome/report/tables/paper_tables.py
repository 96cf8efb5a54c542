"""The paper's tables, filled from runs: our numbers beside the paper's.

A row of a table is an experiment that comes with rome. A run belongs to a row if it trains the same way: same method,
kind of attack, experts and, where a table compares architectures, model. Where a table has the same training on several
data sets, a run fills the rows of its own. Runs that differ in the seed alone, evaluated alike, are joined; others that
train like one row get a line each. The paper's numbers stand beside runs on its data and budgets alone; the others get
sections of their own. Models that no run made were trained nobody knows how: they get rows of their own, at the end.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rome.core.errors import UserError, did_you_mean
from rome.core.files import flatten
from rome.evaluation.evaluate import Report
from rome.evaluation.store import RESULT
from rome.report.compared import PREFERRED_SUITES
from rome.report.cost import count
from rome.report.evaluated import Evaluated, is_evaluation, load_evaluation
from rome.report.subject import names_of
from rome.report.tables.lines import SAME, Cell, Line, value_of, with_best, with_gains
from rome.report.tables.paper_rows import BY_MODEL, OURS, SIZE, TABLES, UNITS, UNSEEN
from rome.runs.config import Config, load
from rome.runs.experiments import folder
from rome.runs.folder import FREE_KEYS, Run
from rome.threats import LpBall

GIVEN = "Given models"
"""Section of the models that no run made."""
LEARNED = "learned"
"""Gate weights of an evaluation that says nothing of them."""


def fill(table: str, runs: Sequence[Path]) -> list[Line]:
    """The rows of a table, filled with the finished evaluations of runs.

    Args:
        table: ``1`` to ``6``, ``A1`` to ``A5``.
        runs: folders of evaluated runs; seeds of one run are joined. And folders of evaluations of given
            models; several of one model fill one row, as several of a run do.

    Of a run's evaluations that is taken which has most of the columns; then the suite and number of examples that most
    of the runs have, so that rows can be compared; then AutoAttack's; then the one on most examples. What it lacks of
    Table 2, whose columns stand each for itself, is taken from others on as many examples.

    Raises:
        UserError: no such table, a folder that is no run, a run that belongs to no row, or one without an evaluation of
            its present weights; or two runs of one training with one seed.
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
    placed: list[tuple[int, str, Line]] = []
    order, used = list(sections), set()
    for (section, row), own in zip(rows, members, strict=True):
        assert row.paper is not None
        alike: dict[str, list[tuple[Run, list[Report]]]] = {}
        for run in own:
            shown = _shown(found[run.folder], row.evaluation.routing, columns, shared)
            if shown:
                for report in shown:
                    Evaluated(name="", folder=run.folder, report=report, run=run, config=run.config).check_fresh()
                used.add(run.folder)
                alike.setdefault(_alike(run.config, shown), []).append((run, shown))
        for first, other in (pair for group in alike.values() for pair in combinations([run for run, _ in group], 2)):
            if first.config.seed == other.config.seed:
                raise UserError(
                    f"{first.folder} and {other.folder} would be joined as two seeds of a training, but have the same "
                    f"seed, {first.config.seed}: leave one out"
                )
        heads = [group[0][0] for group in alike.values()]
        names = names_of([run.config.name for run in heads], [run.folder for run in heads])
        elsewhere = ["" if _setting(run.config) == _setting(row) else _elsewhere(run.config) for run in heads]
        if "" not in elsewhere:
            placed.append((order.index(section), "", _line(section, row.paper.row, row, columns, [], [])))
        for name, where, group in zip(names, elsewhere, alike.values(), strict=True):
            label = row.paper.row if elsewhere.count(where) == 1 else f"{row.paper.row}, {name}"
            reports, configs = [shown for _, shown in group], [run.config for run, _ in group]
            line = _line(section + where, label, row, columns, reports, configs, with_paper=not where)
            placed.append((order.index(section), where, line))
    lines = [line for *_, line in sorted(placed, key=lambda each: each[:2])]  # stable: in the table's order
    for run in (run for own in members for run in own if run.folder not in used):
        raise UserError(_nothing_of(run.folder, f"rome evaluate {run.folder}", columns, number))
    firsts = [place for place, _ in given]
    for name, evaluations in zip(names_of([name for _, name in given], firsts), given.values(), strict=True):
        lines.append(_line(GIVEN, name, None, columns, [_shown(evaluations, LEARNED, columns, shared)], []))
    return with_gains(with_best(lines), OURS.rpartition("/")[2])


def _setting(config: Config) -> tuple[object, ...]:
    """On which data and budgets a run trains and is evaluated."""
    return config.data.kind, getattr(config.data, "classes", None), config.threats


def _elsewhere(config: Config) -> str:
    """Ending of a section's name for runs on data or budgets that are not the paper's."""
    budgets = [
        f"{threat.name} {threat.eps:.4g}" if isinstance(threat, LpBall) else threat.name for threat in config.threats
    ]
    return f": rows on {config.data.kind} ({', '.join(budgets)}), not the paper's"


def _alike(config: Config, reports: Sequence[Report]) -> str:
    """What runs have in common whose numbers may be averaged: all but the seed, and how they were evaluated."""
    free = FREE_KEYS | {"seed"}
    trained = {
        key: value
        for key, value in flatten(config.dump()).items()
        if key.split(".")[0] not in free and key not in ("data.path", "data.download")
    }
    evaluated = [{key: report.settings.get(key) for key in SAME} | {"n": report.n} for report in reports]
    return json.dumps([trained, evaluated], sort_keys=True, default=str)


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
        model = Evaluated(name="", folder=place, report=load_evaluation(place))
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
    return sum(not math.isnan(value_of(report, column)) for column in columns if column not in UNITS)


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
    *,
    with_paper: bool = True,
) -> Line:
    """A row from the evaluations of each of its runs; of several the first that has a column."""
    numbers = config.paper.numbers if with_paper and config is not None and config.paper is not None else {}
    cells = {}
    for column in columns:
        paper = numbers.get(column, math.nan) / (1 if column in UNITS else 100)
        if column in SIZE:
            values = sorted({size for run in runs if not math.isnan(size := _size(run, SIZE[column]))})
        else:
            known = [[value for report in own if not math.isnan(value := value_of(report, column))] for own in reports]
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
