"""``rome check``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from rome.cli import options
from rome.cli.app import app
from rome.core.errors import UserError
from rome.core.trust import opens_files


@app.command()
@opens_files
def check(
    config: Annotated[Path, typer.Argument(help="YAML file, such as experiments/digits/rome-random.yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="Changes to the config, such as attack.steps=5."),
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", min=0, help="Memory of the GPU to train on; this GPU's if not given.")
    ] = None,
    as_json: options.Json = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Check a config without training: what it resolves to, what it costs, and what is missing to train it here.

    The exit code is 2 if it cannot be trained here.
    """
    import yaml

    from rome.report.check import check as check_config
    from rome.report.check import lines
    from rome.runs.config import load

    found = check_config(load(config, overrides or ()), None if memory is None else memory * 1e9)
    if as_json:
        facts = {"config": found.config.dump(), "cost": found.cost, "missing": found.missing, "remarks": found.remarks}
        print(json.dumps(facts))
    else:
        print(yaml.safe_dump(found.config.dump(), sort_keys=False, allow_unicode=True, default_flow_style=None), end="")
        for line in lines(found):  # as comments, so that the output is a valid config
            print(f"# {line}")
    if found.missing:
        raise UserError("this config cannot be trained here:\n" + "\n".join(f"- {each}" for each in found.missing))
