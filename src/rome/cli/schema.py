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
    out: Annotated[Path | None, typer.Option(help="The file to write; standard output if not given.")] = None,
    imports: Annotated[
        str | None, typer.Option(help="Python modules of your own whose attacks, methods ... it is to name: a,b.")
    ] = None,
) -> None:
    """Write a JSON schema of configs, from which editors complete and check YAML files."""
    from rome.core.files import replace_file
    from rome.runs.schema import schema as found
    from rome.runs.schema import written

    text = written(found(names_in(imports)))
    if out is None:
        print(text, end="")
        return
    replace_file(out, text.encode())
    say(f"{out}\nnext: name it in the first line of a config: # yaml-language-server: $schema={out}")
