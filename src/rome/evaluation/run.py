"""Evaluating what was saved, or what a name stands for: model, data and settings, and where the result goes."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from rome.attacks.suites import BATCH_SIZE, Suite
from rome.attacks.suites.composed import SeveralSuites, as_suite, check_files, listed, with_features
from rome.core import trust
from rome.core.device import pick_device, placed
from rome.core.distributed import ALONE, Team, own_device
from rome.core.errors import UserError, first_line
from rome.data.base import Split
from rome.evaluation.evaluate import AUTO, Report, evaluate
from rome.evaluation.given import Given
from rome.experts import Routing, set_routing
from rome.models import build_model, file_hash, load_model, read_tensors
from rome.runs.config import Config, Evaluation, parse
from rome.runs.folder import Run

EXAMPLES = 1000
"""Of a model that comes without a config."""


@trust.opens_files
def evaluate_saved(
    target: str | Path,
    *,
    data: str | None = None,
    suite: str | None = None,
    features: str | None = None,
    n: int | None = None,
    cases: Sequence[str] | None = None,
    batch_size: int | Literal["auto"] | None = None,
    device: str | None = None,
    routing: Routing | None = None,
    checks: bool | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    team: Team = ALONE,
    settings: Evaluation | None = None,
    trust_code: bool = False,
) -> tuple[Report, Path]:
    """Evaluate a run's folder, its ``last.pt`` or ``best.safetensors``, or a ``model.safetensors``.

    On the test set of its config.

    What is not given is that of ``settings``, and without these the config's; the rest is :func:`rome.evaluate`'s.
    ``data`` is where the data lies now; without it, where the ``config.yaml`` of the run's folder says.
    ``routing`` replaces the gates (:func:`rome.experts.set_routing`), ``features`` the network that measures perceptual
    distances in the suite, ``trust_code`` lets files run the code that they name (:mod:`rome.core.trust`). The result
    goes to ``evaluation/SUITE-N`` beside the model, that of a run's ``best.safetensors`` to
    ``evaluation-best/SUITE-N``, of its ``last.pt`` to ``evaluation-unfinished``.

    Returns:
        The report and the folder it was saved in.

    Raises:
        UserError: no such model, no config in it, or a setting that does not fit.
    """
    file = Path(target)
    if file.is_dir():
        file = Run(file).model_file
    model, config, split = (_from_checkpoint if file.suffix == ".pt" else _from_file)(file, data, team)
    settings = settings or config.evaluation
    chosen = _readable(_suite(suite, settings.suite), features, cases, team)
    x, y = _examples(config.data.kind, split, n, settings.n)
    routed = routing or settings.routing
    set_routing(model, routed, seed=settings.seed)
    name = f"{chosen.label}-{len(x)}{'' if routed == 'learned' else f'-{routed}'}"
    beside = "evaluation-best" if file == Run(file.parent).best_file else "evaluation"
    if file.suffix == ".pt":  # apart, or reports and tables would take it for the finished model's
        name, beside = f"{name}-{file_hash(file)[:8]}", "evaluation-unfinished"
    folder = Path(out) if out is not None else file.parent / beside / name
    place = own_device(pick_device(device or config.device))
    report = evaluate(
        placed(model, place),
        x,
        y,
        threats=config.threats,
        suite=chosen,
        batch_size=batch_size or settings.batch_size,
        seed=settings.seed,
        out=folder,
        provenance={
            "config": config.dump(),
            "routing": routed,
            "checkpoint": file.name,
            "checkpoint_sha256": file_hash(file),
            "examples": split.source,
            "remarks": list(split.remarks),
        },
        cases=cases,
        checks=checks,
        overwrite=overwrite,
        team=team,
        progress=True,
    )
    return report, folder


def evaluate_given(
    given: Given,
    *,
    suite: str | None = None,
    features: str | None = None,
    n: int | None = None,
    cases: Sequence[str] | None = None,
    batch_size: int | Literal["auto"] | None = None,
    device: str | None = None,
    checks: bool | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    team: Team = ALONE,
) -> tuple[Report, Path]:
    """Evaluate a model that no run of ours made on the test examples of its data.

    Args:
        given: names the model, its data and its budgets; it is kept with the result, so that the model can be built
            again.
        features: the network that measures perceptual distances in the suite; None takes the suite's. The rest is
            :func:`rome.evaluate`'s.

    Returns:
        The report and the folder it was saved in, ``evaluations/NAME-SUITE-N`` unless the options say another.

    Raises:
        UserError: no such model or data, or they do not fit each other.
    """
    source, threats = given.source(), given.threats()
    chosen = _readable(as_suite("apgd" if suite is None else suite), features, cases, team)
    split = source.open("test")
    x, y = _examples(source.kind, split, n, EXAMPLES)
    place = own_device(pick_device(device or AUTO))
    batch_size = batch_size or BATCH_SIZE
    largest = min(len(x), batch_size if isinstance(batch_size, int) else BATCH_SIZE)
    subject = given.build(split, place, batch_size=largest)
    for remark in subject.remarks:
        _say(team, remark)
    label = re.sub(r"[^A-Za-z0-9._+-]+", "-", subject.name)
    folder = Path(out) if out is not None else Path("evaluations") / f"{label}-{chosen.label}-{len(x)}"
    report = evaluate(
        subject.model,
        x,
        y,
        threats=threats,
        suite=chosen,
        batch_size=batch_size,
        device=place,
        out=folder,
        provenance={
            "model": subject.facts,
            "data": source.dump(),
            "examples": split.source,
            "remarks": [*split.remarks, *subject.remarks],
            "given": given.model_dump(mode="json", exclude_none=True),
        },
        cases=cases,
        checks=checks,
        overwrite=overwrite,
        team=team,
        progress=True,
    )
    classes = len(split.classes)
    if report.interval("clean")[0] <= 1 / classes:
        _say(
            team,
            f"only {report.clean:.1%} are right without an attack, no better than chance for {classes} classes: are "
            "the normalisation (--mean, --std), the image size and the order of the classes those it was trained with?",
        )
    return report, folder


def _suite(asked: str | None, configured: Suite) -> Suite:
    """The suite or suites of that text (:func:`rome.attacks.suites.composed.listed`): what is named alone has the
    config's settings where it has one of that name.

    Raises:
        UserError: no such suite.
    """
    if asked is None:
        return configured
    parts = configured.suites if isinstance(configured, SeveralSuites) else (configured,)
    known = {suite.label: suite for suite in (*parts, configured)}
    try:
        given = listed(asked)
    except ValueError as error:
        raise UserError(f"suite: {error}") from None
    return as_suite([known.get(each, each) if isinstance(each, str) else each for each in given])


def _readable(suite: Suite, features: str | None, cases: Sequence[str] | None, team: Team) -> Suite:
    """The suite with these features, once it is said which of its files are missing.

    Raises:
        UserError: one that was named is missing or of no use.
    """
    chosen = with_features(suite, features)
    for sentence in check_files(chosen, cases):
        _say(team, sentence)
    return chosen


def _examples(kind: str, split: Split, asked: int | None, usual: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The first test examples, as many as are asked for."""
    if asked is not None and asked > len(split):
        raise UserError(f"--n {asked} exceeds the {len(split)} test examples of {kind}; give at most that many")
    return split.first(min(asked or usual or len(split), len(split)))


def _located(config: Config, file: Path, data: str | None) -> tuple[Config, Split]:
    """The config with the data where it lies now, and its test set.

    Raises:
        UserError: it is not there, has no path, or has other classes than those that the run was trained on.
    """
    run, kept = Run(file.parent), config.data.path
    path = data or run.data_path or kept
    if data is not None and kept is None and type(config.data).model_fields["path"].annotation is type(None):
        raise UserError(f"--data {data}: the data of {run.folder} ({config.data.kind}) lies at no path; leave it out")
    if path != kept:
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": path})})
    try:
        split = config.data.open("test")
    except UserError as error:
        if path is None or Path(path).expanduser().exists():
            raise
        raise UserError(
            f"{error}. If it lies elsewhere now: rome evaluate {file} --data PATH, or correct data.path in "
            f"{run.config_file}"
        ) from None
    known = (run.origin.get("data") or {}).get("classes", list(split.classes))
    if known != list(split.classes):
        raise UserError(
            f"{path} has other classes than {run.folder} was trained on: {_listed(split.classes)} instead of "
            f"{_listed(known)}"
        )
    return config, split


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def _from_file(file: Path, data: str | None, team: Team) -> tuple[torch.nn.Module, Config, Split]:
    metadata, _ = read_tensors(file, follow=True)
    if not metadata.get("config"):
        raise UserError(
            f"{file} holds no config, so its data set is unknown; name them: rome evaluate --model NAME "
            f"--weights {file} --data DATA (or use rome.evaluate(model, x, y) in Python)"
        )
    config = parse(metadata["config"])  # first: it imports what the model may be built of
    config, split = _located(config, file, data)
    return load_model(file), config, split


def _from_checkpoint(file: Path, data: str | None, team: Team) -> tuple[torch.nn.Module, Config, Split]:
    run = Run(file.parent)
    if file != run.checkpoint_file or not file.is_file():
        raise UserError(
            f"there is no model at {file}; give a run's folder, its last.pt, or a model.safetensors of ours; "
            "models of others go by --model and --data"
        )
    state: dict[str, Any] = run.load_checkpoint()
    config, split = _located(run.config, file, data)
    untrained = config.model.untrained()  # the checkpoint has all weights
    model = build_model(untrained, config.experts, classes=len(split.classes), shape=split.shape)
    try:
        model.load_state_dict(state["model"])
        done = int(state["epoch"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not fit its config.yaml ({first_line(error)}); restore it") from error
    _say(team, f"{file} is an unfinished run, after {done} epochs")
    return model.eval(), config, split


def _say(team: Team, text: str) -> None:
    """To standard error, by the first process alone."""
    if team.leads:
        print(text, file=sys.stderr)
