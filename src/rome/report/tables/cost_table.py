"""The paper's Table 6, measured: costs of its rows on this machine, all in one process and timed in turn."""

from __future__ import annotations

import math
import operator
import statistics
from collections.abc import Sequence
from pathlib import Path

from rome.core import trust
from rome.core.errors import UserError
from rome.report.cost import RATIOS, compare
from rome.report.tables.lines import Cell, Line, mark_best
from rome.report.tables.paper_tables import fill, own_section, same_row
from rome.runs.config import Config, files_and_changes, load
from rome.runs.folder import Run

_SHARED = (
    *("batch_size", "accumulate", "precision", "compile", "device", "data.kind", "attack", "threats"),
    *("model.name", "model.img_size", "model.patch_size", "model.args"),
)
"""Settings that all configs must share, or their costs would not compare methods."""


def named_configs(names: Sequence[str]) -> list[Config]:
    """Load the configs of YAML files and run folders, with the overrides ``key=value`` among ``names`` applied.

    Raises:
        UserError: a name is neither a file nor a folder, or a config is invalid.
    """
    paths, changes = files_and_changes(names)
    configs = []
    for path in map(Path, paths):
        if path.is_dir():  # a config inside a folder, not one that the user chose
            trust.check(Run(path).config_file, {"config": Run(path).written()})
            path = Run(path).config_file
        configs.append(load(path, changes))
    return configs


def fill_costs(configs: Sequence[Config], *, repeats: int = 3, timing: bool = True) -> tuple[list[Line], str]:
    """Return the rows of Table 6 filled with the costs of these configs, and a sentence on how they were measured.

    Configs are matched to rows as runs are (:mod:`rome.report.tables.paper_tables`), in a section of their own if the
    model or data are not the paper's. Ratios are to the first row, RANDOM; those of seconds and latency are medians
    over the rounds of timing.

    Args:
        repeats, timing: see :func:`rome.report.cost.compare`.

    Raises:
        UserError: a config that matches no row, or configs that differ in more than the table compares.
    """
    lines = ours = fill("6", [])
    first_row = lines[0].config
    assert first_row is not None
    rows = [_row_of(config, configs[0], lines) for config in configs]
    if configs and (section := own_section(configs[0], first_row)):
        ours = [Line(section, line.label, line.config, {each: Cell(math.nan) for each in line.cells}) for line in lines]
    order = sorted(range(len(configs)), key=rows.__getitem__)  # compare() takes ratios to the first
    costs = compare([configs[i] for i in order], repeats=repeats, timing=timing) if configs else []
    for facts in costs:
        facts |= {"parameters_M": facts["parameters"] / 1e6, "GMACs": facts["macs"] / 1e9}
    for line in lines:
        for column, cell in line.cells.items():
            cell.paper_ratio = cell.paper / lines[0].cells[column].paper
    first = ours[0].cells
    for row, line in enumerate(ours):
        own = [facts for i, facts in zip(order, costs, strict=True) if rows[i] == row]
        for column, cell in line.cells.items():
            cell.values = tuple(facts[column] for facts in own if column in facts)
            if cell.values and first[column].values:
                ratios = [facts[RATIOS[column]][0] for facts in own] if column in RATIOS else []
                cell.ratio = statistics.fmean(ratios) if ratios else cell.mean / first[column].mean
    mark_best(ours)
    if ours is not lines:
        lines = [*lines, *(line for line in ours if line.measured)]
    if not configs:
        return lines, ""
    about = f"ours: {configs[0].model.name} on {configs[0].data.kind}"
    if timing:
        facts = costs[0]
        per = f"latency per image in batches of {facts['latency_batch']}"
        about += f", updates of {facts['batch_size']} images, {per}, {facts['device']}, timed in turn"
    return lines, about


def _row_of(config: Config, first: Config, lines: Sequence[Line]) -> int:
    """Return the index of the row that ``config`` trains like; its settings must be comparable with ``first``."""
    for key in _SHARED:
        a, b = (operator.attrgetter(key)(each) for each in (first, config))
        if a != b:
            raise UserError(
                f"costs with different {key} cannot be compared ({first.name} {a}, {config.name} {b}); set one value "
                f"for all: {key}=..."
            )
    for row, line in enumerate(lines):
        if line.config is not None and same_row(config, line.config):
            return row
    raise UserError(f"{config.name} matches no row of table 6 in method, kind of attack and experts; leave it out")
