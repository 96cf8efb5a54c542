"""``rome demo``: training, evaluation and report on the digits that come with rome."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rome.cli import options
from rome.cli.app import app
from rome.core.console import say
from rome.core.errors import UserError

EXPERIMENTS = ("digits/random.yaml", "digits/rome-random.yaml")
SHORT = (
    *("epochs=14", "natural_epochs=9", "batch_size=64", "optimizer.lr=3e-3", "attack.steps=3"),
    "evaluation.suite.iterations=10",
)
"""Overrides that make the experiments short enough to train each with three seeds."""
SEEDS = "seed=0,1,2"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/demo"),
    overwrite: options.Overwrite = False,
) -> None:
    """Train RANDOM and RoME+RANDOM on real digits with three seeds each, attack all models and compare them."""
    import os
    import shutil

    from rome.report import sweep as grid
    from rome.report.page import write_report
    from rome.runs.experiments import folder

    chosen = grid.points([folder() / name for name in EXPERIMENTS], [SEEDS, *SHORT], out)
    for point in chosen if overwrite else ():
        if (point.folder / "config.yaml").is_file():
            shutil.rmtree(point.folder)
    config, jobs = chosen[0].config, min(os.cpu_count() or 1, len(chosen))
    say(
        f"RANDOM and RoME+RANDOM on real digits: {len(chosen)} trainings of {config.epochs} epochs, {jobs} at a time, "
        f"each then attacked under L1, L2 and Linf on {config.evaluation.n} test images; a few minutes on two cores"
    )
    if failed := grid.sweep(chosen, jobs=jobs):
        raise UserError("\n".join(f"{place}: {reason}" for place, reason in failed.items()))
    page = write_report([point.folder for point in chosen], out)
    say(f"\nopen {page}")
