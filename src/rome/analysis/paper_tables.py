"""The paper's tables, filled from runs: our numbers beside the paper's.

A row of a table is an experiment that comes with rome. A run belongs to a row if it trains the same way: same method,
kind of attack, experts and, where a table compares architectures, model. So a small run on another data set fills the
same row as the full one, and the caption says what the runs are.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rome.analysis.compared import paired
from rome.config import Config, load
from rome.errors import UserError, did_you_mean
from rome.evaluating import Report
from rome.evaluation.store import RESULT
from rome.experiments import folder
from rome.runs import Run

LP = ("clean", "L1", "L2", "Linf", "average", "union")
UNSEEN = ("corruptions", "L0", "perceptual", "PPGD", "LPA", "patch", "StAdv", "ReColorAdv", "GMA")
_CASES = {
    "L0": "sparsefool",
    "PPGD": "ppgd",
    "LPA": "lpa",
    "StAdv": "stadv",
    "ReColorAdv": "recoloradv",
    "GMA": "gma",
}
"""Columns of Table 2 -> cases of the suite ``unseen`` under other names."""
COST = ("parameters_M", "GMACs", "seconds_per_update", "latency_ms")

_PGD = ("random", "avg", "max", "msd", "rome-random", "rome-max")
_PGD_AND_MORE = (*_PGD[:4], "more", *_PGD[4:])
_APGD = ("random", "max", "eat", "ramp", "rome-random", "rome-max")


def _both(place: str, pgd: Sequence[str] = _PGD, apgd: Sequence[str] = _APGD) -> list[str]:
    return [*(f"{place}/{name}-pgd" for name in pgd), *(f"{place}/{name}-apgd" for name in apgd)]


_PERCEPTUAL = ("pat", "vr", "rome-pat", "rome-vr")
_TWO = ("random", "max", "rome-random", "rome-max")
_OURS = "table1/rome-random-pgd"
_TUNED = ("eat", "rome-eat", "max", "rome-max", "ramp", "rome-ramp")

TABLES: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {
    "1": (
        LP,
        {
            "CIFAR-10": _both("table1", _PGD_AND_MORE),
            "ImageNet-100": _both("table1/imagenet100", _PGD_AND_MORE),
        },
    ),
    "2": (
        UNSEEN,
        {"CIFAR-10": [*_both("table1", _PGD_AND_MORE), *(f"table2/{name}" for name in _PERCEPTUAL)]},
    ),
    "3": (
        ("clean", "union"),
        {
            title: [f"fine-tuning/{place}/{name}" for name in _TUNED]
            for place, title in {
                "vit-b": "ViT-B (CIFAR-10)",
                "wrn-28-10": "WRN-28-10 (CIFAR-10)",
                "wrn-94-16": "WRN-94-16 (CIFAR-10)",
                "xcit-s": "XCiT-S (ImageNet-1K)",
            }.items()
        },
    ),
    "4": (
        LP,
        {
            "Low-rank experts": ["table4/ffn", "table4/adapter", _OURS],
            "Dual-scale gating": [
                *(f"table4/{name}" for name in ("uniform", "local", "global", "inverted", "learned", "cls")),
                _OURS,
            ],
            "Gating diversification": [
                *(f"table4/{name}" for name in ("no-regularization", "load-balancing", "importance", "classification")),
                *("table4/no-projection", "table4/three-experts", _OURS),
            ],
        },
    ),
    "5": (LP, {"RoME+RANDOM, PGD": ["table5/random", "table5/inverse", "table5/none", _OURS]}),
    "6": (COST, {"ViT-B": ["table6/random", "table6/more", "table6/moe-ffn", "table6/rome"]}),
    "A1": (LP, {"DeiT-B": _both("tableA1/deit-b"), "Swin-B": _both("tableA1/swin-b")}),
    "A2": (
        LP,
        {"ImageNet-1K": _both("tableA2", _TWO, _TWO)},
    ),
    "A3": (
        LP,
        {
            attack.upper(): [
                f"table1/random-{attack}",
                f"tableA3/random-experts-{attack}",
                f"table1/max-{attack}",
                f"tableA3/max-experts-{attack}",
                f"table1/rome-random-{attack}",
                f"table1/rome-max-{attack}",
            ]
            for attack in ("pgd", "apgd")
        },
    ),
    "A4": (
        LP,
        {
            "Layers": [
                *("tableA4/qkv", "tableA4/out", "tableA4/ffn", _OURS),
                *("tableA4/qkv-ffn", "tableA4/out-ffn", "tableA4/qkv-out-ffn"),
            ]
        },
    ),
    "A5": (
        LP,
        {"Distances": ["table4/no-regularization", "tableA5/cosine", "tableA5/kl", "tableA5/wasserstein", _OURS]},
    ),
}
"""Table -> its columns and, section by section, the experiments that are its rows, in the paper's order."""


@dataclass(frozen=True)
class Cell:
    """One number: the paper's and ours, as shares of 1 (costs in their own units); NaN where there is none."""

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
    config: Config
    """Of the experiment that defines the row."""
    cells: dict[str, Cell]
    reports: tuple[Report, ...] = ()
    gain: tuple[float, float, float] | None = None
    """Union minus that of the same method without experts, with its 95% interval; shares."""


def fill(table: str, runs: Sequence[Path]) -> list[Line]:
    """The rows of a table, filled with the finished evaluations of runs.

    Args:
        table: ``1`` to ``6``, ``A1`` to ``A5``.
        runs: folders of evaluated runs; several of one row (seeds) are joined.

    Raises:
        UserError: no such table, a folder that is no run, or a run that belongs to no row.
    """
    if table.upper() not in TABLES:
        raise UserError(f"no table {table!r}.{did_you_mean(table, TABLES)}")
    columns, sections = TABLES[table.upper()]
    given = [(Run(path), Run(path).config) for path in runs]
    used: set[Path] = set()
    lines = []
    for section, experiments in sections.items():
        for config in [load(folder() / f"{name}.yaml") for name in experiments]:
            members = [run for run, own in given if same_row(own, config, models=table.upper() in ("3", "A1"))]
            used |= {run.folder for run in members}
            reports = [
                report for run in members if (report := _report(run, config.evaluation.routing, columns)) is not None
            ]
            lines.append(_line(section, config, columns, reports))
    left = [str(run.folder) for run, _ in given if run.folder not in used]
    if left:
        raise UserError(
            f"{left[0]} trains like no row of table {table} (method, kind of attack, experts); leave it out"
        )
    return _with_gains(with_best(lines))


def sources(lines: Sequence[Line]) -> str:
    """What the runs of a table are: data, model, examples and suite of each kind of evaluation."""
    told: dict[str, None] = {}
    for report in (report for line in lines for report in line.reports):
        config = (report.settings.get("provenance") or {}).get("config") or {}
        data, model = (
            config.get("data", {}).get("kind", "unknown data"),
            config.get("model", {}).get("name", "unknown model"),
        )
        what = f"{model} on {data}, {report.n} examples, suite {report.settings.get('suite', {}).get('kind', '')}"
        told[what] = None
    return "; ".join(told)


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


def _report(run: Run, routing: str, columns: Sequence[str]) -> Report | None:
    """The run's evaluation with these gates: with most of the columns, AutoAttack's before others, most examples."""
    found = []
    for result in sorted((run.folder / "evaluation").glob(f"*/{RESULT}")):
        report = Report.load(result.parent)
        if (report.settings.get("provenance") or {}).get("routing", "learned") == routing:
            found.append(report)

    def rank(report: Report) -> tuple[int, bool, int]:
        known = sum(not math.isnan(_value(report, column)) for column in columns)
        return known, "autoattack" in str(report.settings["suite"]), report.n

    return max(found, key=rank, default=None)


def _line(section: str, config: Config, columns: Sequence[str], reports: Sequence[Report]) -> Line:
    assert config.paper is not None
    cells = {}
    for column in columns:
        paper = config.paper.numbers.get(column, math.nan) / (1 if columns is COST else 100)
        values = [value for report in reports if not math.isnan(value := _value(report, column))]
        cells[column] = Cell(paper, tuple(values))
    return Line(section, config.paper.row, config, cells, tuple(reports))


def _value(report: Report, column: str) -> float:
    if column in ("clean", "average", "union"):
        return float(getattr(report, column))
    case = _CASES.get(column, column)
    return report.robust.get(case, report.groups.get(case, math.nan))


def with_best(lines: list[Line], *, least: bool = False) -> list[Line]:
    """Marks the best of our numbers, as printed, in every column of a section and kind of attack.

    Args:
        least: the smallest is the best, of a section whatever the attack.
    """

    def shown(cell: Cell) -> float:
        return -float(f"{cell.mean:.4g}") if least else round(cell.mean, 3)

    def key(line: Line, column: str) -> tuple[str, ...]:
        return (line.section, column) if least else (*_group(line), column)

    top: dict[tuple[str, ...], float] = {}
    for line in lines:
        for column, cell in line.cells.items():
            if cell.values:
                top[key(line, column)] = max(top.get(key(line, column), -math.inf), shown(cell))
    return [
        replace(
            line,
            cells={
                column: replace(cell, best=bool(cell.values) and shown(cell) == top[key(line, column)])
                for column, cell in line.cells.items()
            },
        )
        for line in lines
    ]


def _group(line: Line) -> tuple[str, str]:
    return line.section, line.config.method.own_attack or line.config.attack.kind


def _with_gains(lines: list[Line]) -> list[Line]:
    """Adds what experts change in union: paired examples for one run each, Welch's interval for several."""
    plain = {(*_group(line), line.config.method.kind): line for line in lines if line.config.experts is None}
    gained = []
    for line in lines:
        base = plain.get((*_group(line), line.config.method.kind))
        if line.config.experts is not None and base is not None:
            line = replace(line, gain=_gain(line, base))
        gained.append(line)
    return gained


def _gain(line: Line, base: Line) -> tuple[float, float, float] | None:
    ours = [r.union for r in line.reports if not math.isnan(r.union)]
    theirs = [r.union for r in base.reports if not math.isnan(r.union)]
    if len(ours) == len(theirs) == 1:
        a, b = line.reports[0], base.reports[0]
        if a.settings.get("data") == b.settings.get("data"):
            on_examples = paired(a, b)
            return on_examples.value, on_examples.low, on_examples.high
    if len(ours) < 2 or len(theirs) < 2:
        return None
    from scipy.stats import ttest_ind

    difference = statistics.fmean(ours) - statistics.fmean(theirs)
    if statistics.pstdev(ours) == statistics.pstdev(theirs) == 0:
        return difference, difference, difference
    interval = ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    return difference, float(interval.low), float(interval.high)
