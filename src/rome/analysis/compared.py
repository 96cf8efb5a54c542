"""Finished runs whose evaluations may stand side by side, and how sure their differences are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rome.analysis.subject import names_of
from rome.config import Config
from rome.errors import UserError
from rome.evaluating import Case, Report
from rome.evaluation.statistics import Difference, paired_difference
from rome.evaluation.store import RESULT, SETTINGS
from rome.files import flatten
from rome.models import file_hash
from rome.runs import Run
from rome.threats import LpBall, Threat

PREFERRED_SUITES = ("autoattack", "all")
_SAME = ("suite", "threats", "n", "seed", "data", "cases")
"""Settings in which evaluations must agree to be compared."""
_NOT_SHOWN = {"name", "about", "paper", "imports", "device", "workers", "compile"}


@dataclass(frozen=True, eq=False)
class Evaluated:
    """A run with the evaluation that is compared."""

    name: str
    run: Run
    config: Config
    folder: Path
    """Of the evaluation."""
    report: Report
    others: tuple[str, ...] = ()
    """The run's evaluations that were not chosen, such as ``apgd-1000``."""

    @property
    def attacks(self) -> dict[str, Case]:
        """The cases that are attacks and have been run, by name."""
        cases = [Case.model_validate(case) for case in self.report.settings["cases"]]
        return {case.name: case for case in cases if case.name in self.report.cases and not case.on_all}

    @property
    def threats(self) -> dict[str, Threat]:
        """What each attack was allowed, by the case's name."""
        return {name: case.threat for name, case in self.attacks.items()}

    @property
    def budgets(self) -> dict[str, float]:
        """The radius of each Lp ball."""
        return {name: threat.eps for name, threat in self.threats.items() if isinstance(threat, LpBall)}

    @property
    def method(self) -> str:
        """As the paper writes it, such as ``RoME+RANDOM``."""
        return ("RoME+" if self.config.experts is not None else "") + self.config.method.kind.upper()


def gather(folders: Sequence[Path]) -> list[Evaluated]:
    """The runs, each with its evaluation of one suite on one number of examples that all of them have.

    Where there are several such, AutoAttack goes before other suites, then more examples before fewer.

    Raises:
        UserError: a folder without a run, a run without an evaluation of its present weights, or evaluations that
            cannot be compared.
    """
    folders = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    if not folders:
        raise UserError("name at least one run's folder")
    runs = [Run(folder) for folder in folders]
    configs = [run.config for run in runs]
    found = [_evaluations(run) for run in runs]
    common = set.intersection(*(set(each) for each in found))
    if not common:
        there = "; ".join(f"{run.folder}: {', '.join(map(_key, each))}" for run, each in zip(runs, found, strict=True))
        raise UserError(
            f"the runs share no evaluation of one suite on as many examples ({there}); "
            "run `rome evaluate` on each with the same --suite and --n"
        )
    chosen = max(common, key=lambda key: (any(part in PREFERRED_SUITES for part in key[0].split("+")), key[1], key[0]))
    names = names_of([config.name for config in configs], folders)
    evaluated = [
        Evaluated(name, run, config, *each[chosen], tuple(_key(key) for key in sorted(each) if key != chosen))
        for name, run, config, each in zip(names, runs, configs, found, strict=True)
    ]
    for run in evaluated:
        _fresh(run)
        _same(evaluated[0], run)
    return evaluated


def config_differences(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """Dotted key -> value in each config, for the keys that differ and determine results; None where absent."""
    flat = [flatten(config.dump()) for config in configs]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key.split(".")[0] not in _NOT_SHOWN]
    rows = {key: [each.get(key) for each in flat] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def paired(a: Report, b: Report, cases: Sequence[str] | None = None) -> Difference:
    """Union of ``a`` minus union of ``b`` on the same examples, over these cases or all attacks.

    With its 95% interval and McNemar's exact p-value (:func:`rome.evaluation.statistics.paired_difference`).

    Raises:
        UserError: one of the cases is not in both reports.
    """
    return paired_difference(a.right(cases), b.right(cases))


def _evaluations(run: Run) -> dict[tuple[str, int], tuple[Path, Report]]:
    """(suite, n) -> folder and report of the run's finished evaluations."""
    found, unfinished, routing = {}, False, run.config.evaluation.routing
    for settings in sorted((run.folder / "evaluation").glob(f"*/{SETTINGS}")):
        if not (settings.parent / RESULT).exists():
            unfinished = True
            continue
        report = Report.load(settings.parent)
        if (report.settings.get("provenance") or {}).get("routing", routing) != routing:
            continue  # Table 5's, beside that of the gates the config asks for
        found[report.suite, report.n] = settings.parent, report
    if not found:
        state = "an unfinished evaluation only" if unfinished else "no evaluation"
        raise UserError(f"{run.folder} has {state}: run `rome evaluate {run.folder}` first")
    return found


def _fresh(run: Evaluated) -> None:
    """The evaluation is of the weights that lie in the run's folder."""
    provenance = run.report.settings.get("provenance") or {}
    evaluated, file = provenance.get("checkpoint_sha256"), run.run.model_file
    if evaluated and file.exists() and file_hash(file) != evaluated:
        raise UserError(
            f"{run.folder} evaluated other weights ({provenance.get('checkpoint')}) than {file} holds now: "
            f"run `rome evaluate {run.run.folder} --overwrite`"
        )


def _same(first: Evaluated, other: Evaluated) -> None:
    a, b = ({key: run.report.settings.get(key) for key in _SAME} for run in (first, other))
    if a != b:
        flat_a, flat_b = flatten(a), flatten(b)
        key = next(key for key in {**flat_a, **flat_b} if flat_a.get(key) != flat_b.get(key))
        values = "" if key == "cases" else f" {_short(flat_a.get(key))} and {_short(flat_b.get(key))}"
        raise UserError(
            f"{first.name} and {other.name} were evaluated differently ({key}{values}), so their numbers cannot be "
            "compared: evaluate both on the same examples with the same threats, suite and seed"
        )


def _key(key: tuple[str, int]) -> str:
    return f"{key[0]}-{key[1]}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
