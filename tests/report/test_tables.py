"""What is shown of composed suites: group means, the union of the Lp balls, own unions; RobustBench's files."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom

from helpers.reports import LP, evaluated, report
from helpers.tiny_runs import tiny
from helpers.toy_suites import Toy
from rome.attacks.suites.base import APGDSuite, AutoAttackSuite
from rome.attacks.suites.unseen import COMMON_CORRUPTIONS
from rome.cli.app import main
from rome.core.errors import UserError
from rome.evaluation.evaluate import Case, Report
from rome.evaluation.statistics import holm
from rome.report.columns import columns_of, remarks, show, tabulate
from rome.report.compared import findings, paired
from rome.report.evaluated import Evaluated
from rome.report.page import write_report
from rome.report.robustbench import entries_of, percent, write_entries
from rome.threats import CIFAR10, IMAGENET, AnyImage, LpBall
from rome.training.setup import train

WEATHER = [
    Case(name=name, threat=AnyImage(label=name), attacks=(Toy(),), group="perceptual") for name in ("fog", "snow")
]
CORRUPTIONS = [
    Case(
        name=f"{type}-{severity}",
        threat=AnyImage(label=f"{type}-{severity}"),
        attacks=(Toy(),),
        group="corruptions",
        on_all=True,
    )
    for type in COMMON_CORRUPTIONS
    for severity in (1, 2, 3, 4, 5)
]


A = report([*LP, *WEATHER], [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 1, 1]])
B = report([*LP, *WEATHER], [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 0, 0]])


def numbers(found: Report, unions: list[list[str]] | None = None) -> dict[str, str]:
    columns, (cells,) = tabulate([("a", found)], unions or ())
    return dict(zip(columns, (cell.percent for cell in cells), strict=True))


def test_groups_stand_beside_attacks() -> None:
    shown = numbers(A)
    assert list(shown) == [
        "clean", "L1", "L2", "Linf", "fog", "snow", "lp mean", "lp union", "perceptual mean", "average", "union",
    ]  # fmt: skip
    assert (shown["lp mean"], shown["lp union"]) == ("58.3", "25.0")
    assert (shown["perceptual mean"], shown["average"], shown["union"]) == ("87.5", "70.0", "0.0")


def test_a_group_that_is_all_there_is_is_not_shown_twice() -> None:
    only = report(LP, A.correct[:, :4].T.tolist())
    assert list(numbers(only)) == ["clean", "L1", "L2", "Linf", "average", "union"]


def test_corruptions_are_one_number() -> None:
    columns = [[1, 0], *([[1, 0]] * 30), *([[0, 1]] * 45)]
    assert numbers(report(CORRUPTIONS, columns)) == {"clean": "50.0", "corruptions mean": "50.0"}


def test_a_union_of_ones_own_has_an_interval() -> None:
    columns, (row, _) = tabulate([("a", A), ("b", B)], [["L2", "fog"], ["L1"]])
    assert columns[-2:] == ["union L2+fog", "union L1"]
    assert [cell.percent for cell in row[-2:]] == ["50.0", "50.0"]
    assert row[-2].interval == A.union_interval(["fog", "L2"])


def test_what_is_missing_is_told_with_what_it_costs() -> None:
    found = report(LP, A.correct[:, :2].T.tolist(), failed={"L2": "RuntimeError: no"}, pending=("Linf",))
    assert numbers(found) == {"clean": "100.0", "L1": "50.0", "L2": "–", "Linf": "–", "average": "–", "union": "–"}  # noqa: RUF001
    assert remarks(found) == [
        "L2 failed: RuntimeError: no",
        "not run yet: Linf; the same command without --cases runs the rest",
        "there is no average and no union until all attacks have run",
    ]
    both = report(LP, A.correct[:, :2].T.tolist(), failed={"L2": "no memory", "Linf": "no memory"})
    assert remarks(both)[0] == "L2, Linf failed: no memory"
    assert [math.isnan(column.cell(found).value) for column in columns_of([found])] == [
        False,
        False,
        True,
        True,
        True,
        True,
    ]
    many = report(CORRUPTIONS, [[1, 1]], pending=tuple(case.name for case in CORRUPTIONS))
    assert "noise-5 and 70 more; the same command" in remarks(many)[0]


def test_many_columns_become_rows(capsys: pytest.CaptureFixture[str]) -> None:
    show([("first", A), ("second", B)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["under", "first", "second"]
    assert [line.split()[0] for line in lines[1:7]] == ["clean", "L1", "L2", "Linf", "fog", "snow"]
    *table, caption, warning = lines
    assert "TF32" not in caption
    assert all(len(line) <= 80 for line in table)
    assert "suite autoattack+unseen" in caption
    assert warning == "first: 0.0% correct under every attack is no better than guessing among 10 classes (10.0%)"


def test_the_summary_says_that_a_search_was_in_tf32(capsys: pytest.CaptureFixture[str]) -> None:
    searched = replace(A, settings=A.settings | {"search_precision": "tf32"})
    show([("first", searched)])
    assert "4 test examples, suite autoattack+unseen, searched in TF32" in " ".join(capsys.readouterr().out.split())


def test_what_guessing_reaches_is_said_and_best_of_nothing() -> None:
    """Of 20 examples 2 are right under every attack, as for a model that always names one of ten classes."""
    half, two = [1] * 10 + [0] * 10, [1] * 2 + [0] * 18
    poor, none = report(LP, [half, two, two, two]), report(LP, [two, [0] * 20, [0] * 20, [0] * 20])
    assert remarks(poor) == ["10.0% correct under every attack is no better than guessing among 10 classes (10.0%)"]
    assert remarks(none) == ["10.0% correct without an attack is no better than guessing among 10 classes (10.0%)"]
    columns, cells = tabulate([("poor", poor), ("none", none)])
    assert [column for column, cell in zip(columns, cells[0], strict=True) if cell.best] == ["clean"]
    three = [1] * 3 + [0] * 17
    better = report(LP, [half, three, three, three])
    assert not remarks(better)
    assert all(cell.best for cell in tabulate([("a", better), ("b", poor)])[1][0][1:])


def test_pairs_of_unions_over_some_cases() -> None:
    assert paired(A, B).value == A.union - B.union
    assert paired(A, B, ["L2"]).value == pytest.approx(0.5 - 0.75)
    assert paired(A, B, ["L2"]).p == 1.0


def test_the_sentences_have_the_exact_test(tmp_path: Path) -> None:
    right = [[1] * 40, [1] * 40, [1] * 40, [1] * 40]
    wrong = [[1] * 40, [1] * 40, [1] * 40, [0] * 7 + [1] * 33]
    runs = [evaluated(report(LP, columns), tmp_path, name) for name, columns in (("a", right), ("b", wrong))]
    told = findings(runs)
    assert told[0].startswith("a classifies 100.0% of 40 test examples correctly under every attack (L1, L2, Linf)")
    assert "exact McNemar p = 0.016): more than the choice of examples can explain" in told[1]
    tied = findings([evaluated(report(LP, wrong), tmp_path, name) for name in ("a", "b")])
    assert tied[1].startswith(
        "b reaches the same accuracy on the same examples (95% interval -4.7 to +4.7, exact McNemar p"
    )
    waiting = report(LP, right[:3], pending=("Linf",))
    assert findings([evaluated(waiting, tmp_path)]) == [
        "Some cases have not been run, so there is no union to compare; run `rome evaluate` without --cases."
    ]
    corrupted = report(CORRUPTIONS[:1], right[:2])
    assert findings([evaluated(corrupted, tmp_path)]) == ["No attack was run, so there is no union to compare."]


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("k", [2, 5, 10])
def test_of_equal_models_one_report_in_twenty_at_most_claims_a_difference(k: int, named: bool, tmp_path: Path) -> None:
    """Images are as hard for every model. A family-wise error of .05 exceeds the bound once in a million seeds."""
    rng, reports = np.random.default_rng([k, named]), 100
    claims, one = 0, evaluated(A, tmp_path)
    for _ in range(reports):
        right = rng.random((k, 60)) < rng.random(60)
        runs = [replace(one, report=report(LP[:1], [[1] * 60, row.tolist()])) for row in right]
        claims += any("): more than the choice" in sentence for sentence in findings(runs, runs[0] if named else None))
    assert claims <= binom.ppf(1 - 1e-6, reports, 0.05)


def test_comparisons_are_counted_and_a_named_base_leaves_fewer(tmp_path: Path) -> None:
    wrong = [0, 7, 2, 1]
    runs = [
        evaluated(report(LP[:1], [[1] * 40, [0] * n + [1] * (40 - n)]), tmp_path, name)
        for n, name in zip(wrong, "abcd", strict=True)
    ]
    told = findings(runs)
    assert "exact McNemar p = 0.094): no more than the choice" in told[1], "2 (1/2)^7 times six pairs"
    assert "corrected for 6 comparisons, all pairs of the 4," in told[-2]
    based = findings(runs, runs[0])
    assert "exact McNemar p = 0.047): more than the choice" in based[1], "times three"
    assert "corrected for 3 comparisons, those with a." in based[-2]
    assert findings(runs, runs[1])[1].startswith("That is 17.5 points below a on the same examples")
    assert sum("comparisons" in sentence for sentence in findings(runs[:2])) == 0
    # intervals hold together: those of six are wider than those of three
    width = [float(re.search(r"interval \S+ to (\S+),", text[1])[1]) for text in (told, based)]
    assert width[0] > width[1]


def test_attacks_of_code_that_is_not_there_are_told(tmp_path: Path) -> None:
    found = report(LP[:1], [[1, 1]] * 2)
    found.settings["cases"][0]["attacks"] = [{"kind": "somebodys"}]
    with pytest.raises(UserError, match=f"the attacks of {tmp_path} cannot be read .*'somebodys'"):
        _ = Evaluated(name="mine", folder=tmp_path, report=found).attacks


# -------- RobustBench

KEYS = {
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "unreliable",
}  # fmt: skip
"""Of its JSON files."""


def test_an_entry_for_every_threat(tmp_path: Path) -> None:
    columns = [[1] * 9 + [0], [1] * 5 + [0] * 5, [1] * 7 + [0] * 3, [0] * 4 + [1] * 5 + [0]]
    found = report([*LP, *CORRUPTIONS], [*columns, *([[1] * 8 + [0] * 2] * 75)])
    run = evaluated(found, tmp_path, data={"kind": "cifar10"}, model={"name": "resnet18"}, experts=None)
    files = write_entries([run], tmp_path / "out")
    place = tmp_path / "out" / "model_info" / "cifar10"
    assert files == [place / threat / "My_run.json" for threat in ("L1", "L2", "Linf", "corruptions")]
    linf = json.loads((place / "Linf" / "My_run.json").read_text())
    assert linf.keys() >= KEYS
    assert (linf["dataset"], linf["architecture"], linf["eps"]) == ("cifar10", "resnet18", "8/255")
    assert (linf["clean_acc"], linf["autoattack_acc"], linf["union"]) == ("90.00", "50.00", "10.00")
    assert (linf["unreliable"], linf["n_examples"], linf["union_threats"]) == (False, 10, ["L1", "L2", "Linf"])
    assert linf["threats"] == {
        "L1": {"eps": "12", "acc": "50.00"},
        "L2": {"eps": "0.5", "acc": "70.00"},
        "Linf": {"eps": "8/255", "acc": "50.00"},
    }
    with np.load((place / "Linf" / linf["mask_file"]).resolve()) as mask:
        column = list(mask["cases"]).index(linf["mask_column"])
        assert percent(mask["correct"][:, column].mean()) == linf["autoattack_acc"]
    corruptions = json.loads((place / "corruptions" / "My_run.json").read_text())
    assert (corruptions["corruptions_acc"], corruptions["eps"]) == ("80.00", None)
    assert "autoattack_acc" not in corruptions


@pytest.mark.parametrize(
    ("model", "known"), [({}, False), ({"pretrained": True}, True), ({"pretrained": False, "weights": "a.pt"}, None)]
)
def test_weights_to_start_from_are_additional_data(model: dict[str, Any], known: bool | None, tmp_path: Path) -> None:
    settings = {"name": "vit_tiny_patch16_224", "img_size": 8, "patch_size": 4, **model}
    run = evaluated(report(LP, [[1, 1]] * 4), tmp_path, data={"kind": "cifar10"}, model=settings)
    assert entries_of(run)["Linf"]["additional_data"] is known


def test_entries_of_two_runs_have_two_names(tmp_path: Path) -> None:
    run = evaluated(report(LP, [[1, 1]] * 4), tmp_path, data={"kind": "cifar10"})
    with pytest.raises(UserError, match="entries of a b and a_b would have the same name"):
        write_entries([replace(run, name="a b"), replace(run, name="a_b")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_the_standard_attacks_make_an_entry(tmp_path: Path) -> None:
    weak = AutoAttackSuite(square_queries=100).cases({"Linf": CIFAR10["Linf"]}, 10)
    short = APGDSuite().cases({"L2": CIFAR10["L2"]}, 10)
    full = AutoAttackSuite().cases({"Linf": CIFAR10["Linf"]}, 10)
    assert entries_of(evaluated(report([*weak, *short], [[1, 1]] * 3), tmp_path)) == {}
    assert list(entries_of(evaluated(report([*full, *short], [[1, 1]] * 3), tmp_path))) == ["Linf"]
    with pytest.raises(UserError, match=r"need AutoAttack's standard version.*--suite autoattack"):
        write_entries([evaluated(report(weak, [[1, 1]] * 2), tmp_path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_given_model_has_an_entry_if_its_data_are_known(tmp_path: Path) -> None:
    found = report(LP, [[1, 1, 0]] * 4)
    found.settings.update(
        model={"type": "ResNet", "sha256": "0"},
        provenance={"model": {"name": "net.pt"}, "data": {"kind": "cifar10", "path": "some/where"}},
    )
    model = Evaluated(name="mine", folder=tmp_path, report=found)
    entry = entries_of(model)["Linf"]
    assert (entry["name"], entry["architecture"], entry["dataset"]) == ("mine", "net.pt", "cifar10")
    assert entry["additional_data"] is None
    for path in ("Hub/CIFAR-100", "Hub/CIFAR-100/test.parquet"):
        found.settings["provenance"]["data"] = {"kind": "parquet", "path": path}
        assert entries_of(model)["Linf"]["dataset"] == "cifar-100"
    found.settings["provenance"] = {"data": "whatever somebody wrote in Python"}
    with pytest.raises(UserError, match=f"entries name the data, but {tmp_path} does not"):
        entries_of(model)


def test_masked_gradients_make_an_entry_unreliable(tmp_path: Path) -> None:
    warning = {"check": "unbounded-attack", "case": None, "attack": None, "examples": 6, "message": ""}
    found = report(LP, [[1, 1]] * 4, warnings=[warning])
    assert entries_of(evaluated(found, tmp_path))["L2"]["unreliable"] is True


def test_corruptions_need_all_of_them(tmp_path: Path) -> None:
    found = report([*LP, *CORRUPTIONS[:-1]], [[1, 1]] * (4 + 74))
    assert list(entries_of(evaluated(found, tmp_path))) == ["L1", "L2", "Linf"]


@pytest.mark.parametrize(
    ("ball", "text"),
    [
        (CIFAR10["Linf"], "8/255"),
        (IMAGENET["Linf"], "4/255"),
        (LpBall(norm="Linf", eps=0.03), "0.03"),
        (LpBall(norm="Linf", eps=0.3), "0.3"),
        (IMAGENET["L1"], "255"),
        (LpBall(norm="L2", eps=1200 / 255), "4.70588"),
    ],
)
def test_radii_are_written_as_leaderboards_do(ball: LpBall, text: str) -> None:
    assert ball.radius == text


# -------- on the page


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run evaluated under APGD, an attack beyond Lp, and two corruptions."""
    from rome.evaluation.run import evaluate_saved

    suites = [
        {"kind": "apgd", "iterations": 5},
        {"kind": "toys", "how": ["negative", "same"], "prefix": "attack", "group": "perceptual"},
        {"kind": "toys", "how": ["noise", "same"], "on_all": True, "group": "corruptions"},
        {"kind": "corruptions", "types": ["contrast"], "severities": [2]},
    ]
    settings = {"imports": ["helpers.toy_suites"], "epochs": 1, "evaluation": {"suite": suites, "n": 20}}
    run = train(tiny(name="composed", **settings), tmp_path_factory.mktemp("tables") / "run")
    evaluate_saved(run.folder, checks=True)
    return run.folder


@pytest.mark.slow
def test_a_page_of_a_composed_suite(composed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = write_report([composed], tmp_path / "out", unions=[["L1", "attack-1"]]).read_text()
    text = (tmp_path / "out" / "report.md").read_text()
    for title in ("lp union", "perceptual mean", "corruptions mean", "union L1+attack-1"):
        assert title in page
        assert title in text
    assert "toy-0" not in re.sub(r"<details>.*?</details>", "", page, flags=re.DOTALL)
    assert "suite apgd (5 iterations)+toys+toys+corruptions" in page
    assert "Checks for masked gradients on 1 examples" in page
    assert re.search(r"ε 0\.35, Linf ε 0\.1\.", page)
    assert "attack-0" in capsys.readouterr().out
    assert all("corrupted images made here with the severities of CIFAR-10-C" in each for each in (page, text))
    with pytest.raises(UserError, match="no case 'L7'"):
        write_report([composed], tmp_path / "other", unions=[["L7"]])
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_part_of_the_configs_suite_keeps_its_settings(composed: Path, tmp_path: Path) -> None:
    from rome.evaluation.run import evaluate_saved

    found, _ = evaluate_saved(composed, suite="apgd", n=4, out=tmp_path / "a")
    assert found.settings["suite"] == {"kind": "apgd", "iterations": 5}
    found, _ = evaluate_saved(composed, suite="lp,toys", n=4, cases=["toy-0"], out=tmp_path / "b")
    assert [suite.get("on_all") for suite in found.settings["suite"]["suites"]] == [None, True]


def test_the_command_takes_unions_and_refuses_what_robustbench_would(
    composed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(composed, tmp_path / "run")
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--union", "L1,L2", "--robustbench"])
    assert ended.value.code == 2
    assert "RobustBench's entries need AutoAttack's standard version" in capsys.readouterr().err
