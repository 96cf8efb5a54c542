"""Reports that compare runs and other models: a table in the terminal, Markdown, and one HTML page with pictures."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rome.attacks import AttackThreat
from rome.core import trust
from rome.core.console import print_table
from rome.core.errors import UserError
from rome.core.files import csv_text, flatten, make_folder, now, replace_file
from rome.evaluation.identity import hash_data, other_model
from rome.experts import expert_layers
from rome.report import charts, examples, gates
from rome.report.columns import by_class, columns_of, covered, remarks, show, tabulate
from rome.report.compared import config_differences, findings, gather, headline, outstanding
from rome.report.cost import macs
from rome.report.evaluated import Evaluated
from rome.report.figures import Options, registered
from rome.report.figures.densities import SHOWN, GateDensities
from rome.report.figures.training import HELD_OUT
from rome.report.robustbench import write_entries
from rome.report.routing import routing_numbers
from rome.report.seeds import by_seed, csv_rows, seed_findings, seed_headline, seed_table
from rome.report.subject import STEPS, Subject
from rome.report.templating import filled
from rome.threats import LpBall

EXAMPLES = 4
GATE_IMAGES, FEWEST_GATE_IMAGES = 256, 16
CPU_MACS = 3e12
"""Multiply-accumulates that attacks for one model's pictures may take on a CPU; a larger model gets fewer images."""
FIGURES = ("fig7", "fig8", "figA3")
"""The paper's figures that are cheap enough for a report; `rome figures` makes all."""


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
    """Compare evaluated models: print a table, and write ``report.md``, ``report.html`` and ``report.csv`` into
    ``out``.

    Runs that differ only in the seed are also summarised together (:mod:`rome.report.seeds`). Pictures that cannot be
    made, because data or weights are gone, are left out, and the page says why.

    Args:
        runs: folders of evaluated runs, of evaluations of models without a run, and folders that contain such folders.
        suite: which evaluation to show if there are several, ``unseen`` or ``unseen-500``; chosen by
            :func:`rome.report.compared.gather` by default.
        unions: sets of cases, each of which gets a further column with its union.
        robustbench: whether to write RobustBench's entries into ``out``
            (:func:`rome.report.robustbench.write_entries`).
        trust_code: whether files may run the code that they name (:mod:`rome.core.trust`).
        base: folder of the model that the others are compared with, chosen before their numbers were seen; by default
            they are compared with the best (:func:`rome.report.compared.findings`).

    Returns:
        The HTML file, which needs no other file and no network.

    Raises:
        UserError: a folder contains neither a run nor an evaluation, the evaluations cannot be compared, or ``out``
            cannot be written.
    """
    compared = gather(runs if base is None else [base, *runs], suite)
    if compared[0].others and suite is None:
        others = ", ".join(compared[0].others)
        print(f"{compared[0].name} has other evaluations too (--suite shows them): {others}", file=sys.stderr)
    rows = [(run.name, run.report) for run in compared]
    for cases in unions:
        for run in compared:
            run.report.union_of(cases)  # raises if a case is missing
    make_folder(out)
    entries = write_entries(compared, out) if robustbench else []
    show(rows, unions)
    for entry in entries:
        print(entry, file=sys.stderr)
    groups = by_seed(compared)
    seeds = seed_table(groups) if groups else None
    if seeds is not None:
        print_table(seeds[1], seeds[0])
        print("accuracy in percent; mean \N{PLUS-MINUS SIGN} standard deviation over the training seeds")
    first = compared[0] if base is not None else None
    over_seeds = seed_findings(groups) if base is None else []
    sentences = over_seeds or findings(compared, first)
    for sentence in sentences:
        print(sentence)

    columns, cells = tabulate(rows, unions)
    reports = [run.report for run in compared]
    best = outstanding(reports, columns_of(reports, unions))
    configs = [run.config for run in compared if run.config]
    chosen = {key for config in configs for key in flatten(config.model_dump(mode="json", exclude_defaults=True))}
    differences = config_differences(configs)
    pictures = _Pictures(compared)
    options = [("--suite", suite), *(("--union", ",".join(cases)) for cases in unions), ("--base", base)]
    words = [word for option, value in options if value for word in (option, str(value))]
    natural = max((run.config.natural_epochs for run in compared if run.config), default=0)
    context: dict[str, Any] = {
        "runs": compared,
        "columns": columns,
        "cells": [[cell._replace(best=(i, j) in best) for j, cell in enumerate(line)] for i, line in enumerate(cells)],
        "covered": covered(rows),
        "findings": sentences,
        "headline": seed_headline(groups) if over_seeds else headline(compared, first),
        "seeds": seeds,
        "classes": by_class(reports, pictures.classes()),
        "shots": pictures.attempt(pictures.examples, "examples"),
        "gates": pictures.attempt(pictures.gates, "gates"),
        "figures": pictures.attempt(pictures.figures, "figures"),
        "curves": charts.histories({run.name: run.run.log() if run.run else [] for run in compared}, natural=natural),
        "natural": natural,
        "differences": {key: values for key, values in differences.items() if key in chosen},
        "defaults": {key: values for key, values in differences.items() if key not in chosen},
        "command": shlex.join(
            ["rome", "report", *map(str, runs), "--out", str(out), *words, *["--robustbench"] * robustbench]
        ),
        "date": now(),
        "notes": pictures.notes,
        "nearly": gates.NEARLY_IDENTICAL,
        "remarks": remarks,
    }
    replace_file(out / "report.csv", csv_text(csv_rows(compared)).encode())
    for name in ("report.md", "report.html"):
        replace_file(out / name, filled(name, **context).encode())
    return out / "report.html"


class _Pictures:
    """The parts of a report that need the models and their test images, each of which is loaded once."""

    def __init__(self, runs: Sequence[Evaluated]) -> None:
        self.runs = runs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.notes: list[str] = []
        """Reasons why pictures are missing."""

    def attempt(self, make: Callable[[], Any], what: str) -> Any:
        """Return the result of ``make``, or None and note why it failed; a report without pictures is still useful."""
        try:
            return make()
        except UserError as error:
            self.notes.append(f"No pictures of {what}: {error}")
            print(self.notes[-1], file=sys.stderr)
            return None

    @cached_property
    def opened(self) -> list[tuple[Evaluated, Subject]]:
        """The runs whose model could be opened, each with the model; a note says why the others are left out."""
        subjects = [(run, self.attempt(partial(self._open, run), run.name)) for run in self.runs]
        return [(run, subject) for run, subject in subjects if subject is not None]

    def _open(self, run: Evaluated) -> Subject:
        subject = run.subject(self.device)
        if differing := other_model(subject.model, run.report.settings["model"]):
            raise UserError(f"the model is no longer the one that was evaluated ({'; '.join(differing)})")
        return subject

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        """The evaluated images and their labels, on the CPU."""
        report = self.runs[0].report
        x, y = (part.cpu() for part in self.opened[0][1].images(report.n))
        if hash_data(x, y) != report.settings["data"]["sha256"]:
            raise UserError("the test images are not the ones that were evaluated")
        return x, y

    def classes(self) -> tuple[str, ...] | None:
        """Return the names of the classes; None if the data is gone."""
        with suppress(UserError):
            return self.opened[0][1].split.classes if self.opened else None
        return None

    def affordable(self, subject: Subject) -> int:
        """Return how many images may be attacked here, each under one threat; a backward pass costs two forwards."""
        if self.device.type == "cuda":
            return sys.maxsize
        return int(CPU_MACS // (3 * STEPS * max(macs(subject.model, subject.split.shape), 1)))

    def figures(self) -> list[dict[str, Any]]:
        """Draw those of the paper's figures that these runs have the data for and that are cheap enough here."""
        subjects = [subject for _, subject in self.opened]
        gated = [subject for subject in subjects if expert_layers(subject.model)]
        found = []
        for name in FIGURES if subjects else ():
            figure = registered()[name]()
            # fig7 attacks each region under each threat
            if name == "fig7" and any(len(s.threats) * (1 + len(s.threats)) > self.affordable(s) for s in gated):
                continue
            try:
                data = figure.measure(subjects, Options())
            except UserError:  # these runs lack its data
                continue
            if name == "fig8" and not any(run["quantity"] == HELD_OUT for run in data["runs"]):
                continue  # the training curves already show the same
            about = " ".join((type(figure).__doc__ or "").split("\n\n")[0].split())
            picture = charts.themed(partial(figure.draw, data), figure.title)
            found.append({"title": figure.title[0].upper() + figure.title[1:], "about": about, "picture": picture})
        return found

    def examples(self) -> dict[str, Any] | None:
        if not self.opened:
            return None
        runs, data = [run for run, _ in self.opened], self.data
        cases = examples.pictured(runs)
        if not cases:
            raise UserError("no attack was run on every model")
        rows = examples.pick(runs, EXAMPLES)
        if not rows:
            raise UserError("no test example is classified correctly by every run")
        return examples.describe(self.opened, *data, rows, cases)

    def gates(self) -> list[dict[str, Any]]:
        """Collect for each model with experts its gates on clean images and under those threats one can train on."""
        found = []
        for run, subject in self.opened:
            trained = {name: each for name, each in run.threats.items() if isinstance(each, (LpBall, AttackThreat))}
            if not trained or not expert_layers(subject.model):
                continue
            x, y = self.data
            n = min(len(x), GATE_IMAGES, max(FEWEST_GATE_IMAGES, self.affordable(subject) // len(trained)))
            print(f"{run.name}: gates on {n} images under {', '.join(trained)}", file=sys.stderr, flush=True)
            sample = gates.collect(subject.model, x[:n].to(self.device), y[:n].to(self.device), trained)
            drawn = {"runs": [GateDensities.of_sample(run.name, sample, sample.layers[-1])]}
            found.append(
                {
                    "run": run.name,
                    "sample": sample,
                    "experts": gates.distinct_experts(sample.weights[:, -1].mean(axis=1), SHOWN),
                    "picture": charts.themed(partial(GateDensities().draw, drawn), GateDensities.title),
                    "pairs": gates.pairs(sample),
                    "routing": routing_numbers(sample) if len(sample.groups) > 2 and sample.n > 1 else None,
                    "summary": gates.summary(sample),
                }
            )
        return found
