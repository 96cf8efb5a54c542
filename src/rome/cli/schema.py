"""``rome schema``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rome.cli.app import app
from rome.cli.options import names_in
from rome.core.console import say


@app.command()
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; standard output if not given.")] = None,
    imports: Annotated[
        str | None, typer.Option(help="Your own Python modules, such as a,b, whose attacks, methods ... to include.")
    ] = None,
) -> None:
    """Write a JSON schema of configs, with which editors complete and check YAML files."""
    from rome.core.files import replace_file
    from rome.runs.schema import schema as make_schema
    from rome.runs.schema import written

    text = written(make_schema(names_in(imports)))
    if out is None:
        print(text, end="")
        return
    replace_file(out, text.encode())
    say(f"{out}\nnext: name it in the first line of a config: # yaml-language-server: $schema={out}")
