"""Evaluate a model that a run saved or a config names: open it and its data, and choose the result's folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import nn

from rome.attacks.suites import SaveImages, SearchPrecision, Suite
from rome.attacks.suites.composed import SeveralSuites, as_suite, check_files, parse_suites, with_features
from rome.core import trust
from rome.core.console import say
from rome.core.device import pick_device, placed
from rome.core.distributed import ALONE, Team, launched, local_share, own_device
from rome.core.errors import UserError, first_line, some
from rome.core.files import as_file_name
from rome.core.private import PATH
from rome.data.base import Split
from rome.evaluation.checks import check_search_precision
from rome.evaluation.evaluate import Report, evaluate
from rome.evaluation.named import build_named, named_after, named_budgets
from rome.evaluation.tracked import chosen_loggers, track
from rome.experts import Routing, set_routing
from rome.models import ModelSettings, build_model, file_hash, load_model, read_tensors
from rome.models.hub import on_hub, pinned
from rome.runs.config import Config, Evaluation, parse
from rome.runs.folder import Run
from rome.runs.hints import what_is
from rome.threats import LpBall


@trust.opens_files
def evaluate_saved(
    target: str | Path | Config,
    *,
    data: str | None = None,
    budgets: str | None = None,
    suite: str | None = None,
    features: str | None = None,
    n: int | None = None,
    cases: Sequence[str] | None = None,
    batch_size: int | Literal["auto"] | None = None,
    device: str | None = None,
    routing: Routing | None = None,
    save_images: SaveImages | None = None,
    search_precision: SearchPrecision | None = None,
    out: str | Path | None = None,
    settings: Evaluation | None = None,
    loggers: Sequence[str] | None = None,
    team: Team = ALONE,
    trust_code: bool = False,
    **others: Any,
) -> tuple[Report, Path]:
    """Evaluate a model on the test set of its config.

    Args:
        target: a run's folder, its ``last.pt`` or ``best.safetensors``, a ``model.safetensors``, a model on the Hub
            (``hf://USER/NAME``; the result names its commit), or the config of a model that was not trained by a run
            (:func:`rome.evaluation.named.named_config`).
        data: path of the data on this machine; None for the one in the ``config.yaml`` of the run's folder.
        budgets: threats that replace the config's: ``cifar10``, ``Linf=4/255,Linf=8/255``
            (:func:`rome.evaluation.named.named_budgets`).
        features: the network that measures perceptual distances in the suite; None for the suite's own.
        routing: replaces the gates (:func:`rome.experts.set_routing`).
        out: folder for the result; by default ``evaluation/SUITE-N`` beside the model, ``evaluation-best/SUITE-N`` for
            a run's ``best.safetensors``, ``evaluation-unfinished`` for its ``last.pt``, ``evaluations/NAME-SUITE-N``
            for a model without a run on this machine, and with other budgets ``evaluation-budgets/SUITE-N-BUDGETS``.
        settings: defaults for arguments that are None; None for the config's ``evaluation``.
        loggers: kinds of loggers; None for the config's, which do not log a result that was finished before.
        trust_code: let files run the code that they name (:mod:`rome.core.trust`).
        others: further arguments of :func:`rome.evaluate`, which also explains those that are not described here.

    Returns:
        The report and the folder it was saved in.

    Raises:
        UserError: there is no such model, it has no config, or a setting does not fit it.
    """
    opened = open_target(target, data)
    config, split = opened.config, opened.split
    if budgets is not None and (threats := named_budgets(budgets)) != config.threats:
        config = config.model_copy(update={"threats": threats})
        names = "+".join(f"{t.norm}-{t.radius}" if isinstance(t, LpBall) else t.name for t in threats)
        if opened.home is not None:  # a report expects one result per suite in the usual folder
            opened = opened._replace(folder=opened.folder.with_name(f"{opened.folder.name}-budgets"))
        opened = opened._replace(suffix=f"{opened.suffix}-{names.replace('/', '_')}")
    settings = settings or config.evaluation
    used_loggers = chosen_loggers(config, loggers) if team.is_main else ()
    chosen = with_features(_suite(suite, settings.suite), features)
    for sentence in (*check_files(chosen, cases), *opened.remarks):
        say(sentence)
    if n is not None and n > len(split):
        raise UserError(f"--n {n} exceeds the {len(split)} test examples of {config.data.kind}; give at most that many")
    place, precision = own_device(pick_device(device or config.device)), search_precision or settings.search_precision
    check_search_precision(precision, place)
    x, y = split.stored(n or settings.n or len(split), workers=local_share(config.workers))
    routed = routing or settings.routing
    set_routing(opened.model, routed, seed=settings.seed)
    name = f"{opened.prefix}{chosen.label}-{len(x)}{'' if routed == 'learned' else f'-{routed}'}{opened.suffix}"
    folder = Path(out) if out is not None else opened.folder / as_file_name(name)
    report = evaluate(
        placed(opened.model, place),
        x,
        y,
        threats=config.threats,
        suite=chosen,
        batch_size=batch_size or settings.batch_size,
        seed=settings.seed,
        save_images=save_images or settings.save_images,
        search_precision=precision,
        device=place,
        out=folder,
        provenance={
            "config": config.dump(),
            "routing": routed,
            "examples": split.source,
            "remarks": [*split.remarks, *opened.remarks],
            **opened.facts,
        },
        cases=cases,
        team=team,
        progress=True,
        **others,
    )
    if used_loggers and (loggers is not None or "result" not in report.reused):
        label = f"{opened.folder.name}/{name}"
        track(used_loggers, opened.home or folder, config, report, x, folder, label, opened.updates)
    if "model" in opened.facts and not on_hub(config.model.name) and report.interval("clean")[0] <= report.chance:
        say(
            f"{report.chance_remark}: was the model trained with this normalisation (--mean, --std), image size and "
            "order of classes?"
        )
    return report, folder


@trust.opens_files
def evaluate_job(target: str, *, trust_code: bool = False, **options: Any) -> str:
    """Run :func:`evaluate_saved` for a launcher, as one of the processes it started; return the result's folder."""
    with launched() as team:
        return str(evaluate_saved(target, team=team, **options)[1])


class Opened(NamedTuple):
    """A model opened for evaluation, and where its results go."""

    model: nn.Module
    config: Config
    split: Split
    folder: Path
    """Folder of the results, each in a folder of its own."""
    facts: dict[str, Any]
    """JSON data for the result's provenance: a run's ``checkpoint`` and its hash, or ``model`` for other models."""
    remarks: Sequence[str] = ()
    prefix: str = ""
    suffix: str = ""
    """Prefix and suffix go around SUITE-N in the name of a result's folder."""
    home: Path | None = None
    """The run's folder, whose logs the loggers continue; None for a model that is not in a run."""
    updates: int = 0
    """Number of updates that the weights were trained for, according to the log; 0 if unknown."""


def open_target(target: str | Path | Config, data: str | None = None) -> Opened:
    """Open a model in evaluation mode, its config and test set; arguments and errors are :func:`evaluate_saved`'s."""
    if on_hub(target):
        target = _hub_config(target, data)
    if isinstance(target, Config):
        target = target.model_copy(update={"model": target.model.pinned()})
        split = target.data.open("test")
        model, facts, remarks = build_named(target, split)
        return Opened(model, target, split, Path("evaluations"), {"model": facts}, remarks, prefix=f"{target.name}-")
    file = Path(target)
    if file.is_file() and file.suffix in (".yaml", ".yml", ".py"):
        raise UserError(f"name a run's folder or its weights; {what_is(file)}")
    if file.is_dir():
        file = Run(file).model_file
    run, digest = Run(file.parent), file_hash(file) if file.is_file() else ""
    facts = {"checkpoint": file.name, "checkpoint_sha256": digest}
    if file.suffix == ".pt":  # its own folder, so that reports do not take its results for the finished model's
        model, config, split = _from_checkpoint(run, file, data)
        place, suffix = run.folder / "evaluation-unfinished", f"-{digest[:8]}"
        return Opened(model, config, split, place, facts, suffix=suffix, home=run.folder, updates=_updates(run, file))
    metadata, _ = read_tensors(file, follow=True)
    if not metadata.get("config"):
        raise UserError(
            f"{file} holds no config, so its model and data are unknown; name them: rome evaluate --model NAME "
            f"--weights {file} --data DATA (or use rome.evaluate(model, x, y) in Python)"
        )
    config = parse(metadata["config"])  # before loading the model: it imports the code that the model may need
    config, split = _current_data(config, file, data)
    place = run.folder / ("evaluation-best" if file == run.best_file else "evaluation")
    home = run.folder if run.config_file.is_file() else None
    return Opened(load_model(file), config, split, place, facts, home=home, updates=_updates(run, file))


def _updates(run: Run, file: Path) -> int:
    """Number of updates that a run's weights were trained for; 0 without its log."""
    lines = [line for line in run.log() if line.get("best") or file != run.best_file]
    return int(lines[-1]["update"]) if lines else 0


def _suite(name: str | None, configured: Suite) -> Suite:
    """Parse the suites named on the command line (:func:`rome.attacks.suites.composed.parse_suites`).

    A suite that is named without settings gets the config's settings if the config has a suite of that name.

    Raises:
        UserError: there is no such suite.
    """
    if name is None:
        return configured
    parts = configured.suites if isinstance(configured, SeveralSuites) else (configured,)
    known = {suite.label: suite for suite in (*parts, configured)}
    try:
        given = parse_suites(name)
    except ValueError as error:
        raise UserError(f"suite: {error}") from None
    return as_suite([known.get(each, each) if isinstance(each, str) else each for each in given])


def _current_data(config: Config, file: Path, data: str | None) -> tuple[Config, Split]:
    """The config with the data's current path, and its test set; errors are those of :func:`_with_data`."""
    run = Run(file.parent)
    advice = f"rome evaluate {file} --data PATH, or correct data.path in {run.config_file}"
    return _with_data(config, data or run.data_path or config.data.path, str(run.folder), run.classes, advice)


def _with_data(
    config: Config, path: str | None, owner: str, classes: list[str] | None, advice: str
) -> tuple[Config, Split]:
    """The config with this path of its data, and its test set.

    Args:
        owner: the model, for messages.
        classes: the classes that the model was trained on; None if unknown.
        advice: how to give the path if the data has moved, for messages.

    Raises:
        UserError: the data is not there, cannot have a path, or has other classes.
    """
    if path != config.data.path:
        if type(config.data).model_fields["path"].annotation is type(None):
            raise UserError(f"--data {path}: the data of {owner} ({config.data.kind}) has no path; leave --data out")
        config = config.model_copy(update={"data": config.data.model_copy(update={"path": path})})
    try:
        split = config.data.open("test")
    except UserError as error:
        if path is None or Path(path).expanduser().exists():
            raise
        raise UserError(f"{error}. If it has moved: {advice}") from None
    if classes not in (None, list(split.classes)):
        raise UserError(
            f"{path} has other classes than {owner} was trained on: {_listed(split.classes)} instead of "
            f"{_listed(classes or ())}"
        )
    return config, split


def _hub_config(source: str, data: str | None) -> Config:
    """Make a config that evaluates a model on the Hub with its training config's data, threats and settings.

    It names the commit that the source refers to now.

    Raises:
        UserError: there is no such model, or rome did not push it; or as :func:`_with_data`.
    """
    commit = pinned(source)
    metadata, _ = read_tensors(commit, follow=True)
    if not metadata.get("config"):
        raise UserError(
            f"{source} holds no config of rome's, so its model and data are unknown; name them: "
            f"rome evaluate --model NAME --weights {source} --data DATA"
        )
    config = parse(metadata["config"])
    advice = f"rome evaluate {source} --data PATH"
    if data is None and config.data.path == PATH:
        raise UserError(f"the path of the data of {source} ({config.data.kind}) on this machine is unknown: {advice}")
    config, _ = _with_data(config, data or config.data.path, source, metadata.get("classes"), advice)
    kept = {name: getattr(config, name) for name in ("imports", "data", "threats", "device", "evaluation")}
    return Config(name=named_after(source), model=ModelSettings(name=commit), **kept)


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({some(names, 5)})"


def _from_checkpoint(run: Run, file: Path, data: str | None) -> tuple[nn.Module, Config, Split]:
    """Build the model of an unfinished run's checkpoint, and return it with its config and test set.

    Raises:
        UserError: the file is no checkpoint, or does not fit the run's config; or as :func:`_with_data`.
    """
    if file not in (run.checkpoint_file, run.before_file) or not file.is_file():
        raise UserError(
            f"there is no model at {file}; give a run's folder, its last.pt, or a model.safetensors that rome saved; "
            "for other models give --model and --data"
        )
    state: dict[str, Any] = run.load_checkpoint(file)
    config, split = _current_data(run.config, file, data)
    untrained = config.model.without_weights()  # the checkpoint has all weights
    model = build_model(untrained, config.experts, classes=len(split.classes), shape=split.shape)
    try:
        model.load_state_dict(state["model"])
        done = int(state["epoch"])
    except (RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not fit its config.yaml ({first_line(error)}); restore it") from error
    say(f"{file} is from an unfinished run, after {done} epochs")
    return model.eval(), config, split
