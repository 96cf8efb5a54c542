"""Sweeps: train, evaluate and compare many runs, one for each combination of configs and values of some keys.

Each point is a separate run in ``OUT/NAME-key=value``, trained and evaluated in its own process
(:mod:`rome.runs.launchers`), so that a crash does not affect the others. Calling the same sweep again continues with
whatever is unfinished. Points that differ only in the seed share a row of the table: mean and standard deviation.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rome.core import trust
from rome.core.console import print_table
from rome.core.distributed import launched
from rome.core.errors import UserError
from rome.core.files import as_file_name, csv_text, replace_file
from rome.core.plain_data import parse_yaml
from rome.evaluation.evaluate import Report
from rome.evaluation.result import AVERAGE, CLEAN, UNION
from rome.evaluation.store import RESULT
from rome.report.seeds import mean_and_spread
from rome.runs.config import Config, load
from rome.runs.folder import Run
from rome.runs.launchers import Job, Launcher, Local
from rome.runs.origin import code_facts


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    file: Path
    overrides: tuple[str, ...]
    """``key=value`` for every key of the sweep, including keys with a single value."""
    folder: Path
    config: Config
    varied: tuple[str, ...] = ()
    """The ``overrides`` whose keys have several values in the sweep."""

    @property
    def row(self) -> str:
        """Name of the run without its seed."""
        return " ".join([self.config.name, *(text for text in self.varied if not text.startswith("seed="))])


class Result(NamedTuple):
    """An evaluated point."""

    point: Point
    values: dict[str, float]
    """Column -> accuracy as a share; a failed case has none, and makes average and union NaN."""


def points(configs: Sequence[str | Path], axes: Sequence[str], out: Path) -> list[Point]:
    """Return every combination of config file and axis values.

    Args:
        axes: ``key=a,b,c``; commas inside brackets and braces belong to a value.

    Raises:
        UserError: an axis is malformed, a config is invalid at some point, or two runs would have the same name.
    """
    grid = [[f"{key}={value}" for value in values] for key, values in map(_parse_axis, axes)]
    keys = [choices[0].partition("=")[0] for choices in grid]
    if len(set(keys)) < len(keys):
        raise UserError(f"the keys {', '.join(keys)} are not distinct; give each key once, with all its values")
    found: dict[Path, Point] = {}
    for file, overrides in itertools.product(configs, itertools.product(*grid)):
        config = load(file, overrides)
        varied = tuple(text for text, choices in zip(overrides, grid, strict=True) if len(choices) > 1)
        folder = out / as_file_name("-".join([config.name, *varied]))
        if folder in found:
            raise UserError(f"{folder} would be more than one run; give the configs different names (name=...)")
        found[folder] = Point(Path(file), overrides, folder, config, varied)
    return list(found.values())


def _parse_axis(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    parts, depth = [""], 0
    for letter in values:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    if not equals or not key or not all(part.strip() for part in parts):
        raise UserError(f"axis {text!r}: write key=a,b,c, such as seed=0,1,2 or experts.rank=8,16")
    return key, [part.strip() for part in parts]


def sweep(
    chosen: Sequence[Point], *, launcher: Launcher | None = None, jobs: int | None = None, gpus: int | None = None
) -> dict[Path, str]:
    """Train and evaluate every unfinished point.

    Args:
        launcher: where the points run; by default, in processes on this machine.
        jobs: number of points at a time (:meth:`rome.runs.launchers.Launcher.run`).
        gpus: number of GPUs for each point.

    Returns:
        Folder -> what went wrong, for the points that failed.

    Raises:
        UserError: the launcher does not support these arguments, or a finished point has other settings.
        Interrupted: a signal arrived; the runs in progress have written their checkpoints.
    """
    return (launcher or Local()).run([_job(point) for point in chosen], at_once=jobs, gpus=gpus)


def _job(point: Point) -> Job:
    return Job(
        point.folder,
        "rome.report.sweep:run_point",
        {
            "file": str(point.file),
            "overrides": point.overrides,
            "folder": str(point.folder),
            "trust_code": trust.allowed(),
        },
        done=functools.partial(_done, point),
        summary=functools.partial(_summary, point),
    )


def _done(point: Point) -> bool:
    """Whether the point is already trained and evaluated.

    Raises:
        UserError: its folder contains a run with other settings.
    """
    run = Run(point.folder)
    if not run.finished:
        return False
    _check_same(run, point.config)
    report = _report(point)
    return report is not None and not report.failed


def _check_same(run: Run, config: Config) -> None:
    """Raise UserError unless the finished run has the same settings, data and code."""
    run.check_same(config)
    if found := run.other_code(code_facts(config)):
        raise UserError(f"{run.folder} was trained with different code ({'; '.join(found)}); use another --out")


@trust.opens_files
def run_point(file: str, overrides: Sequence[str], folder: str, *, trust_code: bool = False) -> None:
    """Train and evaluate one point without repeating finished work."""
    from rome.evaluation.run import evaluate_saved
    from rome.training.setup import train

    config = load(file, tuple(overrides))
    run = Run(folder)
    if run.finished:
        _check_same(run, config)
    else:
        train(config, run.folder, resume=True)
    with launched() as team:
        # with these settings, as those in the run's own config may be older
        report, _ = evaluate_saved(run.folder, data=config.data.path, settings=config.evaluation, team=team)
    report.require_complete()


def gather_results(chosen: Sequence[Point]) -> list[Result]:
    """Collect the results of the evaluated points; others are left out."""
    return [
        Result(point, {CLEAN: report.clean, **report.robust, AVERAGE: report.average, UNION: report.union})
        for point in chosen
        if (report := _report(point)) is not None
    ]


def _report(point: Point) -> Report | None:
    """Load the evaluation with the config's suite, routing, seed, precision and number of examples; None if there is
    none."""
    settings = point.config.evaluation
    gates = "" if settings.routing == "learned" else f"-{settings.routing}"

    def place(n: object) -> Path:
        return point.folder / "evaluation" / f"{settings.suite.label}-{n}{gates}"

    found = place(settings.n)
    if not (found / RESULT).exists() and any(found.parent.glob(f"{place('*').name}/{RESULT}")):
        size = len(point.config.data.open("test"))
        found = place(min(settings.n or size, size))  # all test examples, if n is not given or larger
    report = Report.load(found) if (found / RESULT).exists() else None
    wanted = {"suite": settings.suite.dump(), "seed": settings.seed}
    if report is None or report.search_precision != settings.search_precision:
        return None
    return report if all(report.settings[name] == value for name, value in wanted.items()) else None


def _summary(point: Point) -> str:
    report = _report(point)
    return "no evaluation" if report is None else f"clean {report.clean:.1%}, union {report.union:.1%}"


def show_results(results: Sequence[Result]) -> None:
    """Print accuracies in percent: mean and sample standard deviation over points that differ only in the seed."""
    columns, rows = _columns(results), []
    for name in dict.fromkeys(result.point.row for result in results):
        own = [result.values for result in results if result.point.row == name]
        cells = [name, str(len(own))]
        for column in columns:
            cells.append(mean_and_spread([each.get(column, math.nan) for each in own]))
        rows.append(cells)
    print_table(rows, ["run", "seeds", *columns])
    print("accuracy in percent; mean \N{PLUS-MINUS SIGN} standard deviation over the seeds")


def save_results(results: Sequence[Result], out: Path) -> Path:
    """Write ``sweep.csv`` and ``sweep.json`` with the values of every point (none if a case failed); return the path of
    the CSV file."""
    columns, records = _columns(results), []
    for point, found in results:
        varied = dict(text.partition("=")[::2] for text in point.overrides if not text.startswith("seed="))
        plain = {key: parse_yaml(value) for key, value in varied.items()}
        known = {column: None if math.isnan(found.get(column, math.nan)) else found[column] for column in columns}
        records.append({"run": point.row, **plain, "seed": point.config.seed, **known})
    replace_file(out / "sweep.csv", csv_text(records).encode())
    replace_file(out / "sweep.json", json.dumps(records, indent=2, default=str).encode())
    return out / "sweep.csv"


def _columns(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(column for result in results for column in result.values))
