"""The model card of a run shared on the Hub: the model, its robustness, how to use and reproduce it, and its limits."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import timm
from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData, eval_result_entries_to_yaml
from timm.models import get_pretrained_cfg

from rome.attacks.suites.base import AutoAttackSuite
from rome.attacks.suites.unseen import CorruptionsSuite, UnseenSuite
from rome.core.component import Component
from rome.core.errors import some
from rome.core.trust import names_code
from rome.data import Cifar10
from rome.evaluation.evaluate import Report
from rome.evaluation.result import CLEAN
from rome.evaluation.statistics import wilson
from rome.methods import Method
from rome.models.hub import HubModel, on_hub
from rome.report.columns import Cell, protocol, remarks, tabulate
from rome.report.evaluated import LEARNED, Evaluated
from rome.report.templating import filled
from rome.runs.config import Config
from rome.threats import LpBall

DATA_SETS = {Cifar10.kind: "uoft-cs/cifar10"}
"""Kinds of data -> their repository on the Hub, for the data sets that are there."""
SUITES = {
    AutoAttackSuite.kind: "AutoAttack's four attacks",
    UnseenSuite.kind: "attacks beyond Lp balls",
    CorruptionsSuite.kind: "common corruptions",
}
"""Suites that readers of a model card expect -> what they evaluate."""
CLASSES_SHOWN = 100
ROME = "kim2026rome"


class Row(NamedTuple):
    """One accuracy of the table."""

    title: str
    cell: Cell


class Shown(NamedTuple):
    """One evaluation as the card shows it."""

    report: Report
    rows: list[Row]
    suite: str
    routing: str
    source: str
    command: str

    @property
    def title(self) -> str:
        gates = "" if self.routing == LEARNED else f", {self.routing} gates"
        return f"Suite {self.suite}, {self.report.n} examples{gates}"


class Base(NamedTuple):
    """The model on the Hub that training started from."""

    repository: str
    license: str = ""


def model_card(
    config: Config,
    evaluations: Sequence[Evaluated],
    repo: HubModel,
    *,
    facts: Mapping[str, Any],
    usage: str = "",
    license: str | None = None,
) -> str:
    """Write the README.md of a repository: metadata for the Hub, then Markdown.

    Args:
        config: config of the run, without paths.
        evaluations: at least one evaluation; the metadata has the results of the first.
        facts: metadata of the weights file, and the code that ``changed`` during training.
        usage: code that loads the model with timm; empty if timm cannot.
        license: the Hub's identifier of a licence.
    """
    base, data, classes = starts_from(config), evaluations[0].data, list(facts.get("classes") or ())
    number = evaluations[0].report.settings["classes"]
    needs_path = data is not None and data.path is not None
    shown = [_shown(one, repo, needs_path) for one in evaluations]
    code = config.model.name if names_code(config.model.name) else ""
    shape = evaluations[0].report.settings["data"]["shape"][1:]
    values: dict[str, Any] = {
        "repo": repo,
        "config": config,
        "architecture": evaluations[0].architecture,
        "method": evaluations[0].method,
        "trained_on": [_ball(threat.name, threat) for threat in config.threats],
        "version": facts.get("version", ""),
        "evaluations": shown,
        "remarks": remarks,
        "usage": usage or _usage(repo, code),
        "timm": bool(usage),
        "shape": shape,
        "classes": classes if len(classes) <= CLASSES_SHOWN else (),
        "own_code": code,
        "train": shlex.join(
            ["rome", "train", "config.yaml", *["data.path=PATH"] * needs_path, "--out", f"runs/{config.name}"]
        ),
        "needs_path": needs_path,
        "from_hub": on_hub(config.model.weights),
        "settings": _settings(config, evaluations[0].report),
        "examples": _examples(evaluations),
        "chance": f"{100 / number:.3g}% ({number} classes)",
        "at_chance": _at_chance(evaluations[0].report, number),
        "limits": _limits(evaluations, facts.get("changed", ())),
        "license": license,
        "base": base,
        "citations": citations(config),
    }
    body = re.sub(r"\n{3,}", "\n\n", filled("card.md", **values))
    return f"---\n{_metadata(config, shown[0], repo, base, bool(usage), license).to_yaml()}\n---\n\n{body}"


def eval_results(config: Config, one: Evaluated, repo: HubModel) -> list[dict[str, Any]]:
    """Convert an evaluation to the Hub's format of ``.eval_results/*.yaml``; empty if the Hub lacks the data set."""
    if config.data.kind not in DATA_SETS:
        return []
    shown = _shown(one, repo, True)
    note = f"{shown.suite}, {one.report.n} test examples, seed {one.report.settings['seed']}, one training seed"
    entries = []
    for row in _with_numbers(shown.rows):
        span = f", 95% interval {row.cell.span}" if row.cell.span else ""
        entries.append(
            EvalResultEntry(
                dataset_id=DATA_SETS[config.data.kind],
                task_id=row.title.partition(" (")[0],
                value=round(100 * row.cell.value, 2),
                date=one.report.date[:10] or None,
                source_url=f"https://huggingface.co/{repo.repository}",
                source_name="Result and per-example matrix",
                notes=f"accuracy in percent, {row.title}; {note}{span}",
            )
        )
    return eval_result_entries_to_yaml(entries)


def citations(config: Config) -> list[str]:
    """Return the BibTeX entries of RoME and of the method that a run was trained with."""
    known = {
        found.group(1): found.group()
        for found in re.finditer(
            r"^@\w+\{(.+?),$.*?^\}$", files("rome.methods").joinpath("papers.bib").read_text("utf-8"), re.M | re.S
        )
    }
    return [known[key] for key in (ROME, *Method.of_kind(config.method.kind).papers)]


def starts_from(config: Config) -> Base | None:
    """Return the model on the Hub whose weights training started from, if any."""
    model = config.model
    if on_hub(model.weights):
        return Base(HubModel.parse(model.weights).repository)
    if model.pretrained and timm.is_model(model.name):
        known = get_pretrained_cfg(model.name)
        return Base(known.hf_hub_id, known.license or "") if known is not None and known.hf_hub_id else None
    return None


def _metadata(
    config: Config, one: Shown, repo: HubModel, base: Base | None, plain: bool, license: str | None
) -> ModelCardData:
    """Build the metadata by which the Hub finds models and shows their results."""
    norms = [threat.norm.lower() for threat in config.threats if isinstance(threat, LpBall)]
    experts = [] if config.experts is None else ["mixture-of-experts"]
    known = DATA_SETS.get(config.data.kind)
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=known or config.data.kind,
            dataset_name=config.data.kind,
            dataset_split="test",
            metric_type="accuracy",
            metric_name=f"{row.title}, percent; {one.suite}, {one.report.n} examples",
            metric_value=round(100 * row.cell.value, 2),
        )
        for row in _with_numbers(one.rows)
    ]
    return ModelCardData(
        license=license,
        library_name="timm" if plain else "rome",
        pipeline_tag="image-classification",
        tags=["rome", "adversarial-robustness", "adversarial-training", config.method.kind, *norms, *experts],
        datasets=[known] if known else None,
        metrics=["accuracy"],
        base_model=base and base.repository,
        model_name=repo.name,
        eval_results=results,
    )


def _with_numbers(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not math.isnan(row.cell.value)]


def _shown(one: Evaluated, repo: HubModel, needs_path: bool) -> Shown:
    titles, (cells,) = tabulate([("", one.report)])
    threats = one.threats
    rows = [Row(_ball(title, threats.get(title)), cell) for title, cell in zip(titles, cells, strict=True)]
    routing = one.provenance.get("routing", LEARNED)
    words = ["rome", "evaluate", str(repo), "--suite", one.report.suite, "--n", str(one.report.n)]
    words += ["--data", "PATH"] * needs_path + ["--routing", routing] * (routing != LEARNED)
    words += ["--search-precision", one.report.search_precision] * (one.report.search_precision != "fp32")
    source = "" if one.data is None else f" of {one.data.kind}"
    return Shown(one.report, rows, protocol(one.report), routing, source, shlex.join(words))


def _ball(title: str, threat: object) -> str:
    """Return the name of a case or a threat, with its radius if it is a ball."""
    return f"{title} (ε = {threat.radius})" if isinstance(threat, LpBall) else title


def _usage(repo: HubModel, code: str) -> str:
    loaded = f'rome.load_model("{repo}", module)' if code else f'rome.load_model("{repo}")'
    return f"import rome  # pip install rome-robust\nmodel = {loaded}\nlogits = model(images)"


def _settings(config: Config, report: Report) -> dict[str, str]:
    """Return how the model was trained: label -> value."""
    limit, natural = config.data.train_limit, config.natural_epochs
    versions = report.settings.get("versions", {})
    return {
        "data": config.data.kind + (f", the first {limit} training examples" if limit else ""),
        "method": config.method.kind,
        "experts": "none" if config.experts is None else _settings_of(config.experts, "kind", "experts", "rank"),
        "training attack": config.method.own_attack or _settings_of(config.attack, "kind", "steps"),
        "threats": ", ".join(_ball(threat.name, threat) for threat in config.threats),
        "epochs": f"{config.epochs}" + (f" (the first {natural} natural)" if natural else ""),
        "batch size": str(config.batch_size),
        "optimizer": _settings_of(config.optimizer, "kind", "lr", "weight_decay"),
        "precision": config.precision,
        "training seed": str(config.seed),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


def _settings_of(component: Component, *names: str) -> str:
    """Format the named settings that a component has, such as ``pgd, steps 10``."""
    values = {name: value for name, value in component.dump().items() if value is not None}
    return ", ".join(values[name] if name == "kind" else f"{name} {values[name]}" for name in names if name in values)


def _examples(evaluations: Sequence[Evaluated]) -> str:
    """Describe how precise the numbers are, given the number of examples."""
    report = evaluations[0].report
    low, high = wilson(round(report.n / 2), report.n)
    return f"With {report.n} test examples, an accuracy near 50% is known to within ±{50 * (high - low):.1f} points."


def _at_chance(report: Report, classes: int) -> str:
    """Name the accuracies that are not clearly better than guessing, in a sentence."""
    low = [
        name for name in (CLEAN, *report.attacks) if name in report.cases and report.interval(name)[0] <= 1 / classes
    ]
    return f" Not clearly better than guessing: {some(low, 10)}." if low else ""


def _limits(evaluations: Sequence[Evaluated], changed: Sequence[str]) -> list[str]:
    """List what was not evaluated, what the evaluations warn of, and code that changed during training."""
    run = {part for one in evaluations for part in one.report.suite.split("+")}
    left = [] if "all" in run else [f"{what} (`--suite {suite}`)" for suite, what in SUITES.items() if suite not in run]
    found = [f"Not evaluated: {', '.join(left)}."] if left else []
    warned: dict[tuple[str, str], list[str]] = {}
    for one in evaluations:
        for each in one.report.warnings:
            warned.setdefault((each["message"], one.report.suite), []).append(each["case"] or each["check"])
    found += [f"Warning (suite {suite}: {', '.join(cases)}): {message}." for (message, suite), cases in warned.items()]
    checks = [check for one in evaluations for check in one.report.checks]
    if not checks:
        found.append("Not checked for masked gradients (`rome evaluate --checks`).")
    elif not any(check["raised"] for check in checks):
        found.append(f"Checks for masked gradients ({len(checks)}) found none, which is no proof.")
    return found + ([f"The code changed during training: {'; '.join(changed)}."] if changed else [])
