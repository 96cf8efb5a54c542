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
    runs: Annotated[list[Path] | None, typer.Argument(help="Finished runs; each becomes a row or a curve.")] = None,
    only: Annotated[str | None, typer.Option(help="Only these: fig3,figA4; if not given, all that have data.")] = None,
    form: Annotated[str, typer.Option("--format", help="pdf, png or svg; several: pdf,png.")] = "pdf,png",
    out: Annotated[Path, typer.Option(help="Folder for the pictures and their data.")] = Path("figures"),
    n: Annotated[int, typer.Option(min=8, help="Number of test images, each clean and under every threat.")] = 256,
    layer: Annotated[str | None, typer.Option(help="Part of the layer's name; the last layer if not given.")] = None,
    image: Annotated[int, typer.Option(min=0, help="Index of the test image in figures of a single image.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of t-SNE and linear probes.")] = 0,
    device: options.Device = None,
    trust_code: options.TrustCode = False,
) -> None:
    """Draw the paper's figures for runs of any method and for other models, each with its data as JSON and CSV."""
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
