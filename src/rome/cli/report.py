"""``rome report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rome.cli import options
from rome.cli.app import app
from rome.cli.options import names_in
from rome.core.console import say
from rome.core.trust import opens_files


@app.command()
@opens_files
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Evaluated runs, evaluations of other models, or folders that contain these.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for report.md, report.html and report.csv.")] = Path("report"),
    suite: Annotated[
        str | None, typer.Option(help="Which evaluation to use if there are several, such as unseen or unseen-500.")
    ] = None,
    union: Annotated[
        list[str] | None, typer.Option(help="Add a column for the union over these cases, such as L1,Linf. Repeatable.")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="The run to compare all others with; the best one if not given.")
    ] = None,
    robustbench: Annotated[
        bool, typer.Option("--robustbench", help="Also write RobustBench's model_info JSON files.")
    ] = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Compare evaluated runs and models: print a table, and write Markdown and an HTML page with pictures."""
    from rome.report.page import write_report

    unions = [names_in(names) for names in union or ()]
    say(f"open {write_report(runs, out, suite=suite, unions=unions, robustbench=robustbench, base=base)}")
