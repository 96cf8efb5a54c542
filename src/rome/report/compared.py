"""Runs and given models whose evaluations may stand side by side, and how sure their differences are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rome.attacks.suites.base import LP
from rome.core.errors import UserError
from rome.core.files import flatten
from rome.evaluation.evaluate import Report
from rome.evaluation.statistics import Difference, paired_differences
from rome.evaluation.store import RESULT, SETTINGS
from rome.report.evaluated import (
    Evaluated,
    is_evaluation,
    load_evaluation,
    own_name,
)
from rome.report.subject import names_of
from rome.runs.config import Config
from rome.runs.folder import Run

PREFERRED_SUITES = ("autoattack", "all")
_SAME = ("data", "suite", "threats", "n", "seed", "cases", "code")
"""Settings in which evaluations must agree to be compared."""
_NOT_SHOWN = {"name", "about", "paper", "imports", "device", "workers", "compile"}


def gather(folders: Sequence[Path], suite: str | None = None) -> list[Evaluated]:
    """What lies in these folders, each with its evaluation of one suite on as many examples that all of them have.

    A folder is that of a run, or that of the evaluation of a model that no run made. Where there are several common
    evaluations, AutoAttack goes before other suites, then more examples before fewer, then those with attacks in Lp
    balls before others.

    Args:
        suite: only evaluations of this suite, ``unseen``, or of this suite on so many examples, ``unseen-500``.

    Raises:
        UserError: a folder with neither, a run without an evaluation of its present weights, none of that suite, or
            evaluations that cannot be compared.
    """
    folders = list({Path(folder).resolve(): Path(folder) for folder in folders}.values())
    if not folders:
        raise UserError("name at least one run's folder")
    runs = [None if is_evaluation(folder) else _run(folder) for folder in folders]
    found = [_given(folder) if run is None else _evaluations(run) for run, folder in zip(runs, folders, strict=True)]
    common = {
        key for key in set.intersection(*(set(each) for each in found)) if suite is None or suite in (key[0], _key(key))
    }
    if not common:
        there = "; ".join(
            f"{folder}: {', '.join(map(_key, each))}" for folder, each in zip(folders, found, strict=True)
        )
        kind = "one suite on as many examples" if suite is None else f"suite {suite} on as many examples"
        raise UserError(
            f"the runs share no evaluation of {kind} ({there}); "
            "run `rome evaluate` on each with the same --suite and --n"
        )

    def rank(key: tuple[str, int]) -> tuple[bool, int, bool, str]:
        report = found[0][key][1]
        return any(part in PREFERRED_SUITES for part in key[0].split("+")), key[1], LP in report.members, key[0]

    chosen = max(common, key=rank)
    own = [own_name(each[chosen][1]) if run is None else run.config.name for run, each in zip(runs, found, strict=True)]
    evaluated: list[Evaluated] = []
    for name, run, each in zip(names_of(own, folders), runs, found, strict=True):
        folder, report = each[chosen]
        others = () if run is None else tuple(_key(key) for key in sorted(each) if key != chosen)
        one = Evaluated(
            name=name, folder=folder, report=report, others=others, run=run, config=None if run is None else run.config
        )
        one.check_fresh()
        evaluated.append(one)
    for each_one in evaluated:
        _same(evaluated[0], each_one)
    return evaluated


def findings(runs: Sequence[Evaluated], base: Evaluated | None = None) -> list[str]:
    """What the unions say, and which differences the examples cannot decide.

    The best is compared with every other. As the same examples choose it, all pairs count as comparisons; with a
    ``base``, which was chosen without them, those with it alone. p-values and intervals are corrected for their number
    (:func:`all_paired`), so that of models that are equally good one report in twenty at most claims a difference. No
    other column is tested.
    """
    if any(run.report.failed for run in runs):
        return ["A case failed, so there is no union to compare; run `rome evaluate` again to complete it."]
    if any(run.report.pending for run in runs):
        return ["Some cases have not been run, so there is no union to compare; run `rome evaluate` without --cases."]
    if not runs[0].report.attacks:
        return ["No attack was run, so there is no union to compare."]
    ranked = sorted(runs, key=lambda run: -run.report.union)
    first = base or ranked[0]
    others = [run for run in runs if run is not first]
    pairs = list(combinations(ranked, 2)) if base is None else [(first, run) for run in others]
    found = dict(zip(pairs, all_paired([(a.report, b.report) for a, b in pairs]), strict=True))
    share, n, cases = f"{first.report.union:.1%}", first.report.n, ", ".join(first.report.attacks)
    text = [f"{first.name} classifies {share} of {n} test examples right under every attack ({cases})."]
    for run in others:
        difference = found[first, run]
        span = f"95% interval {100 * difference.low:+.1f} to {100 * difference.high:+.1f}"
        span += f", exact McNemar {_p(difference.p)}"
        meaning = "more than" if difference.clear else "within what"
        side = "above" if difference.value > 0 else "below"
        ahead = f"That is {100 * abs(difference.value):.1f} points {side} {run.name}"
        if difference.value == 0:
            ahead = f"{run.name} reaches the same share"
        text.append(f"{ahead} on the same examples ({span}): {meaning} the choice of examples explains.")
    if len(pairs) > 1:
        which = f"with {first.name}" if base is not None else f"among the {len(runs)}, as the examples chose the best"
        text.append(
            f"p-values (Holm) and intervals (Bonferroni) are corrected for the {len(pairs)} comparisons {which}; no "
            "other column is tested."
        )
    if others:
        text.append("The intervals do not cover the training seed: another one can move a number by points.")
    return text


def _p(value: float) -> str:
    return "p < 0.0001" if value < 0.0001 else f"p = {value:.2g}"


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
        UserError: one of the cases is not in both reports, or they are not of the same examples.
    """
    return all_paired([(a, b)], cases)[0]


def all_paired(pairs: Sequence[tuple[Report, Report]], cases: Sequence[str] | None = None) -> list[Difference]:
    """:func:`paired` of all pairs that are claimed together, corrected for their number
    (:func:`rome.evaluation.statistics.paired_differences`)."""
    if not all(same_examples(a, b) for a, b in pairs):
        raise UserError("the two were not evaluated on the same examples, so a paired comparison has no meaning")
    return paired_differences([(a.right(cases), b.right(cases)) for a, b in pairs])


def same_examples(a: Report, b: Report) -> bool:
    """Whether row i is the same image of the same data in both: by the data's hash, its indices and labels."""
    return (
        a.settings.get("data") == b.settings.get("data")
        and np.array_equal(a.indices, b.indices)
        and np.array_equal(a.labels, b.labels)
    )


def other_network(a: Report, b: Report) -> str | None:
    """A case of both reports whose perceptual distances two different networks measured; None where there is none, or
    where one of them does not say (earlier versions)."""
    ours, theirs = (report.settings.get("networks") or {} for report in (a, b))
    both = set(a.cases) & set(b.cases) & ours.keys() & theirs.keys()
    return next((case for case in a.cases if case in both and ours[case] != theirs[case]), None)


def _run(folder: Path) -> Run:
    run = Run(folder)
    if not run.config_file.is_file():
        raise UserError(
            f"{folder} is not the folder of a run (it has no {run.config_file.name}) nor of an evaluation (it has no "
            f"{SETTINGS})"
        )
    return run


def _given(folder: Path) -> dict[tuple[str, int], tuple[Path, Report]]:
    """(suite, n) -> folder and report of the one evaluation that the folder is."""
    report = load_evaluation(folder)
    return {(report.suite, report.n): (folder, report)}


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
        if not run.finished:
            raise UserError(f"{run.folder} holds no finished model: train it to its end (--resume), then evaluate it")
        state = "an unfinished evaluation only" if unfinished else "no evaluation"
        raise UserError(f"{run.folder} has {state}: run `rome evaluate {run.folder}` first")
    return found


def _same(first: Evaluated, other: Evaluated) -> None:
    a, b = ({key: run.report.settings.get(key) for key in _SAME} for run in (first, other))
    if a != b:
        flat_a, flat_b = flatten(a), flatten(b)
        key = next(key for key in {**flat_a, **flat_b} if flat_a.get(key) != flat_b.get(key))
        values = "" if key == "cases" else f" {_short(flat_a.get(key))} and {_short(flat_b.get(key))}"
        if key.startswith("data.") and None not in (first.data, other.data):
            values += f": {first.source} and {other.source}"
        raise UserError(
            f"{first.name} and {other.name} were evaluated differently ({key}{values}), so their numbers cannot be "
            "compared: evaluate both on the same examples with the same threats, suite and seed"
        )
    if case := other_network(first.report, other.report):
        one, two = (_short(each.report.settings["networks"][case]) for each in (first, other))
        raise UserError(
            f"{first.name} and {other.name} were evaluated differently (networks.{case} {one} and {two}: the files of "
            "weights that measured it differ), so their numbers cannot be compared: evaluate both again with "
            "the same file (--features); only what it measures is done again"
        )
    if not same_examples(first.report, other.report):
        raise UserError(
            f"{first.name} and {other.name} name the same data, but the rows of their matrices are other examples: one "
            "of them is damaged; evaluate it again"
        )


def _key(key: tuple[str, int]) -> str:
    return f"{key[0]}-{key[1]}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
