"""`rome demo`: the whole program on data that comes with it."""

from __future__ import annotations

import sys
from pathlib import Path

from rome.evaluation.run import evaluate_saved
from rome.report.page import write_report
from rome.runs.config import load
from rome.runs.experiments import folder
from rome.runs.folder import Run
from rome.training.loop import train
from rome.training.progress import show_training

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
