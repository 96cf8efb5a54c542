"""``rome figures``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from rome.cli import options
from rome.cli.app import app
from rome.cli.options import names_in
from rome.core.trust import opens_files


@app.command()
@options.names_model
@opens_files
def figures(
    named: dict[str, Any],
    runs: Annotated[list[Path] | None, typer.Argument(help="Finished runs; each is a row or a curve.")] = None,
    only: Annotated[str | None, typer.Option(help="These alone, fig3,figA4; else all there is data for.")] = None,
    form: Annotated[str, typer.Option("--format", help="pdf, png, svg, or several: pdf,png.")] = "pdf,png",
    out: Annotated[Path, typer.Option(help="Folder for pictures and their data.")] = Path("figures"),
    n: Annotated[int, typer.Option(min=8, help="Test images, each natural and under every threat.")] = 256,
    layer: Annotated[str | None, typer.Option(help="Look at the layer whose name holds this; else the last.")] = None,
    image: Annotated[int, typer.Option(min=0, help="Number of the test image in figures of one image.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Of t-SNE and of linear probes.")] = 0,
    device: options.Device = None,
    trust_code: options.TrustCode = False,
) -> None:
    """The paper's figures for runs of any method and for any model, each with its data as JSON and CSV beside it."""
    from rome.evaluation.named import named_config
    from rome.report.figures import Options, write_figures
    from rome.report.subject import open_named

    config = named_config(named, *(runs or ())[:1])
    shown = [*(runs or ()), *([] if config is None else [open_named(config, device)])]
    chosen = Options(n=n, seed=seed, layer=layer, image=image)
    for picture in write_figures(
        shown, out, only=names_in(only), formats=names_in(form), options=chosen, device=device
    ):
        print(picture)
