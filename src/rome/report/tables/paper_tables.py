"""The paper's tables, filled from runs: our numbers beside the paper's.

A row of a table is an experiment that comes with rome. A run belongs to a row if it trains the same way: with the same
method, kind of attack, experts and, in tables that compare architectures, model. If a table has the same training on
several data sets, a run fills only the rows of its own data set. Runs that differ only in the seed and were evaluated
alike are averaged; other runs of the same row get a line each. The paper's numbers are shown only beside runs with the
paper's model, data and budgets; other runs get sections of their own. Models without a run, whose training is unknown,
come last.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from rome.core.errors import UserError, did_you_mean
from rome.evaluation.result import UNION
from rome.report.compared import is_preferred
from rome.report.cost import count
from rome.report.evaluated import LEARNED, Evaluated, Key, evaluations, is_evaluation, load_evaluation
from rome.report.seeds import apart_from_seed
from rome.report.subject import distinct, names_of
from rome.report.tables.lines import SAME, Cell, Line, add_gains, mark_best, value_of
from rome.report.tables.paper_rows import BY_MODEL, SIZE, TABLES, UNITS
from rome.runs.config import Config, load
from rome.runs.experiments import folder
from rome.runs.folder import Run
from rome.threats import LpBall

GIVEN = "Given models"
"""Section of the models without a run."""
Shown = list[Evaluated]
"""The evaluations of one model that supply a row's cells, the preferred one first."""


def fill(table: str, runs: Sequence[Path]) -> list[Line]:
    """Return the rows of a table, filled with the finished evaluations of runs.

    If a run has several evaluations, the preferred one has the most columns of the table; then the suite and number of
    examples that most runs share, so that rows are comparable; then AutoAttack; then the most examples. Columns of
    Table 2, which are independent of each other, may also come from the run's other evaluations on as many examples.

    Args:
        table: ``1`` to ``6``, ``A1`` to ``A5``.
        runs: folders of evaluated runs, where seeds of one training are averaged, and folders of evaluations of models
            without a run; several evaluations of one model fill one row.

    Raises:
        UserError: an unknown table, a folder that is not a run, a run that matches no row or has no evaluation of its
            current weights, or two runs of one training with the same seed.
    """
    number = table.upper()
    if number not in TABLES:
        raise UserError(f"no table {table!r}.{did_you_mean(table, TABLES)}")
    columns, sections = TABLES[number]
    rows = [(section, load(folder() / f"{name}.yaml")) for section, names in sections.items() for name in names]
    folders = distinct(runs) if runs else []
    trained = [Run(path) for path in folders if not is_evaluation(path)]
    members = {run.folder: _rows_of(run, [row for _, row in rows], number) for run in trained}
    models = _by_model([path for path in folders if is_evaluation(path)], columns, number)
    by_run = {run.folder: {k: e for k, e in evaluations(run).items() if _covered(e, columns)} for run in trained}
    shared = Counter(key for each in (*by_run.values(), *models) for key in {(suite, n) for _, suite, n in each})

    def shown(found: Mapping[Key, Evaluated], routing: str) -> Shown:
        """Return the evaluations with this routing that supply cells: several only in tables without a union."""

        def rank(key: Key) -> tuple[int, int, bool, int, str]:
            _, suite, n = key
            return _covered(found[key], columns), shared[suite, n], is_preferred(suite), n, suite

        ranked = [found[key] for key in sorted((key for key in found if key[0] == routing), key=rank, reverse=True)]
        return [one for one in ranked if UNION not in columns and one.report.n == ranked[0].report.n] or ranked[:1]

    groups: list[dict[str, list[Shown]]] = [defaultdict(list) for _ in rows]
    for run in trained:
        filled = {i: shown(by_run[run.folder], rows[i][1].evaluation.routing) for i in members[run.folder]}
        if not any(filled.values()):
            raise UserError(_not_evaluated(run.folder, f"rome evaluate {run.folder}", columns, number))
        for i, each in filled.items():
            for one in each:
                one.check_fresh()
            if each:
                groups[i][_group_key(run.config, each)].append(each)
    lines: dict[tuple[int, str], list[Line]] = defaultdict(list)
    for (section, row), alike in zip(rows, groups, strict=True):
        for own, line in _row(section, row, columns, [*alike.values()]):
            lines[len(sections) if own else list(sections).index(section), own].append(line)
    table_lines = [line for key in sorted(lines) for line in lines[key]]
    firsts = [next(iter(each.values())) for each in models]
    names = names_of([one.architecture for one in firsts], [one.folder for one in firsts])
    for name, model in zip(names, models, strict=True):
        table_lines.append(_line(GIVEN, name, None, columns, [shown(model, LEARNED)]))
    mark_best(table_lines)
    add_gains(table_lines)
    return table_lines


def _row(section: str, row: Config, columns: Sequence[str], groups: Sequence[list[Shown]]) -> list[tuple[str, Line]]:
    """Return the lines of one row, each with its :func:`own_section`: one line per group of runs that are averaged, and
    an empty one if no group belongs beside the paper's numbers.

    Raises:
        UserError: two runs of a group have the same seed.
    """
    assert row.paper is not None
    for group in groups:
        for (a, *_), (b, *_) in combinations(group, 2):
            if a.config and b.config and a.config.seed == b.config.seed:
                raise UserError(
                    f"{a.place} and {b.place} are the same training with the same seed, {a.config.seed}, and cannot be "
                    "averaged; leave one out"
                )
    heads = [group[0][0] for group in groups]
    names = names_of([one.name for one in heads], [one.place for one in heads])
    own_sections = [own_section(one.config, row) for one in heads if one.config]
    lines = [] if "" in own_sections else [("", _line(section, row.paper.row, row, columns, []))]
    for name, own, group in zip(names, own_sections, groups, strict=True):
        label = row.paper.row if own_sections.count(own) == 1 else f"{row.paper.row}, {name}"
        lines.append((own, _line(own or section, label, row, columns, group, with_paper=not own)))
    return lines


def own_section(config: Config, row: Config) -> str:
    """Return the section for a run whose architecture, data or budgets differ from those of the paper's row; empty if
    they are the same. The weights that training starts from make no difference."""

    def setting(of: Config) -> tuple[Any, ...]:
        model = of.model.name.partition(".")[0], of.model.img_size, of.model.patch_size, of.model.args
        return *model, of.data.kind, getattr(of.data, "classes", None), of.threats

    if setting(config) == setting(row):
        return ""
    budgets = [f"{each.name} {each.eps:.4g}" if isinstance(each, LpBall) else each.name for each in config.threats]
    return f"Own runs: {config.model.name} on {config.data.kind} ({', '.join(budgets)})"


def _group_key(config: Config, shown: Shown) -> str:
    """Key shared by runs whose numbers may be averaged: all settings but the seed, and how they were evaluated."""
    evaluated = [{key: one.report.settings.get(key) for key in SAME} | {"n": one.report.n} for one in shown]
    return json.dumps([apart_from_seed(config), evaluated], sort_keys=True, default=str)


def _by_model(paths: Sequence[Path], columns: Sequence[str], number: str) -> list[dict[Key, Evaluated]]:
    """Return the evaluations in these folders, grouped by model.

    Models are identified by name, state and code, and have a row for each set of budgets. A function has no hash, so
    it counts as a different model in every folder.

    Raises:
        UserError: an evaluation is not finished, has none of the columns, or has the same model, budgets, suite and
            number of examples as another.
    """
    models: dict[str, dict[Key, Evaluated]] = defaultdict(dict)
    for path in paths:
        one = load_evaluation(path)
        if not _covered(one, columns):
            raise UserError(_not_evaluated(path, one.command, columns, number))
        settings, key = one.report.settings, (LEARNED, one.report.suite, one.report.n)
        state = settings["model"]["sha256"] or str(path.resolve())
        own = models[json.dumps([one.architecture, state, settings["model"], settings.get("threats")], sort_keys=True)]
        if key in own:
            raise UserError(
                f"{own[key].folder} and {path} are both evaluations of {one.architecture} by suite {key[1]} "
                f"on {key[2]} examples, but a row shows only one; leave the other out"
            )
        own[key] = one
    return list(models.values())


def _not_evaluated(path: Path, command: str, columns: Sequence[str], number: str) -> str:
    suite = "" if UNION in columns else " --suite unseen,corruptions"
    return (
        f"{path} has no finished evaluation with a column of table {number}; "
        f"run `{command}{suite}` first, or leave it out"
    )


def _rows_of(run: Run, rows: Sequence[Config], number: str) -> list[int]:
    """Return the indices of the rows that a run fills.

    Raises:
        UserError: there are none.
    """
    config, models = run.config, number in BY_MODEL
    matching = [i for i, row in enumerate(rows) if same_row(config, row, models=models)]
    if not matching:
        what = "method, kind of attack, experts and model" if models else "method, kind of attack and experts"
        raise UserError(f"{run.folder} matches no row of table {number} in {what}; leave it out")
    kinds = [rows[i].data.kind for i in matching]
    kind = config.data.kind if config.data.kind in kinds else kinds[0]
    return [i for i in matching if rows[i].data.kind == kind]


def same_row(run: Config, row: Config, *, models: bool = False) -> bool:
    """Whether a run trains like the experiment of a row; with ``models``, the model must be the same too."""
    same = run.method == row.method and (run.method.own_attack or run.attack.kind == row.attack.kind)
    return bool(same and _experts(run) == _experts(row) and (not models or run.model.name == row.model.name))


def _experts(config: Config) -> dict[str, Any] | None:
    settings = None if config.experts is None else config.experts.dump()
    if settings and settings.get("layers") == ["qkv", "proj"]:  # what None selects in a transformer
        settings["layers"] = None
    return settings


def _covered(one: Evaluated, columns: Sequence[str]) -> int:
    """Number of the columns that an evaluation has."""
    return sum(not math.isnan(value_of(one.report, column)) for column in columns if column not in UNITS)


def _line(
    section: str,
    label: str,
    row: Config | None,
    columns: Sequence[str],
    shown: Sequence[Shown],
    *,
    with_paper: bool = True,
) -> Line:
    """Return a row with the values of each of its runs, taken from the run's first evaluation that has the column."""
    numbers = row.paper.numbers if with_paper and row is not None and row.paper is not None else {}
    cells = {}
    for column in columns:
        values = [value for own in shown if not math.isnan(value := _value(own, column))]
        paper = numbers.get(column, math.nan) / (1 if column in UNITS else 100)
        cells[column] = Cell(paper, tuple(sorted(set(values)) if column in SIZE else values))
    others = tuple(one.report for own in shown for one in own[1:])
    return Line(section, label, row, cells, tuple(own[0].report for own in shown), others)


def _value(own: Shown, column: str) -> float:
    """Return a run's value in a column, from the first evaluation that has it; sizes are in millions.

    NaN if there is none: sizes are unknown for a model without a run, and if the data, which give the number of
    classes, cannot be read.
    """
    if column not in SIZE:
        return next((value for one in own if not math.isnan(value := value_of(one.report, column))), math.nan)
    config = own[0].config
    try:
        return math.nan if config is None else count(config)[SIZE[column]] / 1e6
    except UserError:
        return math.nan
