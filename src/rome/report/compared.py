"""Which evaluations may be compared side by side, and how certain the differences between them are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from rome.attacks.suites.base import LP
from rome.core.errors import UserError
from rome.core.files import flatten
from rome.evaluation.evaluate import Report
from rome.evaluation.result import UNION
from rome.evaluation.statistics import Difference, paired_difference, paired_differences
from rome.evaluation.store import RESULT, SETTINGS
from rome.report.columns import Column
from rome.report.evaluated import Evaluated, evaluations, is_evaluation, load_evaluation
from rome.report.subject import distinct, names_of
from rome.report.templating import sentences
from rome.runs.config import Config
from rome.runs.folder import FREE_KEYS, Run
from rome.runs.hints import what_is

PREFERRED_SUITES = ("autoattack", "all")
_MUST_AGREE = ("data", "suite", "threats", "n", "seed", "search_precision", "cases", "code")
"""Settings in which evaluations must agree to be compared."""
_HIDDEN_KEYS = FREE_KEYS - {"evaluation"}


def gather(folders: Sequence[Path], suite: str | None = None) -> list[Evaluated]:
    """Load from each folder the evaluation to compare: all of one suite on the same number of examples.

    A folder is a run, or the evaluation of a model that belongs to no run. If the folders have several evaluations in
    common, AutoAttack is preferred to other suites, then more examples to fewer, then suites with attacks in Lp balls
    to others.

    Args:
        suite: compare only evaluations of this suite (``unseen``), or of this suite on this many examples
            (``unseen-500``).

    Raises:
        UserError: a folder is neither a run nor an evaluation, a run has no evaluation of its present weights, the
            folders have none of that suite in common, or the evaluations cannot be compared.
    """
    folders = distinct(folders)
    found = [_evaluations(folder) for folder in folders]
    common = {key for key in set.intersection(*map(set, found)) if suite in (None, key[0], _label(key))}
    if not common:
        there = "; ".join(f"{a}: {', '.join(map(_label, each))}" for a, each in zip(folders, found, strict=True))
        kind = "the same suite" if suite is None else f"suite {suite}"
        raise UserError(
            f"the runs share no evaluation of {kind} on the same number of examples ({there}); "
            "run `rome evaluate` on each with the same --suite and --n"
        )

    def rank(key: tuple[str, int]) -> tuple[bool, int, bool, str]:
        return is_preferred(key[0]), key[1], LP in found[0][key].report.members, key[0]

    chosen = max(common, key=rank)
    evaluated = []
    for name, each in zip(names_of([each[chosen].name for each in found], folders), found, strict=True):
        others = tuple(_label(key) for key in sorted(each) if key != chosen)
        evaluated.append(replace(each[chosen], name=name, others=others))
        evaluated[-1].check_fresh()
    for one in evaluated:
        if reason := unlike(evaluated[0], one):
            raise UserError(reason)
    return evaluated


def is_preferred(suite: str) -> bool:
    """Whether evaluations with this suite are preferred to others."""
    return any(part in PREFERRED_SUITES for part in suite.split("+"))


def findings(runs: Sequence[Evaluated], base: Evaluated | None = None) -> list[str]:
    """Describe how the unions compare and which differences the examples cannot decide.

    The best run is compared with every other. As the same examples choose the best, all pairs count as comparisons;
    with a ``base``, chosen without looking at them, only the pairs with the base count. p-values and intervals are
    corrected for their number (:func:`rome.evaluation.statistics.paired_differences`), so that among equally good
    models at most one report in twenty claims a difference. No other column is tested.
    """
    if any(run.report.failed for run in runs):
        return ["A case failed, so there is no union to compare; run `rome evaluate` again to complete the evaluation."]
    if any(run.report.pending for run in runs):
        return ["Some cases have not been run, so there is no union to compare; run `rome evaluate` without --cases."]
    if not runs[0].report.attacks:
        return ["No attack was run, so there is no union to compare."]
    return sentences("findings.txt", **_differences(runs, base))


def headline(runs: Sequence[Evaluated], base: Evaluated | None = None) -> str:
    """Summarise :func:`findings` in a few words; just the runs' names if there is no union to compare."""
    if any(math.isnan(run.report.union) for run in runs):
        return ", ".join(run.name for run in runs)
    return " ".join(sentences("headline.txt", **_differences(runs, base)))


def _differences(runs: Sequence[Evaluated], base: Evaluated | None) -> dict[str, Any]:
    """Return the values that fill the templates for findings on unions."""
    ranked = sorted(runs, key=lambda run: -run.report.union)
    first = base or ranked[0]
    others = [run for run in runs if run is not first]
    pairs = list(combinations(ranked, 2)) if base is None else [(first, run) for run in others]
    differences = paired_differences([(a.report.all_correct(), b.report.all_correct()) for a, b in pairs])
    found = dict(zip(pairs, differences, strict=True))
    compared = [(run, found[first, run]) for run in others]
    return {"first": first, "others": compared, "comparisons": len(pairs), "based": base is not None}


def outstanding(reports: Sequence[Report], columns: Sequence[Column]) -> set[tuple[int, int]]:
    """Return (report, column) of each number that is significantly above that of every other report.

    Every two reports are compared by McNemar's exact test. The p-values of the union are corrected among themselves (as
    in :func:`findings`), those of all other columns together. Means over cases are not tested.
    """
    found = set()
    for tested in ([c for c in columns if c.title == UNION], [c for c in columns if c.title != UNION]):
        places, pairs = [], []
        for column in tested:
            correct = [column.correct(report) for report in reports]
            for (i, one), (j, other) in combinations(enumerate(correct), 2):
                if one is not None and other is not None:
                    places.append((i, j, columns.index(column)))
                    pairs.append((one, other))
        above = Counter(
            (i if difference.value > 0 else j, column)
            for (i, j, column), difference in zip(places, paired_differences(pairs), strict=True)
            if difference.clear
        )
        found |= {place for place, count in above.items() if count == len(reports) - 1}
    return found


def config_differences(configs: Sequence[Config]) -> dict[str, list[Any]]:
    """Return dotted key -> value in each config, for keys that determine results and differ; None where absent."""
    flat = [flatten(config.dump()) for config in configs]
    keys = [key for key in dict.fromkeys(key for each in flat for key in each) if key.split(".")[0] not in _HIDDEN_KEYS]
    rows = {key: [each.get(key) for each in flat] for key in keys}
    return {key: row for key, row in rows.items() if any(value != row[0] for value in row)}


def paired(a: Report, b: Report, cases: Sequence[str] | None = None) -> Difference:
    """Compute union of ``a`` minus union of ``b`` on the same examples, over these cases or all attacks.

    The result has a 95% interval and McNemar's exact p-value (:func:`rome.evaluation.statistics.paired_difference`).

    Raises:
        UserError: one of the cases is missing in one of the reports, or they are not of the same examples.
    """
    if not same_examples(a, b):
        raise UserError("the two were not evaluated on the same examples, so a paired comparison is meaningless")
    return paired_difference(a.all_correct(cases), b.all_correct(cases))


def same_examples(a: Report, b: Report) -> bool:
    """Whether row i is the same image in both reports, judged by the data's hash, the indices and the labels."""
    return (
        a.settings.get("data") == b.settings.get("data")
        and np.array_equal(a.indices, b.indices)
        and np.array_equal(a.labels, b.labels)
    )


def other_network(a: Report, b: Report) -> str | None:
    """Return a case in both reports whose perceptual distances were measured by two different networks, or None."""
    ours, theirs = (report.settings.get("networks", {}) for report in (a, b))
    both = set(b.cases) & ours.keys() & theirs.keys()
    return next((case for case in a.cases if case in both and ours[case] != theirs[case]), None)


def _evaluations(folder: Path) -> dict[tuple[str, int], Evaluated]:
    """Load (suite, n) -> a run's finished evaluations with its config's routing, or the evaluation in the folder."""
    if is_evaluation(folder):
        one = load_evaluation(folder)
        return {(one.report.suite, one.report.n): one}
    run = Run(folder)
    if not run.config_file.is_file():
        raise UserError(f"{what_is(folder)}; give folders of runs (with a {run.config_file.name}) or of evaluations")
    routing = run.config.evaluation.routing
    found = {key[1:]: one for key, one in evaluations(run).items() if key[0] == routing}
    if not found:
        if not run.finished:
            raise UserError(f"{folder} holds no finished model: finish its training (--resume), then evaluate it")
        begun = [file.parent / RESULT for file in folder.glob(f"evaluation/*/{SETTINGS}")]
        state = "no evaluation" if all(result.exists() for result in begun) else "only an unfinished evaluation"
        raise UserError(f"{folder} has {state}: run `rome evaluate {folder}` first")
    return found


def unlike(first: Evaluated, other: Evaluated) -> str:
    """Explain why the numbers of two evaluations cannot be compared; empty if they can."""
    a, b = (flatten({key: run.report.settings.get(key) for key in _MUST_AGREE}) for run in (first, other))
    for key in {**a, **b}:
        if a.get(key) == b.get(key):
            continue
        values = "" if key == "cases" else f" {_short(a.get(key))} and {_short(b.get(key))}"
        if key.startswith("data.") and None not in (first.data, other.data):
            values += f": {first.source} and {other.source}"
        return (
            f"{first.name} and {other.name} were evaluated differently ({key}{values}), so their numbers cannot be "
            "compared: evaluate both on the same examples with the same threats, suite, seed and precision"
        )
    if case := other_network(first.report, other.report):
        one, two = (_short(each.report.settings["networks"][case]) for each in (first, other))
        return (
            f"{first.name} and {other.name} were evaluated differently (networks.{case} {one} and {two}: perceptual "
            "distances were measured with different weights), so their numbers cannot be compared: evaluate both again "
            "with the same weights file (--features); only the cases measured with it run again"
        )
    if not same_examples(first.report, other.report):
        return (
            f"{first.name} and {other.name} name the same data, but the rows of their matrices are different examples: "
            "one of the evaluations is damaged; evaluate that model again"
        )
    return ""


def _label(key: tuple[str, int]) -> str:
    return f"{key[0]}-{key[1]}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "…"
