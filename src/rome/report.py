"""Runs side by side: the table in the terminal, in Markdown, and on one HTML page with pictures."""

from __future__ import annotations

import datetime
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from rome.analysis import charts, examples, gates
from rome.analysis.compared import Evaluated, config_differences, gather, paired
from rome.cost import macs
from rome.errors import UserError
from rome.evaluate import Report
from rome.evaluation.store import hash_data
from rome.experts import expert_layers
from rome.files import replace_file
from rome.models import load_model
from rome.terminal import print_table

AVERAGE, UNION = "average", "union"
DASH = "\N{EN DASH}"
EXAMPLES = 4
GATE_IMAGES, FEWEST_GATE_IMAGES = 256, 16
CPU_MACS = 3e12
"""Multiply-accumulates that gate statistics may take on a CPU; a larger model is asked about fewer images."""
SHOWN_EXPERTS = 8


class Cell(NamedTuple):
    """One number of the table, as shares; NaN where there is none."""

    value: float
    interval: tuple[float, float] | None
    best: bool

    @property
    def percent(self) -> str:
        return DASH if math.isnan(self.value) else f"{100 * self.value:.1f}"

    @property
    def span(self) -> str:
        """The 95% interval, ``68.2–77.4``."""
        if self.interval is None or math.isnan(self.interval[0]):
            return ""
        return DASH.join(f"{100 * end:.1f}" for end in self.interval)


def tabulate(rows: Sequence[tuple[str, Report]]) -> tuple[list[str], list[list[Cell]]]:
    """Column names (clean, the cases, average, union) and a row of cells for each report.

    The largest number of a column, as printed, is its best; there is none where there is one row.
    """
    columns = [*dict.fromkeys(case for _, report in rows for case in report.cases), AVERAGE, UNION]
    values = [[_value(report, column) for column in columns] for _, report in rows]
    shown = [[-1.0 if math.isnan(value) else round(100 * value, 1) for value in row] for row in values]
    best = [max(column) for column in zip(*shown, strict=True)]
    cells = []
    for (_, report), row, rounded in zip(rows, values, shown, strict=True):
        intervals = [
            None if column == AVERAGE or math.isnan(value) else report.interval(column)
            for column, value in zip(columns, row, strict=True)
        ]
        marks = [len(rows) > 1 and number == top >= 0 for number, top in zip(rounded, best, strict=True)]
        cells.append([Cell(*cell) for cell in zip(row, intervals, marks, strict=True)])
    return columns, cells


def show(rows: list[tuple[str, Report]]) -> None:
    """Print accuracies in percent with their 95% intervals; the best of each column is bold, or starred in a pipe."""
    columns, cells = tabulate(rows)
    console = Console(highlight=False)
    star = "" if console.is_terminal and not console.no_color else "*"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("method", overflow="fold", min_width=8)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for (name, _), row in zip(rows, cells, strict=True):
        texts = []
        for cell in row:
            text = Text(star * cell.best + cell.percent, style="bold" if cell.best else "")
            texts.append(text.append(f"\n{cell.span}", style="not bold dim") if cell.span else text)
        table.add_row(Text(name, style="bold"), *texts)
    print_table(table, console)
    counts, suites = _counts_and_suites(rows)
    best = f"; {star or 'bold'} is best" if len(rows) > 1 else ""
    caption = f"n = {counts}, suite {suites}; percent right over its 95% interval{best}"
    console.print(caption, style="dim", soft_wrap=not console.is_terminal)
    for name, report in rows:
        for case, reason in report.failed.items():
            console.print(f"{name}: {case} failed ({reason}), so there is no average and no union", soft_wrap=True)


def write_report(runs: list[Path], out: Path) -> Path:
    """Set evaluated runs side by side: the table on standard output, ``report.md`` and ``report.html`` in ``out``.

    Pictures that cannot be made (data or weights gone) are left out, and the page says why.

    Returns:
        The HTML file: one file that needs no other and no network.

    Raises:
        UserError: a folder without a run, a run without an evaluation, or evaluations that cannot be compared.
    """
    compared = gather(runs)
    rows = [(run.name, run.report) for run in compared]
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out names a folder")
    show(rows)
    findings = compare(compared)
    for sentence in findings:
        print(sentence)

    columns, cells = tabulate(rows)
    notes: list[str] = []
    pictures = _Pictures(compared)
    context: dict[str, Any] = {
        "title": ", ".join(run.name for run in compared),
        "runs": compared,
        "columns": columns,
        "cells": cells,
        "covered": _covered(rows),
        "findings": findings,
        "eps": {name: threat.dump().get("eps") for name, threat in compared[0].threats.items()},
        "chart": Markup(charts.accuracies(rows)),
        "shots": _attempt(pictures.examples, notes, "examples"),
        "gates": _attempt(pictures.gates, notes, "gates"),
        "curves": _curves(compared),
        "differences": config_differences([run.config for run in compared]),
        "yaml": [yaml.safe_dump(run.config.dump(), sort_keys=False) for run in compared],
        "command": shlex.join(["rome", "report", *map(str, runs), "--out", str(out)]),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "notes": notes,
        "nearly": gates.NEARLY_IDENTICAL,
    }
    pages = Environment(
        loader=PackageLoader("rome", "templates"),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.filters["md"] = _markdown
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "report.html"):
        replace_file(out / name, pages.get_template(name).render(context).encode())
    return out / "report.html"


def compare(runs: Sequence[Evaluated]) -> list[str]:
    """What the unions say, and which differences the examples cannot decide."""
    if any(run.report.failed for run in runs):
        return ["A case failed, so there is no union to compare; run `rome evaluate` again to complete it."]
    best = max(runs, key=lambda run: run.report.union)
    share, n, cases = f"{best.report.union:.1%}", best.report.n, ", ".join(best.report.cases[1:])
    text = [f"{best.name} classifies {share} of {n} test examples right under every attack ({cases})."]
    for run in runs:
        if run is not best:
            difference = paired(best.report, run.report)
            span = f"95% interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
            meaning = (
                "more than the choice of examples explains"
                if difference.clear
                else "within what the choice of examples explains"
            )
            ahead = f"{100 * difference.value:.1f} points above {run.name}"
            text.append(f"That is {ahead} on the same examples ({span}): {meaning}.")
    if len(runs) > 1:
        text.append("The intervals do not cover the training seed: another one can move a number by points.")
    return text


class _Pictures:
    """What needs the models and their test images; loads each once."""

    def __init__(self, runs: Sequence[Evaluated]) -> None:
        self.runs = runs
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._models: dict[str, nn.Module] = {}
        self._data: tuple[Tensor, Tensor, tuple[str, ...]] | None = None

    def model(self, run: Evaluated) -> nn.Module:
        if run.name not in self._models:
            if not run.run.finished:
                raise UserError(f"{run.run.folder} holds no finished model (model.safetensors)")
            self._models[run.name] = load_model(run.run.model_file).to(self.device)
        return self._models[run.name]

    def data(self) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """The evaluated examples and the names of their classes."""
        if self._data is None:
            report = self.runs[0].report
            split = self.runs[0].config.data.open("test")
            x, y = split.first(min(report.n, len(split)))
            if hash_data(x, y) != report.settings["data"]["sha256"]:
                raise UserError("the test images are not those that were evaluated")
            self._data = x, y, split.classes
        return self._data

    def examples(self) -> dict[str, Any] | None:
        x, y, classes = self.data()
        rows = examples.pick(self.runs, EXAMPLES)
        if not rows:
            raise UserError("no test example is classified right by every run")
        chosen = torch.tensor(rows)
        models = [self.model(run) for run in self.runs]
        found = [examples.adversarial(run, model, x, y, rows) for run, model in zip(self.runs, models, strict=True)]
        scale = examples.scales(found, x[chosen])
        described = [
            examples.describe(run, model, x[chosen], y[chosen], rows, images, scale, classes)
            for run, model, images in zip(self.runs, models, found, strict=True)
        ]
        return {"scale": scale, "gray": x.shape[1] != 3, "runs": list(zip(self.runs, described, strict=True))}

    def gates(self) -> list[dict[str, Any]]:
        found = []
        for run in self.runs:
            if run.config.experts is None:
                continue
            x, y, _ = self.data()
            model = self.model(run)
            if not expert_layers(model):
                continue
            n = min(self._affordable(model, x, len(run.threats)), len(x))
            print(f"{run.name}: gates on {n} images under {', '.join(run.threats)}", file=sys.stderr, flush=True)
            sample = gates.collect(model, x[:n].to(self.device), y[:n].to(self.device), run.threats)
            found.append({"run": run, "sample": sample, **_gate_pictures(sample)})
        return found

    def _affordable(self, model: nn.Module, x: Tensor, threats: int) -> int:
        if self.device.type == "cuda":
            return GATE_IMAGES
        shape = (x.shape[1], x.shape[2], x.shape[3])
        each = macs(model, shape) * threats * 15 * 3  # a backward costs two forwards
        return int(min(GATE_IMAGES, max(FEWEST_GATE_IMAGES, CPU_MACS // max(each, 1))))


def _gate_pictures(sample: gates.GateSample) -> dict[str, Any]:
    """Densities of each expert's weight in the last layer and on average over layers, with the numbers beside them."""
    last, mean = sample.weights[:, -1], sample.weights.mean(axis=1)
    spread = last.mean(axis=1).max(axis=0) - last.mean(axis=1).min(axis=0)  # (K,): between the groups' means
    experts = sorted(sorted(range(sample.experts), key=lambda k: -spread[k])[:SHOWN_EXPERTS])
    rows = []
    for title, weights in ((f"Last layer ({sample.layers[-1]})", last), ("Mean over layers", mean)):
        span = charts.limits(weights[..., experts])
        panels = [
            charts.densities({name: weights[i, :, k] for i, name in enumerate(sample.groups)}, f"expert {k + 1}", span)
            for k in experts
        ]
        rows.append((title, [Markup(panel) for panel in panels]))
    entropy = [
        (name, float(sample.entropy[i, -1].mean()), float(sample.entropy[i].mean()), last[i].mean(axis=0).tolist())
        for i, name in enumerate(sample.groups)
    ]
    return {
        "rows": rows,
        "experts": experts,
        "pairs": gates.pairs(sample),
        "entropy": entropy,
        "summary": gates.summary(sample),
    }


def _curves(runs: Sequence[Evaluated]) -> dict[str, Any] | None:
    logs = {run.name: [line for line in run.run.log() if line.get("event") == "epoch"] for run in runs}
    if not any(logs.values()):
        return None
    natural = max(run.config.natural_epochs for run in runs)
    return {"charts": [Markup(chart) for chart in charts.histories(logs, natural=natural)], "natural": natural}


def _attempt(make: Callable[[], Any], notes: list[str], what: str) -> Any:
    """The result, or None and a note why not: a report without pictures is still a report."""
    try:
        return make()
    except UserError as error:
        notes.append(f"No pictures of {what}: {error}")
        print(notes[-1], file=sys.stderr)
        return None


def _value(report: Report, column: str) -> float:
    if column in (AVERAGE, UNION, "clean"):
        return float(getattr(report, column))
    return report.robust.get(column, math.nan)


def _covered(rows: Sequence[tuple[str, Report]]) -> str:
    """``360 test examples, suite apgd``."""
    counts, suites = _counts_and_suites(rows)
    return f"{counts} test examples, suite {suites}"


def _counts_and_suites(rows: Sequence[tuple[str, Report]]) -> tuple[str, str]:
    counts = dict.fromkeys(str(report.n) for _, report in rows)
    suites = dict.fromkeys(_suite(report) for _, report in rows)
    return " / ".join(counts), " / ".join(suites)


def _suite(report: Report) -> str:
    settings = report.settings.get("suite", {})
    iterations = settings.get("iterations", 100)
    return str(settings.get("kind", "of your own")) + (f" ({iterations} iterations)" if iterations != 100 else "")


def _markdown(value: object) -> str:
    """Text that a Markdown table and a renderer of HTML leave as it is."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(text.split())
