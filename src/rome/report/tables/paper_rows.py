"""The paper's tables as data (``tables.yaml``): columns, sections, and the experiments that are their rows."""

from __future__ import annotations

from pathlib import Path

from rome.core.plain_data import parse_yaml

BALLS = ("L1", "L2", "Linf")
"""Cases whose mean and union the paper reports, whatever else the suite includes."""
CASES = {"L0": "sparsefool", "PPGD": "ppgd", "LPA": "lpa", "StAdv": "stadv", "ReColorAdv": "recoloradv", "GMA": "gma"}
"""Columns of Table 2 -> the corresponding cases of the suite ``unseen``."""
COST = ("parameters_M", "GMACs", "seconds_per_update", "latency_ms", "latency_one_ms")
"""Columns of Table 6: those of the paper, and the latency of a single image, which the paper does not give."""
SIZE = {"parameters_M": "parameters", "added_parameters_M": "experts"}
"""Columns of Tables A3 and A4 with parameter counts -> their keys in :func:`rome.report.cost.count`."""
UNITS = {*COST, *SIZE}
"""Columns that are not percentages."""
OURS = "rome-random-pgd"
"""Name of the experiment that is RoME's row in the ablation tables."""
BY_MODEL = ("3", "A1")
"""Tables that compare architectures."""
TABLES: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {
    number: (tuple(table["columns"]), table["rows"])
    for number, table in parse_yaml(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8")).items()
}
"""Table -> its columns, and section -> the experiments that are its rows, in the paper's order."""
