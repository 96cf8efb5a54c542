"""``rome demo``: the whole program on data that comes with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rome.cli import options
from rome.cli.app import app
from rome.core.console import say

EXPERIMENTS = ("digits/random.yaml", "digits/rome-random.yaml")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for runs and report.")] = Path("runs/demo"),
    overwrite: options.Overwrite = False,
) -> None:
    """Train RANDOM and RoME+RANDOM on real digits, attack both under L1, L2 and Linf, set them side by side."""
    from rome.evaluation.run import evaluate_saved
    from rome.report.page import write_report
    from rome.runs.config import load
    from rome.runs.experiments import folder
    from rome.runs.folder import Run
    from rome.training.progress import show_training
    from rome.training.setup import train

    runs = []
    for name in EXPERIMENTS:
        config = load(folder() / name)
        run = Run(out / config.name)
        say(f"\n{config.about}: {config.epochs} epochs, then {config.evaluation.suite.kind}")
        if overwrite or not run.finished:
            train(config, run.folder, resume=not overwrite, overwrite=overwrite, progress=show_training)
        evaluate_saved(run.folder, overwrite=overwrite)
        runs.append(run.folder)
    page = write_report(runs, out)
    say(f"\nopen {page}")
