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

_RUN_OPTIONS = ("data", "budgets")
"""Options for a model without a run that also apply to a run, whose config they then override."""


@app.command()
@options.names_model
@opens_files
def evaluate(
    named: dict[str, Any],
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET]...",
            help="A run's folder, a model.safetensors written by rome, hf://USER/NAME or hf://USER/NAME@REVISION; each "
            "of several is evaluated in its own process.",
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            help="apgd, autoattack, lp, unseen, corruptions or all; several: apgd,unseen; or settings as in a config: "
            "'{kind: corruptions, path: CIFAR-10-C}'."
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Network that measures distances in PPGD and LPA: a run, a file or self; runs/alexnet if not given."
        ),
    ] = None,
    cases: Annotated[str | None, typer.Option(help="Run only these cases of the suite now, such as L2,Linf.")] = None,
    n: Annotated[int | None, typer.Option(min=1, help="First N test examples; the config's N if not given.")] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Examples per batch; auto halves a batch that does not fit in memory.")
    ] = None,
    device: options.Device = None,
    routing: Annotated[
        RoutingName | None, typer.Option(help="Gate weights: learned, or a replacement from the paper's Table 5.")
    ] = None,
    checks: Annotated[
        bool | None,
        typer.Option("--checks/--no-checks", help="Check for masked gradients; by default where that costs little."),
    ] = None,
    save_images: Annotated[
        Literal["none", "fooled", "all"] | None,
        typer.Option(help="Adversarial images to save: none, those that fooled the model, or all."),
    ] = None,
    search_precision: Annotated[
        Literal["fp32", "tf32"] | None,
        typer.Option(help="Precision of attacks in Lp balls; tf32 is faster, on CUDA only. Verdicts are in fp32."),
    ] = None,
    loggers: Annotated[
        str | None,
        typer.Option(
            help="Also log the result to: wandb,csv; the config's loggers if not given. See rome list loggers."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; next to the model if not given.")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    jobs: options.Jobs = None,
    gpus_per_job: options.GpusPerJob = None,
    launcher: options.Launcher = None,
    trust_code: options.TrustCode = False,
) -> None:
    """Attack a model under every threat and report its clean and robust accuracies.

    After an interruption, the same command continues where it stopped.
    Under torchrun or srun, the work is spread over their processes, with the same result.
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
        "save_images": save_images,
        "search_precision": search_precision,
        "loggers": None if loggers is None else names_in(loggers),
        "overwrite": overwrite,
    }
    if len(targets or ()) > 1 or (launcher, jobs, gpus_per_job) != (None, None, None):
        model_options = [name for name, value in named.items() if value is not None and name not in _RUN_OPTIONS]
        if not targets or out is not None or model_options:
            raise UserError(
                "several runs, --jobs, --gpus-per-job and --launcher work only for runs (rome evaluate RUN ...), "
                "without --out and --model; each result is saved next to its model"
            )
        _evaluate_several(
            targets, settings | {name: named[name] for name in _RUN_OPTIONS}, launcher, jobs, gpus_per_job, as_json
        )
        return
    from rome.core.distributed import launched

    target = next(iter(targets or ()), None)
    with launched() as team:  # first, so that any failure below ends every process
        from rome.evaluation.named import named_config
        from rome.evaluation.run import evaluate_saved

        run_options = {name: named.pop(name) for name in _RUN_OPTIONS} if target and named["model"] is None else {}
        config = named_config(named, target)
        if (target is None) == (config is None) or (config is not None and routing is not None):
            raise UserError(
                "name what to evaluate: either a run's folder (rome evaluate RUN), or any model and its data "
                "(rome evaluate --model NAME --data DATA, without --routing)"
            )
        report, folder = evaluate_saved(config or target or "", **run_options, out=out, team=team, **settings)
    if not team.is_main:
        return
    provenance = report.settings["provenance"]
    _show([(provenance.get("model", provenance["config"])["name"], report)], as_json)
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
    targets: list[str],
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
    places = {target: job.result(str) for target, job in chosen.items() if target not in failed}
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
        raise UserError(f"--batch-size {text!r}: give a positive integer, or auto")
    return int(text)
