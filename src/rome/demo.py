"""`rome demo`: the whole program on data that comes with it."""

from __future__ import annotations

import sys
from pathlib import Path

from rome.assess import evaluate_saved
from rome.config import load
from rome.experiments import folder
from rome.progress import show_training
from rome.report import write_report
from rome.runs import Run
from rome.training import train

EXPERIMENTS = ("digits/random.yaml", "digits/rome-random.yaml")


def run_demo(out: Path, *, overwrite: bool = False) -> Path:
    """Train and evaluate two digit classifiers and write the report; goes on where an earlier call was stopped.

    Returns:
        The HTML report's path.
    """
    runs = []
    for name in EXPERIMENTS:
        config = load(folder() / name)
        run = Run(out / config.name)
        print(f"\n{config.about}: {config.epochs} epochs, then {config.evaluation.suite.kind}", file=sys.stderr)
        if overwrite or not run.finished:
            train(config, run.folder, resume=not overwrite, overwrite=overwrite, progress=show_training)
        evaluate_saved(run.folder, overwrite=overwrite)
        runs.append(run.folder)
    page = write_report(runs, out)
    print(f"\nopen {page}", file=sys.stderr)
    return page
