"""Suites compose into one matrix; columns may be run one at a time, in the memory there is, and survive a kill."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.small_models import THREADS
from helpers.tiny_runs import PRELOAD, changed
from helpers.toy_suites import Brightness, Numbered, Toy, ToySuite, shades
from rome.attacks import LPA, Corruption, Fog
from rome.attacks.suites import unseen
from rome.attacks.suites.base import APGDSuite, AutoAttackSuite, QuickSuite
from rome.attacks.suites.composed import AllSuites, SeveralSuites, as_suite, check_files, with_features
from rome.attacks.suites.unseen import COMMON_CORRUPTIONS, CorruptionsSuite, UnseenSuite
from rome.core.errors import UserError
from rome.evaluation.evaluate import Case, Report, Suite, evaluate, example_images
from rome.evaluation.memory import Halving, out_of_memory
from rome.evaluation.statistics import wilson
from rome.models import create_model, save_model
from rome.report.columns import remarks
from rome.runs.config import parse
from rome.threats import CIFAR10, DIGITS, AnyImage, LpBall, Perceptual

LINF = [LpBall(norm="Linf", eps=0.1)]
LABELS = torch.tensor([0, 0, 1, 1, 1])
SHADES = shades(0.1, 0.45, 0.9, 0.55, 0.2)
"""Far inside, near the boundary, far inside, near it, and wrong: under Linf 0.1 the second and fourth fall."""


def toys(*how: str, **settings: Any) -> ToySuite:
    return ToySuite(how=how, **settings)


def names(suite: Suite) -> list[str]:
    return [case.name for case in suite.cases(dict(zip(("L1", "L2", "Linf"), DIGITS, strict=True)), 10)]


def column(report: Report, name: str) -> list[bool]:
    return report.correct[:, report.cases.index(name)].tolist()


# -------- what a suite may be


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("apgd", APGDSuite()),
        ("apgd,lp", SeveralSuites(suites=(APGDSuite(), QuickSuite()))),
        ([{"kind": "lp", "steps": 3}], QuickSuite(steps=3)),
        (["apgd", QuickSuite(steps=3)], SeveralSuites(suites=(APGDSuite(), QuickSuite(steps=3)))),
        ({"kind": "apgd", "iterations": 9}, APGDSuite(iterations=9)),
        ("{kind: apgd, iterations: 9}", APGDSuite(iterations=9)),
        ("[apgd, {kind: lp, steps: 3}]", SeveralSuites(suites=(APGDSuite(), QuickSuite(steps=3)))),
        ({"kind": "unseen", "attacks": {"fog": {"steps": 3}}}, UnseenSuite(attacks={"fog": {"steps": 3}})),
        ("all", AllSuites(suites=(AutoAttackSuite(), UnseenSuite(), CorruptionsSuite()))),
    ],
)
def test_a_suite_is_a_name_settings_or_several_of_them(given: Any, expected: Suite) -> None:
    assert as_suite(given) == expected
    assert as_suite(expected.dump()) == expected
    config = parse(changed(evaluation={"suite": given.dump() if isinstance(given, Suite) else given}))
    assert config.evaluation.suite == expected
    assert parse(config.dump()).evaluation.suite == expected


def test_labels_name_folders_and_tables() -> None:
    assert as_suite("apgd").label == "apgd"
    assert as_suite("apgd,unseen").label == "apgd+unseen"
    assert as_suite("all").label == "all"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("apdg", r"unknown suite kind 'apdg'.*Did you mean 'apgd'"),
        ("apgd,unsen", r"Did you mean 'unseen'"),
        ([], "at least 1 item"),
        ({"kind": "lp", "stps": 3}, "unknown key. Did you mean .steps."),
        ("", r"^suite: none is named\. Valid: all, apgd"),
        (" , ", r"^suite: none is named"),
        ("{kind: apgd", r"^suite: '{kind: apgd': not valid YAML"),
        ({"kind": "unseen", "attacks": {"fgo": {}}}, r"the suite has no attack 'fgo'.* Did you mean 'fog'"),
        ({"kind": "unseen", "attacks": {"fog": {"stpes": 1}}}, r"attack 'fog': Fog: stpes: unknown key"),
    ],
)
def test_what_is_no_suite_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_suite(given)


def test_a_mistake_in_a_list_of_suites_is_told_with_its_place() -> None:
    with pytest.raises(UserError, match=r"evaluation\.suite.*unknown suite kind 'fgo'"):
        parse(changed(evaluation={"suite": ["apgd", "fgo"]}))


def test_two_suites_with_one_column_are_refused() -> None:
    with pytest.raises(UserError, match=r"suites 'apgd' and 'autoattack' both have a column 'L1': leave one"):
        names(as_suite("apgd,autoattack"))


def test_a_case_comes_back_from_plain_data() -> None:
    special = Case(name="fog", threat=AnyImage(label="fog"), attacks=(Toy(),), group="weather", on_all=True)
    assert Case.model_validate(special.dump()) == special


def test_the_quick_suite_knows_the_closed_form() -> None:
    """A mean shade of 1/2 +- eps is the boundary: our attacks find every example within it and none beyond."""
    margins = np.array([-0.3, -0.11, -0.09, -0.02, 0.03, 0.095, 0.105, 0.4])
    x, y = shades(*(0.5 + margins).tolist()), torch.tensor(margins > 0).long()
    found = evaluate(Brightness().eval(), x, y, threats=LINF, suite="lp")
    assert column(found, "Linf") == (abs(margins) > 0.1).tolist()
    assert [attack["kind"] for attack in found.settings["cases"][0]["attacks"]] == ["apgd", "pgd"]
    assert found.warnings[0]["check"] == "fewer-attacks"


# -------- unseen threats and corruptions


def test_the_unseen_suite_is_the_papers_table() -> None:
    cases = UnseenSuite().cases({"L2": DIGITS["L2"], "Linf": DIGITS["Linf"]}, 10)
    groups = {case.name: case.group for case in cases}
    assert [name for name, group in groups.items() if group == "perceptual"] == [
        "fog", "snow", "gabor", "elastic", "jpeg",
    ]  # fmt: skip
    assert list(groups)[5:] == ["sparsefool", "patch", "stadv", "recoloradv", "ppgd", "lpa", "gma"]
    threats = {case.name: case.threat for case in cases}
    assert threats.pop("gma") == DIGITS["Linf"]
    assert threats.pop("ppgd") == threats.pop("lpa") == Perceptual(bound=0.25, features="runs/alexnet")
    assert all(threat == AnyImage(label=name) for name, threat in threats.items())
    assert not any(case.on_all for case in cases)
    assert UnseenSuite().cases({}, 10)[-1].threat == CIFAR10["Linf"]


def test_the_network_that_measures_reaches_the_unseen_threats_of_any_suite() -> None:
    assert with_features(UnseenSuite(bound=0.5), "self") == UnseenSuite(bound=0.5, features="self")
    assert with_features(as_suite("apgd"), None) == APGDSuite()
    changed = with_features(AllSuites(), "net")
    assert changed == AllSuites(suites=(AutoAttackSuite(), UnseenSuite(features="net"), CorruptionsSuite()))
    nested = SeveralSuites(suites=(QuickSuite(), SeveralSuites(suites=(UnseenSuite(),))))
    by_case = {case.name: case for case in with_features(nested, "net").cases({"Linf": CIFAR10["Linf"]}, 10)}
    for name in ("ppgd", "lpa"):
        assert by_case[name].threat == Perceptual(bound=0.25, features="net")
    for suite in ("apgd", "apgd,corruptions"):
        with pytest.raises(UserError, match=r"measures no perceptual distances, so --features has no meaning"):
            with_features(as_suite(suite), "net")


def test_a_network_that_is_not_there_costs_its_cases_alone_and_is_told_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)).eval()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    suite = UnseenSuite(features=str(tmp_path / "gone"))
    wanted = ("ppgd", "lpa", "gma")
    found = evaluate(model, x, model(x).argmax(1), threats=CIFAR10, suite=suite, cases=wanted, progress=True)
    assert found.cases == ("clean", "gma")
    assert found.failed["ppgd"] == found.failed["lpa"]
    assert found.failed["lpa"].startswith("no network to measure perceptual distances with: there is no model at")
    assert "Train it (rome train experiments/alexnet" in found.failed["lpa"]
    told = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in told] == ["ppgd", "lpa", "gma"]
    assert told[0].startswith("ppgd: failed: no network")
    assert sum("no network" in sentence for sentence in remarks(found)) == 1


def test_attacks_without_meaning_on_the_images_are_left_out_and_the_union_is_of_the_others(capsys: Any) -> None:
    """Colours of grey images cannot change: no failure, and no reason to miss the union."""
    suite = UnseenSuite()
    few = tuple(row for row in unseen.UNSEEN if row.kind in ("recoloradv", "patch"))
    why = "changes colours: it needs images of 3 channels, not 1"
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unseen, "UNSEEN", few)
        report = evaluate(model, x, y, suite=suite, threats=CIFAR10, progress=True)
        assert (
            "recoloradv: left out: it changes colours: it needs images of 3 channels, not 1" in capsys.readouterr().err
        )
        assert (report.attacks, dict(report.failed)) == (("patch",), {})
        assert report.union == report.robust["patch"]
        assert remarks(report)[1:] == [f"recoloradv left out: it {why}"]
        with pytest.raises(UserError, match="the suite has no case 'recoloradv'"):
            evaluate(model, x, y, suite=suite, threats=CIFAR10, cases=["recoloradv"])
        patch.setattr(unseen, "UNSEEN", tuple(row for row in few if row.kind == "recoloradv"))
        with pytest.raises(UserError, match="recoloradv changes colours"):
            evaluate(model, x, y, suite=suite, threats=CIFAR10)


def test_every_context_of_an_unseen_attack_may_be_given_and_what_is_not_stays_the_papers() -> None:
    suite = UnseenSuite(attacks={"fog": {"steps": 7, "step_size": "1/8"}, "lpa": {"rounds": 2}})
    found = {case.name: case.attacks[0] for case in suite.cases({}, 10)}
    usual = {case.name: case.attacks[0] for case in UnseenSuite().cases({}, 10)}
    assert found.pop("fog") == Fog(steps=7, step_size=0.125)
    assert found.pop("lpa") == LPA(rounds=2)
    assert found == {name: attack for name, attack in usual.items() if name not in ("fog", "lpa")}
    with pytest.raises(UserError, match=r"evaluation\.suite.*the suite has no attack 'gabr'"):
        parse(changed(evaluation={"suite": {"kind": "unseen", "attacks": {"gabr": {}}}}))


def test_files_that_were_named_are_missed_before_anything_runs(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    read = CorruptionsSuite(path=gone, types=("fog",))
    for suite in (UnseenSuite(features=gone), SeveralSuites(suites=(APGDSuite(), UnseenSuite(features=gone)))):
        with pytest.raises(UserError, match="no network to measure perceptual distances with: there is no model at"):
            check_files(suite)
        assert check_files(suite, ["fog", "Linf"]) == [], "none of these measures"
    for suite in (read, SeveralSuites(suites=(APGDSuite(), read))):
        with pytest.raises(UserError, match=r"labels.npy is missing: give the unpacked folder of CIFAR-10-C"):
            check_files(suite, ["fog-3"])
        assert check_files(suite, ["Linf"]) == []
    for suite in (as_suite("apgd"), CorruptionsSuite(), UnseenSuite(features="self")):
        assert check_files(suite) == []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # without the usual network
        (sentence,) = check_files(AllSuites())
    assert sentence.startswith("ppgd and lpa will fail: no network to measure perceptual distances with")


def test_what_another_network_measured_is_done_again_and_nothing_else(tmp_path: Path) -> None:
    def network(seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            made = create_model("convnext_atto", num_classes=3, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), patch_size=1)
        save_model(made, tmp_path / "net" / "model.safetensors")

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    suite = UnseenSuite(features=str(tmp_path / "net"), attacks={"ppgd": {"steps": 1}, "gma": {"steps": 1}})
    rows = tuple(row for row in unseen.UNSEEN if row.kind in suite.attacks)

    def run() -> tuple[Report, dict[str, Any]]:
        report = evaluate(model, x, model(x).argmax(1), threats=CIFAR10, suite=suite, out=tmp_path / "out")
        return report, stamps(tmp_path / "out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unseen, "UNSEEN", rows)
        network(0)
        first, before = run()
        assert list(first.settings["networks"]) == ["ppgd"]
        assert run()[1] == before, "finished"
        network(1)
        second, after = run()
        assert second.settings["networks"] != first.settings["networks"]
        redone = {name for name in after if "batches" in name and after[name] != before[name]}
        assert [Path(name).parent.name for name in redone] == ["ppgd"]
        assert run()[1] == after, "finished again"
        (tmp_path / "net" / "model.safetensors").unlink()
        assert run()[1] == after, "a network that is gone leaves what it measured"


def test_corruptions_are_fifteen_types_at_five_severities() -> None:
    cases = CorruptionsSuite().cases({}, 10)
    assert len(cases) == 75
    assert len(set(COMMON_CORRUPTIONS)) == 15
    assert all(case.on_all and case.group == "corruptions" for case in cases)
    assert cases[7].name == "shot_noise-3"
    assert cases[7].attacks == (Corruption(type="shot_noise", severity=3),)
    few = CorruptionsSuite(types=("fog", "snow"), severities=(5,))
    assert [case.name for case in few.cases({}, 10)] == ["fog-5", "snow-5"]
    assert len({case.name for case in AllSuites().cases({"Linf": CIFAR10["Linf"]}, 10)}) == 1 + 12 + 75


def test_a_fixed_change_is_for_all_examples_and_in_no_union(tmp_path: Path) -> None:
    """The negative of a dark image is bright: what was right is wrong, and what was wrong is right."""
    suite = SeveralSuites(
        suites=(
            QuickSuite(steps=3),
            toys("negative", "same", on_all=True, group="corruptions"),
            toys("negative", prefix="attack"),
        )
    )
    found = evaluate(Brightness().eval(), SHADES, LABELS, threats=LINF, suite=suite, out=tmp_path)
    assert column(found, "clean") == [True, True, True, True, False]
    assert column(found, "toy-0") == [False, False, False, False, True]
    assert column(found, "toy-1") == column(found, "clean")
    assert column(found, "attack-0") == [False] * 5, "as an attack, it is not asked about what is wrong already"
    assert found.robust == {"Linf": 0.4, "toy-0": 0.2, "toy-1": 0.8, "attack-0": 0.0}
    assert found.groups == {"lp": 0.4, "corruptions": pytest.approx(0.5)}
    assert found.attacks == ("Linf", "attack-0")
    assert (found.average, found.union) == (pytest.approx(0.2), 0.0)
    assert found.union_of(["Linf"]) == found.union_of(["Linf", "toy-1"]) == 0.4
    assert found.interval("toy-0") == wilson(1, 5)
    assert found.union_interval(["Linf", "toy-1"]) == wilson(2, 5)
    loaded = Report.load(tmp_path)
    assert (loaded.correct == found.correct).all()
    assert loaded.to_json() == found.to_json() == json.loads(json.dumps(found.to_json()))
    with pytest.raises(UserError, match="were not kept"):
        example_images(tmp_path, "toy-0")
    assert example_images(tmp_path, "attack-0")[0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("batch_size", [2, 3, "auto"])
def test_a_fixed_change_may_ask_for_an_examples_number(batch_size: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unseen, "Corruption", Numbered)
    suite = CorruptionsSuite(types=("fog",), severities=(1, 2), path="CIFAR-10-C")
    model = Brightness(None if batch_size != "auto" else 3).eval()
    found = evaluate(model, SHADES, LABELS, suite=suite, batch_size=batch_size)
    assert found.settings["cases"][1]["attacks"][0] == Numbered(type="fog", severity=2, path="CIFAR-10-C").dump()
    assert column(found, "fog-1") == [False, True, False, True, True]


def test_fixed_changes_alone_have_no_union() -> None:
    found = evaluate(Brightness().eval(), SHADES, LABELS, suite=toys("negative", on_all=True, group="corruptions"))
    assert math.isnan(found.average)
    assert math.isnan(found.union)
    assert found.to_json()["union"] is None
    assert found.groups == {"corruptions": 0.2}


def test_what_a_missing_case_is_part_of_is_missing() -> None:
    """A failed corruption spoils its group's mean and nothing else."""
    suite = SeveralSuites(
        suites=(QuickSuite(steps=3), toys("negative", "raise", on_all=True, group="g"), toys("same", prefix="s"))
    )
    found = evaluate(Brightness().eval(), SHADES, LABELS, threats=LINF, suite=suite)
    assert found.failed == {"toy-1": "RuntimeError: a toy that breaks"}
    assert math.isnan(found.groups["g"])
    assert found.groups["lp"] == 0.4
    assert found.union == 0.4
    assert found.to_json()["groups"]["g"] is None
    with pytest.raises(UserError, match=r"no case 'toy-1' in this report \(it failed: RuntimeError"):
        found.union_of(["toy-1"])


def test_the_unseen_suite_can_stop_where_the_published_attacks_go_on() -> None:
    def stopping(suite: Suite) -> list[str]:
        return [case.name for case in suite.cases({}, 10) if getattr(case.attacks[0], "stop", False)]

    assert stopping(UnseenSuite()) == []
    kinds = ["fog", "snow", "gabor", "elastic", "jpeg", "patch", "stadv", "recoloradv"]
    assert stopping(UnseenSuite(stop=True)) == kinds
    assert stopping(UnseenSuite(stop=True, attacks={"snow": {"stop": False}})) == [k for k in kinds if k != "snow"]
    assert stopping(UnseenSuite(attacks={"fog": {"stop": True}})) == ["fog"]
    assert as_suite(UnseenSuite(stop=True).dump()) == UnseenSuite(stop=True)


def test_the_unseen_suite_in_its_published_form() -> None:
    """Every attack that has such a form takes it, and folder and tables tell the two suites apart."""

    def published(suite: Suite) -> list[str]:
        return [case.name for case in suite.cases({}, 10) if getattr(case.attacks[0], "form", "") == "published"]

    assert published(UnseenSuite()) == []
    assert published(UnseenSuite(form="published")) == ["fog", "snow", "gabor", "elastic", "jpeg", "ppgd", "lpa"]
    assert UnseenSuite(form="published").label == "unseen-published"
    assert as_suite(["apgd", UnseenSuite(form="published")]).label == "apgd+unseen-published"
    with pytest.raises(UserError, match="returns its last iterate: leave stop out"):
        UnseenSuite(form="published", stop=True).cases({}, 10)


@pytest.mark.parametrize("threat", CIFAR10, ids=lambda threat: threat.name)
def test_who_has_no_gradient_is_not_reported_as_robust(threat: LpBall) -> None:
    """Its sign would be 0 and the attack stand still; one such example fails the case, in a line that says why."""

    class NoGradient(Brightness):
        def forward(self, x: Tensor) -> Tensor:
            dark = (x.flatten(1).mean(1) < 0.4).view(-1, 1, 1, 1)
            return super().forward(x) + 0 * torch.where(dark, x - x, 1 + 0 * x).sqrt().flatten(1).sum(1, keepdim=True)

    suite = SeveralSuites(suites=(QuickSuite(steps=3), toys("same", prefix="s")))
    args: dict[str, Any] = {"threats": [threat], "suite": suite}
    assert not evaluate(Brightness().eval(), SHADES, LABELS, **args).failed
    found = evaluate(NoGradient().eval(), SHADES, LABELS, **args)
    said = r"FloatingPointError: .*images for \d of \d examples: the gradients of the model are not finite there"
    assert re.fullmatch(said, found.failed[threat.name])
    assert math.isnan(found.union)


def test_groups_of_attacks_have_unions() -> None:
    settings = {
        "cases": [
            {"name": "L1", "threat": {"kind": "lp"}},
            {"name": "L2", "threat": {"kind": "lp"}},
            {"name": "fog", "threat": {"kind": "any-image"}, "group": "perceptual"},
            {"name": "snow", "threat": {"kind": "any-image"}, "group": "perceptual"},
            {"name": "gma", "threat": {"kind": "lp"}, "group": "gates"},
            {"name": "noise-1", "threat": {"kind": "any-image"}, "group": "corruptions", "on_all": True},
            {"name": "noise-2", "threat": {"kind": "any-image"}, "group": "corruptions", "on_all": True},
        ]
    }
    rows = np.array([[1, 1, 1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 0, 0, 0], [0] * 6 + [1, 1]])
    found = Report(
        rows.astype(bool),
        ("clean", *(case["name"] for case in settings["cases"])),
        np.zeros(4, np.int64),
        np.arange(4),
        settings,
    )
    assert found.groups == {"lp": 5 / 8, "perceptual": 0.5, "gates": 0.5, "corruptions": 5 / 8}
    assert found.unions == {"lp": 0.5, "perceptual": 0.25}
    assert found.union == 0.25
    assert found.union_of(["L1", "gma"]) == 0.25


# -------- some columns now, the others later


def stamps(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("batches/**/*.safetensors")}


def test_cases_may_be_run_one_at_a_time(tmp_path: Path) -> None:
    def run(*cases: str, out: Path | None = tmp_path) -> Report:
        chosen = {"cases": cases} if cases else {}
        suite = SeveralSuites(suites=(QuickSuite(steps=3), toys("negative", "same", "noise")))
        return evaluate(Brightness().eval(), SHADES, LABELS, threats=LINF, suite=suite, batch_size=2, out=out, **chosen)

    first = run("Linf", "toy-1")
    assert first.cases == ("clean", "Linf", "toy-1")
    assert first.pending == ("toy-0", "toy-2")
    assert first.failed == {}
    assert math.isnan(first.union)
    assert math.isnan(first.average)
    assert first.to_json()["pending"] == ["toy-0", "toy-2"] == list(Report.load(tmp_path).pending)
    assert first.union_of(["Linf", "toy-1"]) == 0.4
    with pytest.raises(UserError, match=r"no case 'toy-0' in this report \(it has not been run\)"):
        first.union_of(["toy-0"])
    before = stamps(tmp_path)
    second = run("toy-0")
    assert second.cases == ("clean", "Linf", "toy-0", "toy-1"), (
        "what an earlier call ran is there, in the suite's order"
    )
    assert second.pending == ("toy-2",)
    after = stamps(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all("toy-0" in name for name in after.keys() - before.keys())
    whole, alone = run(), run(out=None)
    assert whole.pending == ()
    assert whole.union == alone.union
    assert (whole.correct == alone.correct).all()
    final = stamps(tmp_path)
    assert {name: final[name] for name in after} == after


def test_choosing_a_column_that_is_not_there(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"threats": LINF, "suite": "lp"}
    with pytest.raises(UserError, match=r"the suite has no case 'Lnf'. Did you mean 'Linf'"):
        evaluate(Brightness().eval(), SHADES, LABELS, **settings, cases=["Lnf"], out=tmp_path / "a")
    with pytest.raises(UserError, match="no case was named"):
        evaluate(Brightness().eval(), SHADES, LABELS, **settings, cases=[])
    assert not (tmp_path / "a").exists()


def test_a_failed_case_is_run_again_and_others_stay(tmp_path: Path) -> None:
    suite = toys("same", "raise")
    first = evaluate(Brightness().eval(), SHADES, LABELS, suite=suite, out=tmp_path)
    assert (first.cases, list(first.failed)) == (("clean", "toy-0"), ["toy-1"])
    again = evaluate(Brightness().eval(), SHADES, LABELS, suite=suite, out=tmp_path, cases=["toy-0"])
    assert (again.failed, again.pending) == ({}, ("toy-1",))


# -------- killed in the middle


def _evaluate(out: Path) -> None:
    torch.set_num_threads(THREADS)
    evaluate(Brightness().eval(), SHADES, LABELS, threats=LINF, suite=_killed(out), batch_size=2, out=out / "result")


def _killed(out: Path) -> Suite:
    """Eight units into the evaluation, the third column kills the process on its first batch, if told to."""
    return SeveralSuites(suites=(QuickSuite(steps=3), toys("noise", f"kill:{out / 'flag'}", "negative")))


@pytest.mark.slow
def test_a_composed_suite_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    (tmp_path / "flag").touch()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=_evaluate, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    before = stamps(tmp_path / "result")
    done = sorted({Path(name).parent.name for name in before})
    assert done == ["Linf", "clean", "toy-0"]
    assert not (tmp_path / "result" / "result.json").exists()
    _evaluate(tmp_path)
    resumed = Report.load(tmp_path / "result")
    after = stamps(tmp_path / "result")
    assert {name: after[name] for name in before} == before
    assert {Path(name).parent.name for name in after.keys() - before.keys()} == {"toy-1", "toy-2"}
    whole = evaluate(Brightness().eval(), SHADES, LABELS, threats=LINF, suite=_killed(tmp_path), batch_size=2, out=None)
    assert (resumed.correct == whole.correct).all()


# -------- memory


CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
)


def many(n: int = 20) -> tuple[Tensor, Tensor]:
    values = torch.linspace(0.05, 0.95, n)
    return shades(*values.tolist()), (values > 0.5).long()


@pytest.mark.parametrize("error", [None, RuntimeError(CPU), MemoryError(), RuntimeError("MPS backend out of memory")])
def test_auto_halves_what_does_not_fit(error: Exception | None, tmp_path: Path) -> None:
    x, y = many()
    model = Brightness(6, error).eval()
    plain = evaluate(Brightness().eval(), x, y, threats=LINF, suite="lp")
    found = evaluate(model, x, y, threats=LINF, suite="lp", batch_size="auto", out=tmp_path)
    assert (found.correct == plain.correct).all()
    assert [w["message"] for w in found.warnings if w["check"] == "out-of-memory"] == [
        "out of memory with 250 examples per batch: ran in batches of at most "
        f"{largest}, which have different random starts"
        for largest in (5, 4)
    ]
    warnings = {(w["check"], w["attack"]): w["examples"] for w in found.warnings if w["check"] == "out-of-memory"}
    assert warnings == {("out-of-memory", "apgd"): 20, ("out-of-memory", "pgd"): 16}
    tried = [size for size in model.sizes if size > 6]
    assert tried == [20, 10, 20, 10, 16, 8], "the first forward and clean accuracy, APGD, PGD on those that are left"
    assert len(stamps(tmp_path)) == 3, "a batch stays one unit of work"
    assert found.settings["batch_size"] == 250


def test_a_number_is_meant(tmp_path: Path) -> None:
    """Without auto the evaluation fails and says what to do; with it, the same folder goes on."""
    x, y = many()
    settings: dict[str, Any] = {"threats": LINF, "suite": "lp", "out": tmp_path}
    attacked = Brightness().eval()
    attacked.forward = _only_with_gradient(attacked)  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(attacked, x, y, **settings)
    suite = SeveralSuites(suites=(QuickSuite(steps=3), toys("same")))
    found = evaluate(attacked, x, y, threats=LINF, suite=suite)
    assert found.failed["Linf"].endswith("try a smaller batch_size, or batch_size='auto'")
    assert evaluate(attacked, x, y, **settings, batch_size="auto").union == 0.8


def _only_with_gradient(model: Brightness) -> Any:
    forward = model.forward

    def limited(x: Tensor) -> Tensor:
        model.largest = 6 if x.requires_grad else None
        return forward(x)

    return limited


def test_an_example_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(Brightness(0).eval(), *many(), threats=LINF, suite="lp", batch_size="auto")


def test_pieces_are_in_order_and_a_size_that_failed_is_not_tried_again() -> None:
    tried: list[int] = []

    def work(part: np.ndarray) -> list[int]:
        tried.append(len(part))
        if len(part) > 3:
            raise torch.OutOfMemoryError
        return part.tolist()

    halving = Halving(allowed=True)
    first = halving.run("a", np.arange(10), work)
    assert [piece for _, piece in first] == [[0, 1, 2], [3, 4], [5, 6, 7], [8, 9]]
    assert tried == [10, 5, 3, 2, 3, 2]
    tried.clear()
    assert [piece for _, piece in halving.run("a", np.arange(10), work)] == [piece for _, piece in first]
    assert tried == [3, 2, 3, 2]
    tried.clear()
    halving.run("b", np.arange(4), work)
    assert tried == [4, 2, 2], "other work needs other memory"


def test_other_errors_are_no_want_of_memory() -> None:
    assert not out_of_memory(RuntimeError("shape mismatch"))
    assert not out_of_memory(ValueError("out of memory"))
    with pytest.raises(UserError, match=r"batch_size must be at least 1 \(or 'auto'\)"):
        evaluate(Brightness().eval(), *many(), batch_size="large")  # type: ignore[arg-type]
