"""``rome train``."""

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
def train(
    config: Annotated[
        Path,
        typer.Argument(
            help="YAML file, such as experiments/digits/rome-random.yaml; with --resume, also a run's folder."
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help="Changes to the config, such as attack.steps=5."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the run; runs/NAME if not given.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in the run's folder.")] = False,
    overwrite: options.Overwrite = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Train a model as a config describes.

    Under torchrun or srun, the training is spread over the processes that they start.
    """
    from rome.runs.config import load
    from rome.runs.folder import Run
    from rome.training.progress import show_training
    from rome.training.setup import train as run_training

    if resume and config.is_dir():
        out, spec = out or config, Run(config).config  # refuses code named by others without --trust-code
        spec = load(config / "config.yaml", overrides) if overrides else spec
    else:
        spec = load(config, overrides or ())
    run = run_training(
        spec, out or Path("runs") / spec.name, resume=resume, overwrite=overwrite, progress=show_training
    )
    say(f"{run.model_file}\nnext: rome evaluate {run.folder}")
