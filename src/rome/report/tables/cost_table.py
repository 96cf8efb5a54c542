"""The paper's Table 6, measured: what its rows cost on this machine, all in one run and timed in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rome.core import trust
from rome.core.errors import UserError
from rome.report.cost import RATIOS, compare
from rome.report.tables.lines import Cell, Line, with_best
from rome.report.tables.paper_rows import COST
from rome.report.tables.paper_tables import fill, same_row
from rome.runs.config import Config, files_and_changes, load
from rome.runs.folder import Run

BASE = "RANDOM"
"""The row that ratios are taken to."""
_SHARED = (
    *("batch_size", "accumulate", "precision", "compile", "device", "data.kind", "attack", "threats"),
    *("model.name", "model.img_size", "model.patch_size", "model.args"),
)
"""Settings that must agree: a cost under another one is no property of the method."""


def named_configs(names: Sequence[str]) -> list[Config]:
    """The configs of YAML files and of runs' folders, with the changes ``key=value`` among the names.

    Raises:
        UserError: one is neither, or a mistake in a config.
    """
    files, changes = files_and_changes(names)
    paths = list(map(Path, files))
    for path in paths:
        if path.is_dir():  # contents of a folder, not a config that a person chose
            trust.check(Run(path).config_file, {"config": Run(path).written()})
    return [load(Run(path).config_file if path.is_dir() else path, changes) for path in paths]


def fill_costs(configs: Sequence[Config], *, repeats: int = 3, timing: bool = True) -> tuple[list[Line], str]:
    """The rows of Table 6 with what these configs cost, and a sentence on how that was measured.

    A config belongs to a row as runs do (:mod:`rome.report.tables.paper_tables`). Ratios are those to the row RANDOM,
    of seconds and latency the medians of the ratios round by round.

    Args:
        repeats, timing: see :func:`rome.report.cost.compare`.

    Raises:
        UserError: a config that belongs to no row, or configs that differ in more than what the table compares.
    """
    lines = fill("6", [])
    if not configs:
        return _with_ratios(lines, {}), ""
    _comparable(configs)
    rows = [
        next((line.label for line in lines if line.config is not None and same_row(config, line.config)), "")
        for config in configs
    ]
    if "" in rows:
        raise UserError(
            f"{configs[rows.index('')].name} trains like no row of table 6 (method, kind of attack, experts); "
            "leave it out"
        )
    order = sorted(range(len(configs)), key=lambda i: rows[i] != BASE)  # ratios are to the first
    facts = compare([configs[i] for i in order], repeats=repeats, timing=timing)
    by_row: dict[str, list[dict[str, Any]]] = {}
    for i, found in zip(order, facts, strict=True):
        by_row.setdefault(rows[i], []).append(found)
    filled = []
    for line in lines:
        measured = [_numbers(found) for found in by_row.get(line.label, [])]
        cells = {
            column: replace(line.cells[column], values=tuple(each[column] for each in measured if column in each))
            for column in COST
        }
        filled.append(replace(line, cells=cells))
    return _with_ratios(with_best(filled, least=True), by_row if BASE in by_row else {}), _about(configs[0], facts[0])


def _comparable(configs: Sequence[Config]) -> None:
    for key in _SHARED:
        values = []
        for config in configs:
            value: Any = config
            for part in key.split("."):
                value = getattr(value, part)
            values.append(value)
        if any(value != values[0] for value in values):
            told = ", ".join(f"{config.name} {value}" for config, value in zip(configs, values, strict=True))
            raise UserError(f"costs under different {key} cannot be compared ({told}); give all the same: {key}=...")


def _numbers(facts: dict[str, Any]) -> dict[str, float]:
    found = {"parameters_M": facts["parameters"] / 1e6, "GMACs": facts["macs"] / 1e9}
    return found | {key: facts[key] for key in RATIOS if key in facts}


def _with_ratios(lines: Sequence[Line], by_row: dict[str, list[dict[str, Any]]]) -> list[Line]:
    """The paper's ratios, and ours where RANDOM was measured too."""
    (base,) = [line for line in lines if line.label == BASE]

    def ours(line: Line, column: str, cell: Cell) -> float:
        if not cell.values or not by_row:
            return math.nan
        if column in RATIOS:
            return statistics.fmean(facts[RATIOS[column]][0] for facts in by_row[line.label])
        return cell.mean / base.cells[column].mean

    return [
        replace(
            line,
            cells={
                column: replace(cell, ratio=ours(line, column, cell), paper_ratio=cell.paper / base.cells[column].paper)
                for column, cell in line.cells.items()
            },
        )
        for line in lines
    ]


def _about(config: Config, facts: dict[str, Any]) -> str:
    what = f"ours: {config.model.name} on {config.data.kind}"
    if "device" not in facts:
        return what
    per = f"latency per image in batches of {facts['latency_batch']}"
    return f"{what}, updates of {facts['batch_size']} images, {per}, {facts['device']}, timed in turn"
