"""Evaluating what was saved: model, data and settings of a run or a file, and where the result goes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from rome.config import Config, parse
from rome.device import pick_device
from rome.errors import UserError
from rome.evaluate import Report, Suite, evaluate
from rome.experts import Routing, set_routing
from rome.models import build_model, file_hash, load_model, read_tensors
from rome.runs import Run


def evaluate_saved(
    target: str | Path,
    *,
    suite: str | None = None,
    n: int | None = None,
    batch_size: int | None = None,
    device: str | None = None,
    routing: Routing | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
) -> tuple[Report, Path]:
    """Evaluate a run's folder, its ``last.pt``, or a ``model.safetensors`` on the test set of its config.

    What is not given is the config's. ``routing`` replaces the gates (:func:`rome.experts.set_routing`). The result
    goes to ``evaluation/SUITE-N`` beside the model.

    Returns:
        The report and the folder it was saved in.

    Raises:
        UserError: no such model, no config in it, or a setting that does not fit.
    """
    file = Path(target)
    if file.is_dir():
        file = Run(file).model_file
    model, config = (_from_checkpoint if file.suffix == ".pt" else _from_file)(file)
    settings = config.evaluation
    chosen: Suite = settings.suite if suite in (None, settings.suite.kind) else _suite(str(suite))
    split = config.data.open("test")
    wanted = n if n is not None else settings.n
    if n is not None and n > len(split):
        raise UserError(f"--n {n} exceeds the {len(split)} test examples of {config.data.kind}; give at most that many")
    x, y = split.first(min(wanted or len(split), len(split)))
    routed = routing or settings.routing
    set_routing(model, routed, seed=settings.seed)
    unfinished = f"-unfinished-{file_hash(file)[:8]}" if file.suffix == ".pt" else ""
    name = f"{chosen.kind}-{len(x)}{'' if routed == 'learned' else f'-{routed}'}{unfinished}"
    folder = Path(out) if out is not None else file.parent / "evaluation" / name
    place = pick_device(device or config.device)
    report = evaluate(
        model.to(place),
        x,
        y,
        threats=config.threats,
        suite=chosen,
        batch_size=batch_size or settings.batch_size,
        seed=settings.seed,
        out=folder,
        overwrite=overwrite,
        provenance={
            "config": config.dump(),
            "routing": routed,
            "checkpoint": file.name,
            "checkpoint_sha256": file_hash(file),
        },
        progress=True,
    )
    return report, folder


def _from_file(file: Path) -> tuple[torch.nn.Module, Config]:
    metadata, _ = read_tensors(file)
    if not metadata.get("config"):
        raise UserError(f"{file} holds no config, so its data set is unknown; use rome.evaluate(model, x, y) in Python")
    config = parse(metadata["config"])  # first: it imports what the model may be built of
    return load_model(file), config


def _from_checkpoint(file: Path) -> tuple[torch.nn.Module, Config]:
    run = Run(file.parent)
    if file != run.checkpoint_file or not file.is_file():
        raise UserError(
            f"there is no model at {file}; give a run's folder, its last.pt, or a model.safetensors of ours"
        )
    state: dict[str, Any] = run.load_checkpoint()
    config = run.config
    split = config.data.open("test")
    untrained = config.model.untrained()  # the checkpoint has all weights
    model = build_model(untrained, config.experts, classes=len(split.classes), shape=split.shape)
    model.load_state_dict(state["model"])
    print(f"{file} is an unfinished run, after {state['epoch']} epochs", file=sys.stderr)
    return model.eval(), config


def _suite(kind: str) -> Suite:
    from rome.evaluation.suites import as_suite

    return as_suite(kind)
