"""``rome explore``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rome.cli import options
from rome.cli.app import app
from rome.core.console import say
from rome.core.trust import opens_files


@app.command()
@opens_files
def explore(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN [RUN2]", help="A finished run, or two to compare.")],
    host: Annotated[str, typer.Option(help="Address to listen on; any other address lets other machines connect.")] = (
        "127.0.0.1"
    ),
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on; the first free one from 7860 if not given.")
    ] = None,
    device: options.Device = None,
    trust_code: options.TrustCode = False,
) -> None:
    """Explore a run in the browser: attack an image and see the prediction, perturbation, expert maps and gates."""
    from rome.report.explore import open_explorers

    explorers = open_explorers(runs, device)
    from rome.report.explore.page import serve  # needs Gradio; a wrong folder is reported first

    serve(explorers, host, port, say)
