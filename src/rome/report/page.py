"""Runs and other models side by side: the table in the terminal, in Markdown, and on one HTML page with pictures."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from torch import Tensor

from rome.attacks import AttackThreat
from rome.core import trust
from rome.core.errors import UserError
from rome.core.files import make_folder, now, replace_file
from rome.evaluation.identity import hash_data, other_model
from rome.experts import expert_layers
from rome.report import charts, examples, gates
from rome.report.columns import by_class, covered, markdown, missing, show, tabulate
from rome.report.compared import config_differences, findings, gather
from rome.report.cost import macs
from rome.report.evaluated import Evaluated
from rome.report.figures import Options, registered
from rome.report.figures.training import HELD_OUT
from rome.report.robustbench import write_entries
from rome.report.routing import routing_numbers
from rome.report.subject import STEPS, Subject, short
from rome.threats import LpBall

EXAMPLES = 4
GATE_IMAGES, FEWEST_GATE_IMAGES = 256, 16
CPU_MACS = 3e12
"""Multiply-accumulates that gate statistics may take on a CPU; a larger model gets fewer images."""
FIGURES = ("fig7", "fig8", "figA3")
"""The paper's figures that cost little; `rome figures` makes all."""
SHOWN_EXPERTS = 8


@trust.opens_files
def write_report(
    runs: list[Path],
    out: Path,
    *,
    suite: str | None = None,
    unions: Sequence[Sequence[str]] = (),
    robustbench: bool = False,
    trust_code: bool = False,
    base: Path | None = None,
) -> Path:
    """Set what was evaluated side by side: the table on standard output, ``report.md`` and ``report.html`` in ``out``.

    Pictures that cannot be made (data or weights gone) are left out, and the page says why.

    Args:
        runs: folders of evaluated runs, and of evaluations of models that no run made.
        suite: which evaluation to show where there are several, ``unseen`` or ``unseen-500``; chosen by
            :func:`rome.report.compared.gather` unless given.
        unions: further columns, each the union over these cases.
        robustbench: also write RobustBench's entries into ``out`` (:func:`rome.report.robustbench.write_entries`).
        trust_code: let files run the code that they name (:mod:`rome.core.trust`).
        base: the one that the others are compared with, chosen before their numbers were seen; unless given, the best
            is (:func:`rome.report.compared.findings`).

    Returns:
        The HTML file: one file that needs no other and no network.

    Raises:
        UserError: a folder without a run or an evaluation, evaluations that cannot be compared, or an ``out`` that
            cannot be written.
    """
    compared = gather(runs if base is None else [base, *runs], suite)
    if compared[0].others and suite is None:
        others = ", ".join(compared[0].others)
        print(f"{compared[0].name} has other evaluations too (--suite shows them): {others}", file=sys.stderr)
    rows = [(run.name, run.report) for run in compared]
    for cases in unions:
        for run in compared:
            run.report.union_of(cases)  # are they there?
    make_folder(out)
    entries = write_entries(compared, out) if robustbench else []
    show(rows, unions)
    for entry in entries:
        print(entry, file=sys.stderr)
    sentences = findings(compared, compared[0] if base is not None else None)
    for sentence in sentences:
        print(sentence)

    columns, cells = tabulate(rows, unions)
    pictures = _Pictures(compared)
    notes, options = pictures.notes, [*(["--suite", suite] if suite else [])]
    options += [part for cases in unions for part in ("--union", ",".join(cases))]
    options += [*(["--base", str(base)] if base else []), *(["--robustbench"] if robustbench else [])]
    context: dict[str, Any] = {
        "runs": compared,
        "columns": columns,
        "cells": cells,
        "covered": covered(rows),
        "findings": sentences,
        "chart": Markup(charts.accuracies(rows, unions)),
        "classes": by_class([run.report for run in compared], pictures.classes()),
        "shots": _attempt(pictures.examples, notes, "examples"),
        "gates": _attempt(pictures.gates, notes, "gates"),
        "figures": _attempt(pictures.figures, notes, "figures") or [],
        "curves": _curves(compared),
        "differences": config_differences([run.config for run in compared if run.config]),
        "command": shlex.join(["rome", "report", *map(str, runs), "--out", str(out), *options]),
        "date": now(),
        "notes": notes,
        "nearly": gates.NEARLY_IDENTICAL,
        "missing": missing,
    }
    loader = PackageLoader("rome.report", "templates")
    pages = Environment(
        loader=loader, autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    pages.filters |= {"md": markdown, "yaml": lambda config: yaml.safe_dump(config.dump(), sort_keys=False)}
    for name in ("report.md", "report.html"):
        replace_file(out / name, pages.get_template(name).render(context).encode())
    return out / "report.html"


class _Pictures:
    """What needs the models and their test images; loads each once."""

    def __init__(self, runs: Sequence[Evaluated]) -> None:
        self.runs = runs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.notes: list[str] = []
        """Why there are no pictures of something."""

    @cached_property
    def opened(self) -> list[tuple[Evaluated, Subject]]:
        """Those whose model is there or can be built again; a note says why the others are not."""
        subjects = [(run, _attempt(partial(self._open, run), self.notes, run.name)) for run in self.runs]
        return [(run, subject) for run, subject in subjects if subject is not None]

    def _open(self, run: Evaluated) -> Subject:
        subject = run.subject(self.device)
        if differing := other_model(subject.model, run.report.settings["model"]):
            raise UserError(f"the model is not the one that was evaluated any more ({'; '.join(differing)})")
        return subject

    @property
    def subjects(self) -> list[Subject]:
        return [subject for _, subject in self.opened]

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """The evaluated examples, on the CPU."""
        report = self.runs[0].report
        x, y = (part.cpu() for part in self.subjects[0].images(report.n))
        if hash_data(x, y) != report.settings["data"]["sha256"]:
            raise UserError("the test images are not those that were evaluated")
        return x, y

    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes; None where the data is gone."""
        with suppress(UserError):
            return self.subjects[0].split.classes if self.subjects else None
        return None

    def figures(self) -> list[dict[str, Any]]:
        """The paper's figures that these runs have the data for, as far as they cost little here."""
        found = []
        for name in FIGURES if self.subjects else ():
            figure = registered()[name]()
            if name == "fig7" and not self._cheap_regions():
                continue
            try:
                data = figure.measure(self.subjects, Options())
            except UserError:  # not of these runs
                continue
            if name == "fig8" and not any(run["quantity"] == HELD_OUT for run in data["runs"]):
                continue  # the curves of training show as much
            about = " ".join((type(figure).__doc__ or "").split("\n\n")[0].split())
            picture = Markup(charts.themed(partial(figure.draw, data), figure.title))
            found.append({"title": figure.title[0].upper() + figure.title[1:], "about": about, "picture": picture})
        return found

    def _cheap_regions(self) -> bool:
        gated = [subject for subject in self.subjects if expert_layers(subject.model)]
        images = [len(subject.threats) * (1 + len(subject.threats)) for subject in gated]
        cost = sum(n * _attack_macs(each, each.split.shape) for n, each in zip(images, gated, strict=True))
        return bool(gated) and (self.device.type == "cuda" or cost <= CPU_MACS)

    def examples(self) -> dict[str, Any] | None:
        if not self.opened:
            return None
        x, y = self.data
        runs = [run for run, _ in self.opened]
        cases = examples.pictured(runs)
        if not cases:
            raise UserError("no attack was run on every model")
        rows = examples.pick(runs, EXAMPLES)
        if not rows:
            raise UserError("no test example is classified right by every run")
        return examples.describe(self.opened, x, y, rows, cases)

    def gates(self) -> list[dict[str, Any]]:
        found = []
        for run, subject in self.opened:
            trainable = (LpBall, AttackThreat)
            trained = {name: threat for name, threat in run.threats.items() if isinstance(threat, trainable)}
            if not trained or not expert_layers(subject.model):
                continue
            (x, y), n = self.data, GATE_IMAGES
            if self.device.type != "cuda":
                each = len(trained) * _attack_macs(subject, (x.shape[1], x.shape[2], x.shape[3]))
                n = int(min(n, max(FEWEST_GATE_IMAGES, CPU_MACS // max(each, 1))))
            n = min(n, len(x))
            print(f"{run.name}: gates on {n} images under {', '.join(trained)}", file=sys.stderr, flush=True)
            sample = gates.collect(subject.model, x[:n].to(self.device), y[:n].to(self.device), trained)
            found.append({"run": run, "sample": sample, **_gate_pictures(sample)})
        return found


def _attack_macs(subject: Subject, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of attacking one image under one threat; a backward costs two forwards."""
    return macs(subject.model, shape) * STEPS * 3


def _gate_pictures(sample: gates.GateSample) -> dict[str, Any]:
    """Densities of each expert's weight in the last layer and on average over layers, with the numbers beside them."""
    last, mean = sample.weights[:, -1], sample.weights.mean(axis=1)
    experts = gates.distinct_experts(last.mean(axis=1), SHOWN_EXPERTS)
    where = short(sample.layers[-1])
    shown = [(f"Gate of {where}", last)]
    if len(sample.layers) > 1:
        shown = [(f"Last layer ({where})", last), ("Mean over layers", mean)]
    rows = []
    for title, weights in shown:
        span = charts.limits(weights[..., experts])
        groups = [dict(zip(sample.groups, weights[:, :, k], strict=True)) for k in experts]
        panels = [charts.densities(each, f"expert {k + 1}", span) for k, each in zip(experts, groups, strict=True)]
        rows.append((title, [Markup(panel) for panel in panels]))
    entropy = [
        (name, float(sample.entropy[i, -1].mean()), float(sample.entropy[i].mean()), last[i].mean(axis=0).tolist())
        for i, name in enumerate(sample.groups)
    ]
    return {
        "rows": rows,
        "experts": experts,
        "pairs": gates.pairs(sample),
        "routing": routing_numbers(sample) if len(sample.groups) > 2 and sample.n > 1 else None,
        "entropy": entropy,
        "summary": gates.summary(sample),
    }


def _curves(runs: Sequence[Evaluated]) -> dict[str, Any] | None:
    logs = {
        run.name: [line for line in run.run.log() if line.get("event") == "epoch"] if run.run else [] for run in runs
    }
    if not any(logs.values()):
        return None
    natural = max(run.config.natural_epochs for run in runs if run.config)
    return {"charts": [Markup(chart) for chart in charts.histories(logs, natural=natural)], "natural": natural}


def _attempt(make: Callable[[], Any], notes: list[str], what: str) -> Any:
    """The result, or None and a note why not: a report without pictures is still a report."""
    try:
        return make()
    except UserError as error:
        notes.append(f"No pictures of {what}: {error}")
        print(notes[-1], file=sys.stderr)
        return None
