"""Runs that differ only in the training seed, summarised together: how much another seed would change."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rome.core.files import flatten
from rome.evaluation.statistics import paired_difference, welch
from rome.report.columns import CLEAN, DASH, UNION, columns_of
from rome.report.evaluated import Evaluated
from rome.report.subject import names_of
from rome.report.templating import sentences
from rome.runs.config import Config
from rome.runs.folder import FREE_KEYS

Group = list[Evaluated]
"""Runs that differ only in the seed."""


def apart_from_seed(config: Config) -> str:
    """Return all settings that determine a run's numbers, except its seed, as comparable text."""
    free = FREE_KEYS | {"seed", "data.path", "data.download"}
    plain = flatten(config.dump())
    kept = {key: value for key, value in plain.items() if not {key, key.split(".")[0]} & free}
    return json.dumps(kept, sort_keys=True, default=str)


def by_seed(runs: Sequence[Evaluated]) -> dict[str, Group]:
    """Group runs that differ only in the seed, by name, without models that belong to no run; empty if no two do."""
    found: dict[str, dict[int, Evaluated]] = defaultdict(dict)
    for run in runs:
        if run.config is not None:
            found[apart_from_seed(run.config)].setdefault(run.config.seed, run)
    groups = [list(group.values()) for group in found.values()]
    if all(len(group) < 2 for group in groups):
        return {}
    firsts = [group[0] for group in groups]
    own = [one.config.name if one.config else one.name for one in firsts]
    return dict(zip(names_of(own, [one.place for one in firsts]), groups, strict=True))


def mean_and_spread(values: Sequence[float]) -> str:
    """Format shares in percent as mean and sample standard deviation, ``57.8 ± 3.1``; a dash if one is missing."""
    if not values or any(map(math.isnan, values)):
        return DASH
    spread = f" \N{PLUS-MINUS SIGN} {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def seed_table(groups: dict[str, Group]) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the columns and a row for each group: name, number of seeds, and accuracies over them."""
    columns = columns_of([run.report for group in groups.values() for run in group])
    rows = [
        [name, str(len(group)), *(mean_and_spread([each.cell(run.report).value for run in group]) for each in columns)]
        for name, group in groups.items()
    ]
    return ["over seeds", "seeds", *(column.title for column in columns)], rows


def seed_findings(groups: dict[str, Group]) -> list[str]:
    """Describe how the unions of the groups differ: Welch's interval over the seeds, simultaneously 95% for all pairs
    (Bonferroni), and the paired difference on the same examples for each seed."""
    found = _differences(groups)
    seeds = sorted({count for each in found for count in each["seeds"]})
    return sentences("seed_findings.txt", compared=found, seeds=seeds) if found else []


def seed_headline(groups: dict[str, Group]) -> str:
    """Summarise :func:`seed_findings`: the group with the largest mean union, and whether the choice of seeds can
    explain its lead; empty if no two groups can be compared."""
    found = _differences(groups)
    if not found:
        return ""
    best = [each for each in found if each["a"] == found[0]["a"]]
    level, below = (
        ", ".join(f"{each['b']} {100 * each['means'][1]:.1f}" for each in best if each["decided"] == decided)
        for decided in (False, True)
    )
    first = f"{found[0]['a']} {100 * found[0]['means'][0]:.1f}"
    seeds = " or ".join(map(str, sorted({*found[0]["seeds"]})))
    above = f"significantly above {below}" if below else ""
    text = f"No significant difference: {first}, {level}" if level else f"{first} is {above}"
    return f"{text}{f'; {above}' if level and above else ''} (mean union over {seeds} training seeds, %)"


def _differences(groups: dict[str, Group]) -> list[dict[str, Any]]:
    """Compare every two groups with several seeds; if there are four or more, only the best with each other one."""
    several = {
        name: group
        for name, group in groups.items()
        if len(group) > 1 and not any(math.isnan(run.report.union) for run in group)
    }
    ranked = sorted(several, key=lambda name: -statistics.fmean(run.report.union for run in several[name]))
    pairs = list(combinations(ranked, 2))
    found = []
    for a, b in pairs if len(ranked) < 4 else [(ranked[0], other) for other in ranked[1:]]:
        ours, theirs = several[a], several[b]
        value, low, high = welch(
            [run.report.union for run in ours], [run.report.union for run in theirs], comparisons=len(pairs)
        )
        same = [
            (run.config.seed, paired_difference(run.report.all_correct(), other.report.all_correct()))
            for run in ours
            for other in theirs
            if run.config and other.config and run.config.seed == other.config.seed
        ]
        found.append(
            {
                "a": a,
                "b": b,
                "means": [statistics.fmean(run.report.union for run in group) for group in (ours, theirs)],
                "seeds": (len(ours), len(theirs)),
                "value": value,
                "low": low,
                "high": high,
                "decided": low > 0,
                "same": same,
                "pairs": len(pairs),
            }
        )
    return found


def csv_rows(runs: Sequence[Evaluated]) -> list[dict[str, object]]:
    """Return a row for each run with every accuracy, as a share, and the ends of its 95% interval over the examples."""
    columns, rows = columns_of([run.report for run in runs]), []
    for run in runs:
        seed = "" if run.config is None else run.config.seed
        row: dict[str, object] = {"run": run.name, "method": run.method, "seed": seed, "n": run.report.n}
        for column in columns:
            cell = column.cell(run.report)
            row[column.title] = "" if math.isnan(cell.value) else cell.value
            if cell.interval is not None and column.title in (CLEAN, UNION, *run.report.cases):
                row |= {f"{column.title} low": cell.interval[0], f"{column.title} high": cell.interval[1]}
        rows.append(row)
    return rows
