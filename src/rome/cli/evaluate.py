"""``rome evaluate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from rome.cli import options
from rome.cli.app import app
from rome.cli.options import names_in
from rome.core.console import say
from rome.core.errors import UserError
from rome.core.trust import opens_files

RoutingName = Literal["learned", "random", "inverse", "inverse-unscaled", "none"]


@app.command()
@options.names_model
@opens_files
def evaluate(
    named: dict[str, Any],
    target: Annotated[
        str | None, typer.Argument(help="A run's folder, a model.safetensors of ours, or hf://USER/NAME[@REVISION].")
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
    save_images: Annotated[
        Literal["none", "fooled", "all"] | None,
        typer.Option(help="Keep nobody's adversarial images, those that fooled the model, or those of all examples."),
    ] = None,
    loggers: Annotated[
        str | None,
        typer.Option(help="Log the result to these too: wandb,csv; the config's if not given. rome list loggers."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result; beside the model if not given.")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    trust_code: options.TrustCode = False,
) -> None:
    """Attack a model under every threat; goes on where an earlier call was killed.

    Under torchrun, on as many processes as it starts, with the same result.
    """
    from rome.core.distributed import launched

    with launched() as team:  # first: whatever fails now fails in every process
        from rome.evaluation.named import named_config
        from rome.evaluation.run import evaluate_saved

        # beside a run these replace what its config says
        own = {key: named.pop(key) for key in ("data", "budgets")} if target and named["model"] is None else {}
        config = named_config(named, target)
        if (target is None) == (config is None) or (config is not None and routing is not None):
            raise UserError(
                "name what to evaluate: either a run's folder (rome evaluate RUN), or any model and its data "
                "(rome evaluate --model NAME --data DATA, without --routing)"
            )
        report, folder = evaluate_saved(
            config or target or "",
            **own,
            suite=suite,
            features=features,
            cases=None if cases is None else names_in(cases),
            n=n,
            batch_size=_batch_size(batch_size),
            device=device,
            routing=routing,
            save_images=save_images,
            checks=checks,
            loggers=None if loggers is None else names_in(loggers),
            out=out,
            overwrite=overwrite,
            team=team,
        )
    if not team.is_main:
        return
    for warning in report.warnings:
        say(f"warning ({', '.join(filter(None, (warning['check'], warning['case'])))}): {warning['message']}")
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        from rome.report.columns import show

        kept = report.settings["provenance"]
        show([(kept.get("model", kept["config"])["name"], report)])
        say(f"saved in {folder}")
    report.require_complete()


def _batch_size(text: str | None) -> int | Literal["auto"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch-size {text!r}: give a number from 1, or auto")
    return int(text)
