"""``rome cost``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from rome.cli import options
from rome.cli.app import app
from rome.core.errors import UserError
from rome.core.trust import opens_files


@app.command()
@opens_files
def cost(
    configs: Annotated[list[str], typer.Argument(metavar="CONFIG... [key=value]...", help="YAML files, then changes.")],
    timing: Annotated[bool, typer.Option(help="Also measure seconds per update and latency.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Number of timed updates; their median is reported.")] = 3,
    layers: Annotated[bool, typer.Option("--layers", help="Only list the layers that would get experts.")] = False,
    as_json: options.Json = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Show parameters, multiply-accumulates, memory, seconds per update and latency of configs (Table 6).

    Several configs are timed in turn, so that the load of the machine affects them alike.
    """
    from rome.report.cost import compare, plan, show_costs, show_plan
    from rome.runs.config import files_and_changes, load

    files, overrides = files_and_changes(configs)
    if not files or (layers and len(files) > 1):
        raise UserError("name a config, such as experiments/table1/rome-random-pgd.yaml; --layers takes only one")
    loaded = [load(file, overrides) for file in files]
    if layers:
        found = plan(loaded[0])
        print(json.dumps(found)) if as_json else show_plan(found)
        return
    facts = compare(loaded, repeats=repeats, timing=timing, memory=True)
    if as_json:
        print(json.dumps(facts if len(facts) > 1 else facts[0]))
    else:
        show_costs(facts)
