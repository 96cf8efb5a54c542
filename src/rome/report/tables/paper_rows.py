"""The paper's tables as data (``tables.yaml``): columns, sections, and the experiments that are their rows."""

from __future__ import annotations

from pathlib import Path

from rome.core.plain_data import parse_yaml

BALLS = ("L1", "L2", "Linf")
"""The cases whose mean and union the paper reports, whatever else a suite attacked with."""
CASES = {"L0": "sparsefool", "PPGD": "ppgd", "LPA": "lpa", "StAdv": "stadv", "ReColorAdv": "recoloradv", "GMA": "gma"}
"""Columns of Table 2 -> cases of the suite ``unseen`` under other names."""
COST = ("parameters_M", "GMACs", "seconds_per_update", "latency_ms", "latency_one_ms")
"""The columns of Table 6: the paper's, and the latency of one image alone, which it does not give."""
SIZE = {"parameters_M": "parameters", "added_parameters_M": "experts"}
"""Columns of Tables A3 and A4 that are counted -> what :func:`rome.report.cost.count` calls them."""
UNITS = {*COST, *SIZE}
"""Columns that are no percentages."""
OURS = "rome-random-pgd"
"""Name of the experiment that is RoME's row in the tables that take it apart."""
BY_MODEL = ("3", "A1")
"""Tables that compare architectures."""
TABLES: dict[str, tuple[tuple[str, ...], dict[str, list[str]]]] = {
    number: (tuple(table["columns"]), table["rows"])
    for number, table in parse_yaml(Path(__file__).with_name("tables.yaml").read_text(encoding="utf-8")).items()
}
"""Table -> its columns and, section by section, the experiments that are its rows, in the paper's order."""
