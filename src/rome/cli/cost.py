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
    timing: Annotated[bool, typer.Option(help="Measure seconds per update and latency too.")] = True,
    repeats: Annotated[int, typer.Option(min=1, help="Timed updates; the median counts.")] = 3,
    layers: Annotated[bool, typer.Option("--layers", help="Only say which layers get experts; a dry run.")] = False,
    as_json: options.Json = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Parameters, multiply-accumulates, memory, seconds per update and latency of configs (Table 6), timed in turn."""
    from rome.report.cost import compare, plan, show_costs, show_plan
    from rome.runs.config import files_and_changes, load

    files, overrides = files_and_changes(configs)
    if not files or (layers and len(files) > 1):
        raise UserError("name one config, such as experiments/table1/rome-random-pgd.yaml, or several to compare")
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
