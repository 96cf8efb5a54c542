"""Runs that differ in the training seed alone, joined in reports."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import t, ttest_ind

from helpers.reports import LP, evaluated, report
from helpers.tiny_runs import save_run
from rome.core.errors import UserError
from rome.evaluation.run import evaluate_saved
from rome.evaluation.statistics import welch
from rome.report.seeds import by_seed, mean_and_spread, seed_findings, seed_headline, seed_table
from rome.report.subject import distinct


def run(folder: Path, name: str, seed: int, right: int, **changes: Any) -> Any:
    """Of 20 examples all are right without an attack and so many under every one."""
    columns = [[1] * 20, *[[1] * right + [0] * (20 - right)] * 3]
    return evaluated(report(LP, columns), folder / f"{name}-{seed}", name, seed=seed, **changes)


def test_runs_that_differ_in_the_seed_alone_are_joined(tmp_path: Path) -> None:
    plain = [run(tmp_path, "plain", seed, right, experts=None) for seed, right in enumerate((10, 12, 8))]
    ours = [run(tmp_path, "rome", seed, right) for seed, right in enumerate((12, 11, 13))]
    groups = by_seed([*plain, *ours])
    assert {name: [each.config.seed for each in group] for name, group in groups.items()} == {
        "plain": [0, 1, 2],
        "rome": [0, 1, 2],
    }
    titles, rows = seed_table(groups)
    assert titles == ["over seeds", "seeds", "clean", "L1", "L2", "Linf", "average", "union"]
    assert rows[0] == ["plain", "3", "100.0 ± 0.0", *["50.0 ± 10.0"] * 5]
    assert by_seed([plain[0], ours[0]]) == {}, "nothing to join"
    longer = run(tmp_path, "rome", 3, 20, epochs=3)
    assert [len(group) for group in by_seed([*ours, longer]).values()] == [3, 1], "another training"


def test_a_difference_within_the_seeds_is_no_finding(tmp_path: Path) -> None:
    plain = [run(tmp_path, "plain", seed, right, experts=None) for seed, right in enumerate((10, 12, 8))]
    ours = [run(tmp_path, "rome", seed, right) for seed, right in enumerate((12, 11, 13))]
    low, high = ttest_ind([0.6, 0.55, 0.65], [0.5, 0.6, 0.4], equal_var=False).confidence_interval(0.95)
    first, second = seed_findings(by_seed([*plain, *ours]))
    assert first == (
        "Over 3 training seeds, the mean union of rome is 10.0 points above that of plain (95% interval over seeds "
        f"{100 * low:+.1f} to {100 * high:+.1f}): no more than the choice of seeds can explain."
    )
    assert second.startswith("For runs with the same seed, on the same examples, the difference is +10.0 (")
    assert ", -5.0 (" in second, "the sign changes with the seed"
    assert seed_headline(by_seed([*plain, *ours])) == (
        "No significant difference: rome 60.0, plain 50.0 (mean union over 3 training seeds, %)"
    )
    far = [run(tmp_path, "far", seed, right, epochs=3) for seed, right in enumerate((19, 20, 19))]
    assert "): more than the choice of seeds can explain" in seed_findings(by_seed([*plain, *far]))[0]
    assert seed_headline(by_seed([*plain, *far])).startswith("far 96.7 is significantly above plain 50.0 (")
    assert "far 96.7 is significantly above rome 60.0, plain 50.0 (" in seed_headline(by_seed([*plain, *ours, *far]))
    assert seed_headline(by_seed([*plain, far[0]])) == ""


def test_welchs_interval_by_hand() -> None:
    """Equal variances and numbers: 2 (n - 1) degrees of freedom."""
    value, low, high = welch([1.0, 2.0, 3.0], [2.0, 3.0, 4.0])
    half = t.ppf(0.975, 4) * (2 / 3) ** 0.5
    assert (value, low, high) == (-1.0, pytest.approx(-1 - half), pytest.approx(-1 + half))
    assert mean_and_spread([0.5, 0.6]) == "55.0 ± 7.1"
    assert (mean_and_spread([0.5]), mean_and_spread([0.5, float("nan")])) == ("50.0", "–")  # noqa: RUF001


@pytest.mark.slow
def test_a_folder_of_runs_is_those_inside(tmp_path: Path, rome: Any) -> None:
    for seed in (0, 1):
        evaluate_saved(save_run(tmp_path / "sweep" / "deep" / f"tiny-{seed}", seed=seed, experts=None))
    places = [tmp_path / "sweep" / "deep" / f"tiny-{seed}" for seed in (0, 1)]
    assert distinct([tmp_path / "sweep", places[1]]) == places
    assert distinct([tmp_path / "nowhere"]) == [tmp_path / "nowhere"]
    with pytest.raises(UserError):
        distinct([])
    ended = rome("report", tmp_path / "sweep", "--out", tmp_path / "report")
    assert ended.code == 0
    assert "over seeds" in ended.out
    rows = list(csv.DictReader((tmp_path / "report" / "report.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["tiny-0", "tiny-1"]
    assert all(float(row["union low"]) <= float(row["union"]) <= float(row["union high"]) for row in rows)
    for name in ("report.md", "report.html"):
        assert "over seeds" in (tmp_path / "report" / name).read_text()
