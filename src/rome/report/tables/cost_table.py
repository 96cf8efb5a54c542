"""The paper's Table 6, measured: what its rows cost on this machine, all in one run and timed in turn."""

from __future__ import annotations

import operator
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rome.core import trust
from rome.core.errors import UserError
from rome.report.cost import RATIOS, compare
from rome.report.tables.lines import Line, mark_best
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
    for config in configs:
        _check_comparable(configs[0], config)
    rows = [_row_of(config, lines) for config in configs]
    order = sorted(range(len(configs)), key=lambda i: rows[i] != BASE)  # ratios are to the first
    facts = compare([configs[i] for i in order], repeats=repeats, timing=timing) if configs else []
    measured: dict[str, list[dict[str, Any]]] = {line.label: [] for line in lines}
    for i, found in zip(order, facts, strict=True):
        costs = {"parameters_M": found["parameters"] / 1e6, "GMACs": found["macs"] / 1e9}
        measured[rows[i]].append(found | costs)
    for line in lines:
        for column, cell in line.cells.items():
            cell.values = tuple(each[column] for each in measured[line.label] if column in each)
    base = next(line for line in lines if line.label == BASE).cells
    for line in lines:
        for column, cell in line.cells.items():
            cell.paper_ratio = cell.paper / base[column].paper
            if cell.values and measured[BASE]:
                ratios = [each[RATIOS[column]][0] for each in measured[line.label]] if column in RATIOS else ()
                cell.ratio = statistics.fmean(ratios) if ratios else cell.mean / base[column].mean
    mark_best(lines, least=True)
    return lines, _about(configs[0], facts[0]) if configs else ""


def _row_of(config: Config, lines: Sequence[Line]) -> str:
    """Label of the row that a config trains like."""
    for line in lines:
        if line.config is not None and same_row(config, line.config):
            return line.label
    raise UserError(f"{config.name} trains like no row of table 6 (method, kind of attack, experts); leave it out")


def _check_comparable(first: Config, other: Config) -> None:
    for key in _SHARED:
        a, b = (operator.attrgetter(key)(config) for config in (first, other))
        if a != b:
            raise UserError(
                f"costs under different {key} cannot be compared ({first.name} {a}, {other.name} {b}); give all the "
                f"same: {key}=..."
            )


def _about(config: Config, facts: dict[str, Any]) -> str:
    what = f"ours: {config.model.name} on {config.data.kind}"
    if "device" not in facts:
        return what
    per = f"latency per image in batches of {facts['latency_batch']}"
    return f"{what}, updates of {facts['batch_size']} images, {per}, {facts['device']}, timed in turn"
