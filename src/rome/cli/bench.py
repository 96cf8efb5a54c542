"""``rome bench``."""

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
def bench(
    models: Annotated[
        Path, typer.Argument(metavar="MODELS.yaml", help="A list of models, with their data and threats.")
    ],
    suite: Annotated[
        str | None, typer.Option(help="Suite for all models, instead of the list's: apgd, autoattack, apgd,unseen ...")
    ] = None,
    n: Annotated[int | None, typer.Option(min=1, help="First N test examples, instead of the list's N.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Data for all models, instead of the list's: digits, cifar10:PATH, a folder ...")
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(help="Threats for all models, instead of the list's: cifar10, or Linf=2/255,Linf=4/255 ..."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the evaluations and the leaderboard.")] = Path("bench"),
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    jobs: options.Jobs = None,
    gpus_per_job: options.GpusPerJob = None,
    launcher: options.Launcher = None,
    trust_code: options.TrustCode = False,
) -> None:
    """Evaluate every model in a list and write a leaderboard.

    Each model is evaluated in its own process. After an interruption, the same command continues where it stopped.
    """
    from rome.report.bench import gather_models, jobs_of, read_models
    from rome.runs.launchers import chosen_launcher, require_done

    where = chosen_launcher(launcher)
    listed = read_models(models, suite=suite, n=n, data=data, budgets=budgets)
    chosen = jobs_of(listed, out, device=device, overwrite=overwrite or None)
    found = where.run(list(chosen.values()), at_once=jobs, gpus=gpus_per_job)
    failed = {name: found[job.folder] for name, job in chosen.items() if job.folder in found}
    if evaluated := gather_models(listed, out):
        from rome.report.leaderboard import write_leaderboard

        say(f"open {write_leaderboard(evaluated, out, failed)}")
    require_done(failed, len(chosen))
