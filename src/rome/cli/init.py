"""``rome init``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rome.cli import options
from rome.cli.app import app
from rome.core.console import say


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="Folder for the copies.")] = Path("experiments"),
    patterns: Annotated[
        list[str] | None, typer.Argument(metavar="[PATTERN]...", help="Copy only these: 'table4', 'digits/rome-*'.")
    ] = None,
    overwrite: options.Overwrite = False,
) -> None:
    """Copy the experiments that come with rome, to edit them. `rome train experiments/...` works without a copy."""
    from rome.runs.experiments import copy_to

    copies = copy_to(folder, patterns or ["*"], overwrite)
    first = next(copy for copy in copies if not copy.name.startswith("_"))
    say(f"{len(copies)} files in {folder}\nnext: rome train {first}")
