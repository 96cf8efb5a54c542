"""``rome table``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rome.cli import options
from rome.cli.app import app
from rome.core.console import say
from rome.core.errors import UserError
from rome.core.trust import opens_files


@app.command()
@opens_files
def table(
    number: Annotated[str, typer.Argument(help="Number of the table in the paper: 1 to 6 or A1 to A5.")],
    runs: Annotated[
        list[str] | None,
        typer.Argument(
            help="Evaluated runs or models; several seeds share a row. For Table 6: configs or runs, then key=value."
        ),
    ] = None,
    form: Annotated[
        Literal["text", "markdown", "latex", "html"], typer.Option("--format", help="Format of the output.")
    ] = "text",
    filled: Annotated[bool, typer.Option("--filled", help="Only the rows that have a number from your runs.")] = False,
    timing: Annotated[bool, typer.Option(help="Table 6: also measure seconds per update and latency.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Table 6: timed updates; their median is reported.")] = 3,
    trust_code: options.TrustCode = False,
) -> None:
    """Print one of the paper's tables with your runs' numbers beside the paper's.

    Table 6 is measured by this command, for all configs in turn: rome table 6 experiments/table6/*.yaml device=cuda
    """
    from rome.report.tables.cost_table import fill_costs, named_configs
    from rome.report.tables.paper_tables import fill
    from rome.report.tables.table_formats import render

    about = ""
    if number == "6":
        lines, about = fill_costs(named_configs(runs or []), repeats=repeats, timing=timing)
    else:
        lines = fill(number, [Path(run) for run in runs or []])
    if filled:
        lines = [line for line in lines if line.measured]
    if not runs:
        what = "configs or runs to measure, such as experiments/table6/*.yaml" if number == "6" else "evaluated runs"
        say(f"only the paper's numbers are shown; to add yours, name {what}: rome table {number} ...")
    if not lines:
        raise UserError("--filled leaves no row: name runs")
    print(render(f"Table {number.upper()}", lines, form, about=about), end="")
