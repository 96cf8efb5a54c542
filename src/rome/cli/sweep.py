"""``rome sweep``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rome.cli import options
from rome.cli.app import app
from rome.core.console import say
from rome.core.errors import UserError
from rome.core.trust import opens_files


@app.command()
@opens_files
def sweep(
    configs: Annotated[
        list[str],
        typer.Argument(
            metavar="CONFIG... [key=a,b,c]...", help="YAML files, then settings with the values to combine."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the runs and sweep.csv.")] = Path("runs/sweep"),
    jobs: options.Jobs = None,
    gpus_per_job: options.GpusPerJob = None,
    launcher: options.Launcher = None,
    trust_code: options.TrustCode = False,
) -> None:
    """Train and evaluate every combination of configs and values, each in its own process.

    After an interruption, the same command continues where it stopped.
    Started on several machines that share the folder OUT, each machine takes different runs.
    """
    from rome.report import sweep as grid
    from rome.runs.config import files_and_changes
    from rome.runs.launchers import chosen_launcher, require_done

    where = chosen_launcher(launcher)
    files, axes = files_and_changes(configs)
    if not files:
        raise UserError("name at least one config, such as experiments/digits/random.yaml seed=0,1,2")
    chosen = grid.points(files, axes, out)
    failed = grid.sweep(chosen, launcher=where, jobs=jobs, gpus=gpus_per_job)
    if results := grid.gather_results(chosen):
        grid.show_results(results)
        say(f"saved in {grid.save_results(results, out)}")
    require_done(failed, len(chosen))
