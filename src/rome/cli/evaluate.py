"""``rome evaluate``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rome.cli import options
from rome.cli.app import app
from rome.cli.options import names_in
from rome.core.console import say
from rome.core.errors import UserError
from rome.core.trust import opens_files

if TYPE_CHECKING:
    from rome.evaluation.result import Report

RoutingName = Literal["learned", "random", "inverse", "inverse-unscaled", "none"]


@app.command()
@options.names_model
@opens_files
def evaluate(
    named: dict[str, Any],
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET]...",
            help="A run's folder, a model.safetensors of ours, or hf://USER/NAME[@REVISION]; several are evaluated "
            "each in a process of its own.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="apgd, autoattack, lp, unseen, corruptions, all; several: apgd,unseen; or settings as in a config: "
            "'{kind: corruptions, path: CIFAR-10-C}'."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="The network that measures for PPGD and LPA: a run, a file, or self; runs/alexnet."),
    ] = None,
    cases: Annotated[str | None, typer.Option(help="Run only these columns of the suite now: L2,Linf.")] = None,
    n: Annotated[int | None, typer.Option(min=1, help="First N test examples; the config's if not given.")] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Examples at a time; auto halves them where memory does not suffice.")
    ] = None,
    device: options.Device = None,
    routing: Annotated[
        RoutingName | None, typer.Option(help="Gate weights: the learned ones, or those of the paper's Table 5.")
    ] = None,
    checks: Annotated[
        bool | None,
        typer.Option("--checks/--no-checks", help="Look for masked gradients; if not given, where that costs little."),
    ] = None,
    loggers: Annotated[
        str | None,
        typer.Option(help="Log the result to these too: wandb,csv; the config's if not given. rome list loggers."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; beside the model if not given.")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    jobs: options.Jobs = None,
    gpus_per_job: options.GpusPerJob = None,
    launcher: options.Launcher = None,
    trust_code: options.TrustCode = False,
) -> None:
    """Attack a model under every threat; goes on where an earlier call was killed.

    Under torchrun or srun, on as many processes as they start, with the same result.
    """
    settings: dict[str, Any] = {
        "suite": suite,
        "features": features,
        "cases": None if cases is None else names_in(cases),
        "n": n,
        "batch_size": _batch_size(batch_size),
        "device": device,
        "routing": routing,
        "checks": checks,
        "loggers": None if loggers is None else names_in(loggers),
        "overwrite": overwrite,
    }
    if len(targets or ()) > 1 or (launcher, jobs, gpus_per_job) != (None, None, None):
        if out is not None or any(value is not None for name, value in named.items() if name != "data"):
            raise UserError("several runs are evaluated without --out and --model; results lie beside their models")
        _evaluate_several(targets or [], settings | {"data": named["data"]}, launcher, jobs, gpus_per_job, as_json)
        return
    from rome.core.distributed import launched

    target = next(iter(targets or ()), None)
    with launched() as team:  # first: whatever fails now fails in every process
        from rome.evaluation.named import named_config
        from rome.evaluation.run import evaluate_saved

        data = named.pop("data") if target is not None and named["model"] is None else None
        config = named_config(named, target)
        if (target is None) == (config is None) or (config is not None and routing is not None):
            raise UserError(
                "name what to evaluate: either a run's folder (rome evaluate RUN), or any model and its data "
                "(rome evaluate --model NAME --data DATA, without --routing)"
            )
        report, folder = evaluate_saved(
            config or target or "",
            data=data,
            out=out,
            team=team,
            **settings,
        )
    if not team.is_main:
        return
    kept = report.settings["provenance"]
    _show([(kept.get("model", kept["config"])["name"], report)], as_json)
    if not as_json:
        say(f"saved in {folder}")
    report.require_complete()


def _show(rows: Sequence[tuple[str, Report]], as_json: bool) -> None:
    for name, report in rows:
        for warning in report.warnings:
            where = ", ".join(filter(None, (name if len(rows) > 1 else "", warning["check"], warning["case"])))
            say(f"warning ({where}): {warning['message']}")
        if as_json:
            print(json.dumps(report.to_json()))
    if not as_json:
        from rome.report.columns import show

        show(rows)


def _evaluate_several(
    targets: Sequence[str],
    settings: dict[str, Any],
    launcher: str | None,
    jobs: int | None,
    gpus: int | None,
    as_json: bool,
) -> None:
    from rome.core import trust
    from rome.core.files import as_file_name
    from rome.evaluation.result import Report
    from rome.runs.launchers import Job, chosen_launcher, require_done

    shared = {name: value for name, value in settings.items() if value is not None} | {"trust_code": trust.allowed()}
    chosen = {
        target: Job(
            Path("evaluations") / "jobs" / as_file_name(target),
            "rome.evaluation.run:evaluate_job",
            {"target": target, **shared},
            name=target,
        )
        for target in targets
    }
    found = chosen_launcher(launcher).run(list(chosen.values()), at_once=jobs, gpus=gpus)
    failed = {target: found[job.folder] for target, job in chosen.items() if job.folder in found}
    places = {target: job.result() for target, job in chosen.items() if target not in failed}
    if rows := [(target, Report.load(place)) for target, place in places.items() if place is not None]:
        _show(rows, as_json)
    require_done(failed, len(chosen))
    for _, report in rows:
        report.require_complete()


def _batch_size(text: str | None) -> int | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch-size {text!r}: give a number from 1, or auto")
    return int(text)
