"""The evaluator: one matrix, the same after any interruption; it refuses what would make it wrong."""

import copy
import errno
import itertools
import json
import math
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pyautoattack import AutoAttack
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from helpers.problems import rest_slow
from helpers.small_models import THREADS, drawn, knowing
from helpers.tiny_runs import started
from rome.attacks.base import Attack, AttackResult
from rome.attacks.engine import Model
from rome.attacks.lp.autoattack import AttackWarning, Square, set_iterations
from rome.attacks.lp.pgd import PGD
from rome.attacks.suites.base import APGDSuite, AutoAttackSuite, SaveImages
from rome.attacks.suites.unseen import CorruptionsSuite
from rome.core.errors import UserError
from rome.core.files import replace_file
from rome.data.base import Pixels
from rome.evaluation import store
from rome.evaluation.checks import check_outputs
from rome.evaluation.evaluate import Case, Report, Suite, evaluate, example_images, hash_model
from rome.evaluation.result import wilson
from rome.threats import DIGITS, AnyImage, LpBall, Threat

QUICK = APGDSuite(iterations=10)
LINF = [DIGITS["Linf"]]


def digits(n: int) -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images[:n] / 16, dtype=torch.float32)[:, None], torch.tensor(data.target[:n]).long()


def trained(classes: int = 10, seed: int = 0) -> nn.Module:
    """A small net that knows the digits (modulo the number of classes)."""
    x, y = digits(1000)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, classes))
    drawn(model, seed)[2].momentum = None  # the statistics of all images
    model(x)
    return knowing(model, model[4], x, y % classes)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return trained()


# -------- what follows from the matrix


def report(rows: list[str], cases: tuple[str, ...] = ("clean", "L1", "L2", "Linf"), **more: Any) -> Report:
    correct = np.array([[mark == "1" for mark in row] for row in rows])
    return Report(correct, cases, np.zeros(len(rows), np.int64), np.arange(len(rows)), **more)


def test_union_is_per_example_and_average_over_cases() -> None:
    found = report(["1111", "1011", "1101", "1110", "1000"])
    assert found.clean == 1
    assert found.robust == {"L1": 0.6, "L2": 0.6, "Linf": 0.6}
    assert found.average == pytest.approx(0.6)
    assert found.union == 0.2
    assert found.union_of(["L1", "L2"]) == 0.4


def test_wrong_without_attack_is_wrong_everywhere() -> None:
    found = report(["0111", "1111"])
    assert found.correct.tolist() == [[False] * 4, [True] * 4]
    assert found.union == found.average == 0.5


def test_interval_is_wilsons() -> None:
    assert wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)  # z^2 / (n + z^2)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)
    found = report(["1111"] * 5 + ["1011"] * 5)
    assert found.interval("union") == found.interval("L1") == wilson(5, 10)
    with pytest.raises(UserError, match=r"no case 'Linff'.*Did you mean 'Linf'"):
        found.interval("Linff")


def test_the_interval_of_an_average_is_that_of_its_mean_over_examples() -> None:
    same = report(["1111"] * 5 + ["1000"] * 5)  # the attacks agree on every example: as one attack
    assert same.interval("average") == pytest.approx(wilson(5, 10))
    # two of three attacks fail on every example but the last, which none fools: variance p (1 - p) (2/3)^2
    mean, variance = 2 / 3, (1 / 3) ** 2
    apart = report(["1100", "1111"] * 5)
    n = 10 * mean * (1 - mean) / variance
    assert apart.average == pytest.approx(mean)
    assert apart.interval("average") == pytest.approx(wilson(mean * n, n))
    assert report(["1000"] * 9).interval("average") == wilson(0, 9)
    assert apart.to_json()["intervals"]["average"] == list(apart.interval("average"))


def test_union_is_unavailable_where_a_case_failed() -> None:
    found = report(["111", "110"], ("clean", "L1", "L2"), failed={"Linf": "RuntimeError: no"})
    assert math.isnan(found.union)
    assert math.isnan(found.average)
    assert math.isnan(found.interval("union")[0])
    assert found.to_json()["union"] is None
    assert found.union_of(["L1", "L2"]) == 0.5


# -------- what it measures


@pytest.mark.parametrize("threat", rest_slow({threat.name: threat for threat in DIGITS[::-1]}, 1))
def test_same_verdicts_as_run_standard_evaluation(model: nn.Module, threat: LpBall, tmp_path: Path) -> None:
    x, y = digits(24)
    reference = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=7)
    reference.square.n_queries = 50
    reference.fab.n_iter = 20
    for apgd in (reference.apgd, reference.apgd_targeted):
        set_iterations(apgd, 20)
    expected, _ = reference.run_standard_evaluation(x, y, batch_size=5)
    suite = AutoAttackSuite(iterations=20, square_queries=50)
    found = evaluate(model, x, y, threats=threat, suite=suite, batch_size=5, seed=7, out=tmp_path)
    verdicts = (model(expected).argmax(1) == y).numpy()
    assert 0 < verdicts.mean() < 1
    assert (found.correct[:, 1] == verdicts).all()
    indices, images = example_images(tmp_path, threat.name)
    rounded = ((images * 255).round() / 255 == images).flatten(1).all(dim=1).view(-1, 1, 1, 1)
    assert ((images - expected[indices]).abs() <= 1e-5 + rounded * 0.5 / 255).all()


def test_both_suites_and_any_attack(model: nn.Module) -> None:
    x, y = digits(30)
    quick = evaluate(model, x, y, threats=DIGITS, suite=QUICK)
    full = evaluate(model, x, y, threats=DIGITS, suite=AutoAttackSuite(iterations=10, square_queries=20))
    assert quick.cases == full.cases == ("clean", "L1", "L2", "Linf")
    assert (full.correct <= quick.correct).all()
    assert list(full.after["L2"]) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert full.after["L2"]["apgd-t"] == quick.robust["L2"]
    assert evaluate(model, x, y, threats=DIGITS, suite=_Own(attacks=(PGD(steps=5),))).union >= quick.union


def test_the_batch_size_decides_only_the_noise(model: nn.Module) -> None:
    x, y = digits(30)
    a, b = (evaluate(model, x, y, threats=LINF, suite=QUICK, batch_size=size) for size in (7, 30))
    assert (a.correct == b.correct).mean() > 0.95


def test_few_classes() -> None:
    x, y = digits(24)
    five, three = trained(5), trained(3)
    found = evaluate(five, x, y % 5, threats=DIGITS, suite=QUICK)
    assert [attack["targets"] for attack in (case["attacks"][1] for case in found.settings["cases"])] == [4, 4, 4]
    assert not found.warnings
    for suite, kinds in (("apgd", ["apgd-ce", "fab-t"]), ("autoattack", ["apgd-ce", "fab-t", "square"])):
        chosen = Suite.of_kind(suite)(iterations=10, **({"square_queries": 10} if suite == "autoattack" else {}))
        found = evaluate(three, x, y % 3, threats=LINF, suite=chosen)
        assert [attack["kind"] for attack in found.settings["cases"][0]["attacks"]] == kinds
        assert found.warnings[0]["check"] == "fewer-attacks"
        assert "the model has 3" in found.warnings[0]["message"]


@pytest.mark.parametrize(
    ("classes", "kinds"),
    [
        (2, ["apgd-ce", "fab-t", "square"]),
        (3, ["apgd-ce", "fab-t", "square"]),
        (4, ["apgd-ce", "apgd-t", "fab-t", "square"]),
    ],
)
def test_the_full_suite_takes_any_number_of_classes(classes: int, kinds: list[str]) -> None:
    """pyautoattack crashes on, or misjudges, models with few classes: its losses and targets ask for ten."""
    x, y = digits(24)
    few = trained(classes)
    found = evaluate(few, x, y % classes, threats=DIGITS, suite=AutoAttackSuite(iterations=10, square_queries=30))
    assert not found.failed
    assert list(found.after["L2"]) == kinds
    assert found.union < found.clean
    targets = [a["targets"] for case in found.settings["cases"] for a in case["attacks"] if "targets" in a]
    assert set(targets) == {classes - 1}


@pytest.mark.slow
def test_a_compiled_model_is_no_dynamic_defence_and_tracing_goes_on(model: nn.Module) -> None:
    """pyautoattack's check traces every call: it takes a compiled model for a defence that changes, and switches a
    debugger's or a coverage tool's tracing off."""
    x, y = digits(12)
    compiled = torch.compile(model, backend="eager")
    suite = AutoAttackSuite(iterations=5, square_queries=5)
    plain = evaluate(model, x, y, threats=DIGITS, suite=suite)
    seen: list[str] = []

    def tracer(frame: Any, event: str, argument: Any) -> None:
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        found = evaluate(compiled, x, y, threats=DIGITS, suite=suite)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)
    assert seen
    assert (found.correct == plain.correct).all()
    assert found.warnings == plain.warnings


def test_names_of_columns(model: nn.Module) -> None:
    x, y = digits(8)
    threats = {"Linf-weak": LpBall(norm="Linf", eps=0.01), "Linf-strong": LpBall(norm="Linf", eps=0.2)}
    found = evaluate(model, x, y, threats=threats, suite=QUICK)
    assert found.robust["Linf-weak"] >= found.robust["Linf-strong"]
    with pytest.raises(UserError, match="two threats have the same name"):
        evaluate(model, x, y, threats=[LINF[0], LINF[0]], suite=QUICK)


def test_everything_is_as_it_was() -> None:
    def tracer(*_: object) -> None:
        return None

    x, y = digits(8)
    model = trained()
    weights = hash_model(model)
    torch_state, numpy_state, trace = torch.get_rng_state(), np.random.get_state()[1].copy(), sys.gettrace()
    sys.settrace(tracer)
    try:
        evaluate(model, x.permute(0, 1, 3, 2), y, threats=DIGITS, suite=QUICK)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(trace)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert hash_model(model) == weights


def test_evaluation_is_in_float32_whatever_precision_is_set(model: nn.Module) -> None:
    """On CPUs with bfloat16 instructions ``medium`` means bfloat16 products."""
    seen = []

    def watched(x: Tensor) -> Tensor:
        mkldnn, cuda = torch.backends.mkldnn, torch.backends.cuda
        seen.append({mkldnn.matmul.fp32_precision, mkldnn.conv.fp32_precision, cuda.matmul.fp32_precision})
        return model(x)

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        evaluate(watched, *digits(4), threats=LINF, suite=QUICK)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == [{"ieee"}] * len(seen)


def test_compiled_model_counts_as_the_same(model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(12)
    plain = evaluate(model, x, y, threats=LINF, suite=QUICK, out=tmp_path)
    compiled = torch.compile(model, backend="eager")
    assert (evaluate(compiled, x, y, threats=LINF, suite=QUICK).correct == plain.correct).all()
    assert (evaluate(compiled, x, y, threats=LINF, suite=QUICK, out=tmp_path).correct == plain.correct).all()


def test_black_box_beating_white_box_is_a_warning(model: nn.Module) -> None:
    """Rounding the input gives gradients of zero: only Square makes progress."""

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            return self.inner((x * 4).round() / 4)

    x, y = digits(30)
    suite = AutoAttackSuite(iterations=10, square_queries=100)
    found = evaluate(Rounded().eval(), x, y, threats=LpBall(norm="Linf", eps=0.3), suite=suite)
    checks = {warning["check"]: warning for warning in found.warnings}
    assert checks["black-box-beats-white-box"]["attack"] == "square"
    assert checks["zero-gradients"]["examples"] > 0


# -------- it checks attacks


class _Unlisted:
    """An inherited kind names a component without registering it for other tests."""

    kind = "unlisted"


class _Own(_Unlisted, Suite):
    """Any attacks."""

    attacks: tuple[Attack, ...]

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        return [Case(name=name, threat=threat, attacks=self.attacks) for name, threat in threats.items()]


class _Liar(_Unlisted, Attack):
    """Returns what it should not."""

    how: str

    def run(self, model: Any, x: Tensor, y: Tensor, threat: Any, *, generator: Any = None) -> AttackResult:
        wrong = 1 - x if self.how == "outside" else torch.full_like(x, float("nan"))
        if self.how == "raises" and threat.norm == "L2":
            raise RuntimeError("the attack broke")
        if self.how == "warns":
            warnings.warn(AttackWarning("tested", "so it goes", 2), stacklevel=2)
            wrong = x
        return AttackResult(wrong, wrong, torch.zeros_like(y, dtype=torch.bool), y.float())

    def steps_for(self, threat: Threat) -> int:
        return 1

    def search(self, *_: Any) -> AttackResult:
        raise AssertionError("run answers without a search")


def lie(how: str) -> _Own:
    return _Own(attacks=(_Liar(how=how),))


class _Fog(_Unlisted, Suite):
    """An attack that bounds its perturbation itself."""

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        return [Case(name="fog", threat=AnyImage(), attacks=(Attack.of_kind("fog")(steps=1),))]


def fooled_in_tf32(seen: list[Any]) -> Model:
    """Classifies every image correctly, label 0, unless it computes in TF32; notes the precisions."""

    def model(x: Tensor) -> Tensor:
        cuda, cudnn, cpu = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
        used = (cuda.matmul, cudnn.conv, cpu.matmul, cpu.conv)
        seen.append(tuple(each.fp32_precision for each in used))
        first = x.flatten(1).mean(dim=1, keepdim=True) + 1
        return torch.cat([-first if "tf32" in seen[-1] else first, torch.zeros(len(x), 3)], dim=1)

    return model


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_only_the_search_is_in_tf32(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts, rounding, clean images, corruptions, checks and attacks with their own bounds are in fp32; what fools
    the model in TF32 alone is attacked again in fp32, and the next attack gets every image."""
    seen: list[Any] = []
    run = PGD.run

    def marked(self: PGD, model: Model, x: Tensor, *others: Any, **more: Any) -> AttackResult:
        seen.append(len(x))
        found = run(self, model, x, *others, **more)
        seen.append(bool(found.robust.any()))
        return found

    monkeypatch.setattr(PGD, "run", marked)
    monkeypatch.setattr("rome.evaluation.evaluate.check_search_precision", lambda *_: None)
    found = evaluate(
        fooled_in_tf32(seen),
        torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)),
        torch.zeros(4, dtype=torch.int64),
        threats=LINF,
        suite=[_Own(attacks=(PGD(steps=2), PGD(steps=3))), _Fog(), CorruptionsSuite(types=("brightness",))],
        checks=True,
        save_images="all",
        search_precision=precision,
        out=tmp_path,
    )
    assert found.correct.all()
    assert len(found.checks) == 3
    marks = [i for i, each in enumerate(seen) if not isinstance(each, tuple)]
    assert [seen[i] for i in marks] == ([4, False] * (precision == "tf32") + [4, True]) * 2
    searched = (precision, precision, "ieee", "ieee") if precision == "tf32" else ("ieee",) * 4
    within = set()
    for begin, end in zip(marks[::2], marks[1::2], strict=True):
        within |= set(range(begin + 1, end))
        assert {seen[i] for i in range(begin + 1, end)} == {("ieee",) * 4 if seen[end] else searched}
    assert {seen[i] for i in range(len(seen)) if i not in within and i not in marks} == {("ieee",) * 4}
    assert found.search_precision == Report.load(tmp_path).search_precision == precision


def test_what_seems_wrong_in_tf32_alone_is_searched_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """In TF32 this model is wrong about every image, so that an attack has nothing to search there."""
    monkeypatch.setattr("rome.evaluation.evaluate.check_search_precision", lambda *_: None)

    def model(x: Tensor) -> Tensor:
        brightness = x.flatten(1).mean(dim=1) - 0.5
        if torch.backends.cuda.matmul.fp32_precision == "tf32":
            brightness = -torch.ones_like(brightness) + 0 * brightness
        return torch.stack([brightness, -brightness, brightness - 9, brightness - 9], dim=1)

    x = torch.full((3, 1, 8, 8), 0.5) + torch.tensor([0.01, 0.04, 0.2]).view(3, 1, 1, 1)
    found = evaluate(
        model, x, torch.zeros(3, dtype=torch.int64),
        threats=LpBall(norm="Linf", eps=0.1), suite=_Own(attacks=(PGD(steps=3),)), search_precision="tf32",
    )  # fmt: skip
    assert found.correct.tolist() == [[True, False], [True, False], [True, True]]


def test_precisions_are_restored_after_an_attack_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    model, (x, _) = fooled_in_tf32(seen), digits(4)
    monkeypatch.setattr("rome.evaluation.evaluate.check_search_precision", lambda *_: None)
    model(x)
    settings = {"threats": DIGITS, "suite": lie("raises"), "search_precision": "tf32"}
    found = evaluate(model, x, torch.zeros(4, dtype=torch.int64), **settings)
    assert found.failed.keys() == {"L2"}
    assert found.cases == ("clean", "L1", "Linf")
    assert set(seen[1:]) == {("ieee",) * 4}, "the attacks of this suite ask nothing of the model"
    model(x)
    assert seen[-1] == seen[0]


def test_another_precision_of_the_search_is_another_evaluation(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = digits(4)
    settings = {"threats": LINF, "suite": QUICK, "out": tmp_path}
    with pytest.raises(UserError, match=r"^search_precision: tf32 needs a CUDA device, and this .* on cpu; use .*fp32"):
        evaluate(model, x, y, **settings, search_precision="tf32")
    with pytest.raises(UserError, match="search_precision must be one of fp32, tf32, not 'bf16'"):
        evaluate(model, x, y, **settings, search_precision="bf16")
    assert not list(tmp_path.iterdir())
    evaluate(model, x, y, **settings)
    monkeypatch.setattr("rome.evaluation.evaluate.check_search_precision", lambda *_: None)
    with pytest.raises(UserError, match=r'other settings \(search_precision: "fp32" there, "tf32" now\)'):
        evaluate(model, x, y, **settings, search_precision="tf32")


def test_images_outside_the_ball_are_projected_and_judged_anew(model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(20)
    found = evaluate(model, x, y, threats=LINF, suite=lie("outside"), out=tmp_path)
    expected = (model(LINF[0].project(1 - x, x)).argmax(1) == y).numpy() & found.correct[:, 0]
    assert (model(1 - x).argmax(1) == y).float().mean() < found.robust["Linf"]
    assert (found.correct[:, 1] == expected).all()
    (warning,) = found.warnings
    assert (warning["check"], warning["examples"]) == ("left-threat", found.correct[:, 0].sum())
    indices, images = example_images(tmp_path, "Linf")
    assert LINF[0].contains(images, x[indices]).all()


def test_images_that_are_not_finite_do_not_count(model: nn.Module) -> None:
    x, y = digits(20)
    found = evaluate(model, x, y, threats=LINF, suite=lie("nan"))
    assert found.robust["Linf"] == found.clean
    assert found.warnings[0]["check"] == "broken-image"


def test_warnings_of_attacks_are_in_the_report(model: nn.Module) -> None:
    x, y = digits(20)
    found = evaluate(model, x, y, threats=LINF, suite=lie("warns"), batch_size=10)
    assert [(w["check"], w["examples"], w["case"]) for w in found.warnings] == [("tested", 4, "Linf")]


def test_a_failing_case_does_not_lose_the_others(model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(20)
    found = evaluate(model, x, y, threats=DIGITS, suite=lie("raises"), out=tmp_path)
    assert found.cases == ("clean", "L1", "Linf")
    assert found.failed == {"L2": "RuntimeError: the attack broke"}
    assert json.loads((tmp_path / "result.json").read_text())["union"] is None
    assert Report.load(tmp_path).failed == found.failed
    with pytest.raises(RuntimeError, match="the attack broke"):
        evaluate(model, x, y, threats=DIGITS["L2"], suite=lie("raises"))


# -------- it goes on


def evaluate_and_die(folder: Path) -> None:
    """Killed with the settings, ten clean batches and four attacked ones on disk."""
    torch.set_num_threads(THREADS)
    keep, kept = store._write_file, itertools.count(1)

    def keep_and_die(*what: Any) -> None:
        keep(*what)
        if next(kept) == 15:
            os.kill(os.getpid(), signal.SIGKILL)

    store._write_file = keep_and_die
    evaluate(trained(), *digits(40), threats=DIGITS[1:], suite=QUICK, batch_size=4, out=folder)


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.glob("batches/**/*.safetensors")}


def test_kill_and_resume_give_the_same_matrix(model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(40)
    whole = evaluate(model, x, y, threats=DIGITS[1:], suite=QUICK, batch_size=4)
    process = started(evaluate_and_die, tmp_path)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = files(tmp_path)
    assert len(before) == 14
    assert not (tmp_path / "result.json").exists()
    resumed = evaluate(model, x, y, threats=DIGITS[1:], suite=QUICK, batch_size=4, out=tmp_path)
    assert (resumed.correct == whole.correct).all()
    after = files(tmp_path)
    assert len(after) > len(before)
    assert {name: after[name] for name in before} == before


def test_damaged_batches_are_done_again(model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(24)

    def run() -> Report:
        return evaluate(model, x, y, threats=LINF, suite=QUICK, batch_size=8, out=tmp_path)

    first, before = run(), files(tmp_path)
    (tmp_path / "result.json").unlink()
    truncated, flipped, *_ = sorted((tmp_path / "batches" / "Linf").iterdir())
    truncated.write_bytes(truncated.read_bytes()[:-7])
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    damaged = files(tmp_path)
    assert (run().correct == first.correct).all()
    after = files(tmp_path)
    assert {name for name in after if after[name] != damaged[name]} == {str(truncated), str(flipped)}
    assert set(after) == set(before)


def test_finished_result_comes_from_disk(model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(12)
    calls = []
    counting = model.register_forward_pre_hook(lambda *_: calls.append(1))
    settings = {"threats": DIGITS, "suite": QUICK, "out": tmp_path}
    first = evaluate(model, x, y, **settings, provenance={"config": "a.yaml"})
    assert calls
    calls.clear()
    again = evaluate(model, x, y, **settings, save_images="none")
    counting.remove()
    assert not calls
    for loaded in (again, Report.load(tmp_path)):
        assert (loaded.correct == first.correct).all()
        assert loaded.to_json() | {"reused": {}} == first.to_json()
    assert again.reused == {"result": first.date}
    assert first.settings["provenance"] == {"config": "a.yaml"}
    assert (np.load(tmp_path / "matrix.npz")["labels"] == y.numpy()).all()
    assert json.loads((tmp_path / "result.json").read_text())["intervals"]["union"] == list(first.interval("union"))


def test_images_held_as_bytes_are_the_evaluation_of_their_floats(model: nn.Module, tmp_path: Path) -> None:
    values = torch.tensor(load_digits().images[:12], dtype=torch.uint8)[:, None]
    x, y = digits(12)
    settings = {"threats": LINF, "suite": QUICK}
    held = evaluate(model, Pixels(values, 16), y, **settings, out=tmp_path)
    whole = evaluate(model, x, y, **settings)
    assert (held.correct == whole.correct).all()
    assert held.settings["data"] == whole.settings["data"]
    assert evaluate(model, x, y, **settings, out=tmp_path).reused == {"result": held.date}
    with pytest.raises(UserError, match=r"must be in \[0, 1\], but these are in \[0, 2\]"):
        evaluate(model, Pixels(values, 8), y, **settings)


def test_other_settings_are_refused_by_name(model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(12)
    settings = {"threats": LINF, "suite": QUICK, "out": tmp_path, "save_images": "none"}
    evaluate(model, x, y, **settings)
    with pytest.raises(
        UserError, match=r"other settings \(seed: 0 there, 1 now\).*folder \(--out\), or overwrite=True"
    ):
        evaluate(model, x, y, **settings, seed=1)
    with pytest.raises(UserError, match=r"suite.iterations: 10 there, 20 now"):
        evaluate(model, x, y, **(settings | {"suite": APGDSuite(iterations=20)}))
    with pytest.raises(UserError, match=r"threats.Linf.eps: 0.1 there, 0.2 now"):
        evaluate(model, x, y, **(settings | {"threats": LpBall(norm="Linf", eps=0.2)}))
    with pytest.raises(UserError, match=r"model.sha256"):
        evaluate(trained(seed=1), x, y, **settings)
    with pytest.raises(UserError, match=r"n: 12 there, 11 now.*data.sha256"):
        evaluate(model, x[1:], y[1:], **settings)
    with pytest.raises(UserError, match=r"save_images: none there, fooled now"):
        evaluate(model, x, y, **(settings | {"save_images": "fooled"}))
    (tmp_path / "mine.txt").write_text("kept")
    changed = evaluate(model, x, y, **settings, seed=1, overwrite=True)
    assert changed.settings["seed"] == Report.load(tmp_path).settings["seed"] == 1
    assert (tmp_path / "mine.txt").exists()


def test_batches_of_other_settings_do_not_count(model: nn.Module, tmp_path: Path) -> None:
    """Should the settings be lost, batches of another model must not slip in."""
    x, y = digits(24)
    evaluate(trained(seed=1), x, y, threats=LINF, suite=QUICK, out=tmp_path)
    (tmp_path / "settings.json").unlink()
    (tmp_path / "result.json").unlink()
    found = evaluate(model, x, y, threats=LINF, suite=QUICK, out=tmp_path)
    assert (found.correct == evaluate(model, x, y, threats=LINF, suite=QUICK).correct).all()


def test_a_result_of_other_settings_does_not_count(model: nn.Module, tmp_path: Path) -> None:
    """Should the settings alone be lost, or be another evaluation's, the result is not taken for this model's."""
    x, y = digits(24)
    other, fresh = trained(seed=1), evaluate(model, x, y, threats=LINF, suite=QUICK)
    evaluate(other, x, y, threats=LINF, suite=QUICK, out=tmp_path / "lost")
    (tmp_path / "lost" / "settings.json").unlink()
    found = evaluate(model, x, y, threats=LINF, suite=QUICK, out=tmp_path / "lost")
    assert (found.correct == fresh.correct).all()
    evaluate(other, x, y, threats=LINF, suite=QUICK, out=tmp_path / "swapped")
    settings = (tmp_path / "lost" / "settings.json").read_bytes()
    (tmp_path / "swapped" / "settings.json").write_bytes(settings)
    found = evaluate(model, x, y, threats=LINF, suite=QUICK, out=tmp_path / "swapped")
    assert (found.correct == fresh.correct).all()


@pytest.mark.parametrize("lost", [(), ("result.json",), ("settings.json",), ("settings.json", "result.json")])
def test_a_function_does_not_go_on_with_another_ones_work(
    lost: tuple[str, ...], model: nn.Module, tmp_path: Path
) -> None:
    """Nothing tells two functions apart, so what the first left is refused, or not looked at."""
    x, y = digits(24)
    settings: Any = {"threats": LINF, "suite": QUICK, "device": "cpu"}
    evaluate(lambda images: model(images), x, y, **settings, out=tmp_path)
    for name in lost:
        (tmp_path / name).unlink()
    second, fresh = lambda images: -model(images), evaluate(lambda images: -model(images), x, y, **settings)
    if "settings.json" not in lost:
        with pytest.raises(UserError, match=r"evaluation of a function.*folder \(--out\), or overwrite=True"):
            evaluate(second, x, y, **settings, out=tmp_path)
    found = evaluate(second, x, y, **settings, out=tmp_path, overwrite="settings.json" not in lost)
    assert (found.correct == fresh.correct).all()
    assert (found.clean, Report.load(tmp_path).clean) == (fresh.clean, fresh.clean)


@pytest.mark.parametrize("save", ["fooled", "all"])
def test_saved_images_are_whole_grey_levels_where_the_ball_allows(
    save: SaveImages, model: nn.Module, tmp_path: Path
) -> None:
    x, y = digits(30)
    x, ball = (x * 255).round() / 255, LpBall(norm="Linf", eps=26 / 255)
    evaluate(model, x, y, threats=ball, suite=QUICK, batch_size=30, out=tmp_path, save_images=save)
    (file,) = (tmp_path / "batches" / "Linf").glob("0-*.safetensors")
    stored = safetensors.torch.load_file(file)
    rows, correct, whole = stored["indices"], stored["correct"], stored["whole_levels"]
    assert 0 < correct.sum() < len(correct)
    if save == "fooled":
        rows, correct = rows[~correct], correct[~correct]
    assert len(whole) == len(rows)
    assert whole.any()
    images = torch.empty(len(rows), *x.shape[1:])
    images[whole], images[~whole] = stored["images_uint8"].float() / 255, stored["images_float32"]
    assert ball.contains(images, x[rows]).all()
    assert ((model(images).argmax(1) == y[rows]) == correct).all()
    numbers, read = example_images(tmp_path, "Linf")
    where = {int(row): place for place, row in enumerate(rows)}
    first = [number for number in numbers.tolist() if number in set(rows[~correct].tolist())]
    assert first
    assert torch.equal(read[[numbers.tolist().index(each) for each in first]], images[[where[each] for each in first]])


def test_example_images(model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(30)
    found = evaluate(model, x, y, threats=LINF, suite=QUICK, batch_size=7, out=tmp_path)
    fooled = np.flatnonzero(found.correct[:, 0] & ~found.correct[:, 1])
    indices, images = example_images(tmp_path, "Linf", 3)
    assert indices.tolist() == fooled[:3].tolist()
    assert (model(images).argmax(1) != y[indices]).all()
    assert DIGITS["Linf"].contains(images, x[indices]).all()
    everything, _ = example_images(tmp_path, "Linf")
    assert everything.tolist() == fooled.tolist()
    with pytest.raises(UserError, match="no case 'L7'"):
        example_images(tmp_path, "L7", 1)
    evaluate(model, x, y, threats=LINF, suite=QUICK, out=tmp_path / "b", save_images="none")
    with pytest.raises(UserError, match="were not kept"):
        example_images(tmp_path / "b", "Linf", 1)


@pytest.mark.parametrize("full", rest_slow(["L1", "result", "clean", "L2", "matrix"], 2))
def test_a_full_disk_ends_the_evaluation_and_the_same_call_goes_on(
    full: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, and not after hours of cases that nobody can keep."""
    x, y = digits(12)
    settings: Any = {"threats": DIGITS, "suite": QUICK, "out": tmp_path}

    def replace(path: Path, content: bytes) -> None:
        tried.append(path)
        if full in str(path.relative_to(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_file(path, content)

    tried: list[Path] = []
    monkeypatch.setattr(store, "replace_file", replace)
    with pytest.raises(UserError, match=rf"{full}.* cannot be written \(No space left on device\): .* continues from"):
        evaluate(model, x, y, **settings)
    assert full in str(tried[-1].relative_to(tmp_path)), "nothing was tried after it"
    assert not (tmp_path / "result.json").exists()
    monkeypatch.undo()
    before = files(tmp_path)
    assert bool(before) == (full != "clean")
    assert (
        evaluate(model, x, y, **settings).correct == evaluate(model, x, y, **(settings | {"out": None})).correct
    ).all()
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
def test_a_damaged_matrix_is_told_and_its_batches_are_kept(kept: float, model: nn.Module, tmp_path: Path) -> None:
    x, y = digits(12)
    first = evaluate(model, x, y, threats=LINF, suite=QUICK, out=tmp_path)
    before, content = files(tmp_path), (tmp_path / "matrix.npz").read_bytes()
    (tmp_path / "matrix.npz").write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    for read in (lambda: Report.load(tmp_path), lambda: evaluate(model, x, y, threats=LINF, suite=QUICK, out=tmp_path)):
        with pytest.raises(UserError, match=r"is damaged \(.+\): remove result.json and evaluate again"):
            read()
    (tmp_path / "result.json").unlink()
    assert (evaluate(model, x, y, threats=LINF, suite=QUICK, out=tmp_path).correct == first.correct).all()
    assert files(tmp_path) == before


def test_loading_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no finished evaluation"):
        Report.load(tmp_path)


# -------- it says how far


def test_progress_counts_up_to_the_end(model: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[str, int, int, float]] = []
    x, y = digits(30)
    found = evaluate(
        model, x, y, threats=DIGITS, suite=QUICK, batch_size=10, progress=lambda *state: seen.append(state)
    )
    assert [case for case, done, total, *_ in seen if done == total] == ["L1", "L2", "Linf"]
    assert all(later[1] == 1 or later[1] == before[1] + 1 for before, later in itertools.pairwise(seen))
    assert seen[-1][3] == found.robust["Linf"]
    evaluate(model, x, y, threats=LINF, suite=QUICK, progress=True)
    assert f"Linf: {100 * found.robust['Linf']:.1f}% robust" in capsys.readouterr().err


# -------- it refuses


class _Answers(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(x.flatten(1)[:, 20:30])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x.softmax(1), "probabilities.*return the logits"),
        (lambda x: x / 0, "not finite for .* of 12 clean images"),
        (lambda x: x + torch.rand_like(x), "for the same images differ from call to call.*randomised"),
        (lambda x: nn.functional.dropout(x), "for the same images differ from call to call.*randomised"),
        (lambda x: x[:, 0], r"must return logits \(12, classes >= 2\), not torch.float32 \(12,\)"),
        (lambda x: x[:, :5], "largest label is 9 but the model has 5 classes"),
    ],
)
def test_refuses_answers_that_are_no_repeatable_logits(answer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(_Answers(answer).eval(), *digits(12))


def test_rounding_of_kernels_is_no_randomness() -> None:
    noisy = _Answers(lambda x: 10 * x + 1e-6 * torch.rand_like(x))
    assert 0 <= evaluate(noisy.eval(), *digits(12), threats=LINF, suite=QUICK).union <= 1


class _Mixing(nn.Module):
    """A digits model between an operation on the images and one on its answers."""

    def __init__(self, before: Any = lambda x: x, after: Any = lambda z: z) -> None:
        super().__init__()
        self.net, self.before, self.after = trained(), before, after
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


def _without_statistics() -> nn.Module:
    norm = nn.BatchNorm1d(64, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), norm, nn.Linear(64, 10)).eval()


def _traced_in_training_mode() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(trained().train(), digits(8)[0], check_trace=False).eval()


@pytest.mark.parametrize(
    "make",
    [
        _without_statistics,
        _traced_in_training_mode,
        lambda: _Mixing(before=lambda x: x - x.mean(0)),
        lambda: _Mixing(before=lambda x: x / x.max()),
        lambda: _Mixing(after=lambda z: z + 0.01 * z.mean(0)),
        lambda: _Mixing(after=lambda z: z.softmax(0)),  # over the wrong dimension
        lambda: _Mixing(after=lambda z: torch.cat([z[:1], z[1:] + z[:-1]])),  # of the image before
        lambda: _Mixing(after=lambda z: z.flip(0) if len(z) > 1 else z),
        lambda: _Mixing(after=lambda z: z / len(z)),
        lambda: _Mixing(after=lambda z: z + torch.arange(len(z))[:, None]),  # of the place in the batch
        lambda: _Mixing(after=lambda z: (z.bfloat16() + z.bfloat16().mean(0)).float()),
    ],
)
@pytest.mark.parametrize("batch_size", [2, 5, 10, 24])
def test_refuses_answers_that_depend_on_the_company(make: Any, batch_size: int) -> None:
    with pytest.raises(UserError, match="gives an image different logits in different batches"):
        evaluate(make(), *digits(24), threats=LINF, suite=QUICK, batch_size=batch_size)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(144, 10)),
        _Mixing(before=lambda x: x - x.mean((1, 2, 3), keepdim=True)),
        _Mixing(after=lambda z: 1e4 + z),
        _Mixing(after=lambda z: 1e-20 * z),
        _Mixing(after=lambda z: z.bfloat16()),
        torch.compile(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval(), backend="eager"),
    ],
    ids=["norms of one image", "centred by itself", "large logits", "small logits", "bfloat16", "compiled"],
)
def test_answers_to_each_image_by_itself_pass_in_any_precision(model: Any) -> None:
    x, y = digits(9)
    assert check_outputs(model.eval(), x, y, last=4) == 10


def test_rounding_that_depends_on_the_shape_of_the_batch_is_allowed_for_the_precision_in_which_the_model_computes() -> (
    None
):
    """A sum in another order moves a bfloat16 answer by its machine epsilon, 1/128, and a float32 one by far less."""
    other_order = lambda z: z * (1 + len(z) % 2 / 128)  # noqa: E731
    x, y = digits(9)
    assert check_outputs(_Mixing(after=lambda z: other_order(z.bfloat16()).float()), x, y) == 10
    with pytest.raises(UserError, match="different logits in different batches"):
        check_outputs(_Mixing(after=other_order), x, y)


def test_a_function_around_a_network_in_training_mode_is_refused_before_its_statistics_move() -> None:
    net = trained().train()
    before = net[2].running_mean.clone()
    for function in (lambda x: net(x), partial(net.forward), net.forward, partial(torch.func.functional_call, net, {})):
        with pytest.raises(UserError, match="Sequential inside the model is in training mode"):
            evaluate(function, *digits(12), threats=LINF, suite=QUICK)
    assert torch.equal(net[2].running_mean, before)


def test_buffers_that_move_with_every_answer_are_refused_and_put_back() -> None:
    class Adapting(_Mixing):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.seen += len(x)
            return super().forward(x)

    model = Adapting()
    with pytest.raises(UserError, match=r"changes its own buffers .*\(seen\)"):
        evaluate(model, *digits(12), threats=LINF, suite=QUICK)
    assert model.seen.item() == 12  # the first answer may fill what is filled once


class _Fails(_Mixing):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.own = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.own(self.net, x)


def _no_graph(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x)


def _through_numpy(net: nn.Module, x: Tensor) -> Tensor:
    return torch.from_numpy(net(x).detach().numpy().copy())


CANNOT = [
    (lambda: _Fails(lambda net, x: net(x.sub_(0.5))), "changes its input images"),
    (lambda: _Fails(lambda net, x: net(x).squeeze()), r"returns torch.float32 \(10,\) for one image: .*squeeze"),
    (lambda: _Fails(lambda net, x: (net(x), x)), r"must return logits .* not a tuple: .*self.model\(x\)\[0\]"),
    (lambda: _Fails(lambda net, x: {"logits": net(x)}), r"not a dict: .*self.model\(x\)\['logits'\]"),
    (lambda: _Fails(lambda net, x: SimpleNamespace(logits=net(x))), r"SimpleNamespace: .*self.model\(x\).logits"),
    (lambda: _Fails(lambda net, x: net(x).argmax(1, keepdim=True).expand(-1, 10)), "must return logits .* torch.int64"),
    (lambda: _Fails(lambda net, x: checkpoint(net, x, use_reentrant=True)), "use_reentrant=False"),
    (lambda: _Fails(lambda net, x: net(x.detach())), "no gradient with respect to its images"),
    (lambda: _Fails(_no_graph), "no gradient with respect to its images"),
    (lambda: _Fails(_through_numpy), "no gradient with respect to its images"),
    (
        lambda: _Fails(lambda net, x: net(x.repeat(1, 2, 1, 1))),
        r"does not take 1{1,2} images? of 1x8x8: .*mat1",
    ),
    (lambda: trained().half(), r"has float16 weights, but its images are float32: call model.float\(\)"),
    (lambda: trained().double(), r"has float64 weights, but its images are float32: call model.float\(\)"),
    (lambda: trained().to("meta"), "is on the meta device"),
    (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(4)).eval(), "lazy layers without weights yet: call it once"),
]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("make", "message"), CANNOT)
def test_models_that_cannot_be_attacked_are_refused_in_a_line_by_evaluation_and_by_attacks(
    make: Any, message: str
) -> None:
    x, y = digits(12)
    before = x.clone()
    with pytest.raises(UserError, match=message):
        evaluate(make(), x, y, threats=LINF, suite=QUICK, batch_size=11)
    with pytest.raises(UserError, match=message):
        PGD(steps=1)(make(), x[:1], y[:1], DIGITS["Linf"])
    assert torch.equal(x, before)


def test_images_changed_behind_the_back_of_torch_are_noticed_too() -> None:
    with pytest.raises(UserError, match="changes its input images"):
        evaluate(_Fails(lambda net, x: net(x.data.mul_(0.5))), *digits(12), threats=LINF, suite=QUICK)


def test_weights_made_in_inference_mode_are_refused_and_a_copy_is_not() -> None:
    with torch.inference_mode():
        made = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    x, y = digits(6)
    with pytest.raises(UserError, match=r"inference_mode.*copy.deepcopy\(model\)"):
        evaluate(made, x, y, threats=LINF, suite=QUICK)
    with pytest.raises(UserError, match=r"inference_mode.*copy.deepcopy\(model\)"):
        PGD(steps=1)(made, x, y, DIGITS["Linf"])
    PGD(steps=1)(copy.deepcopy(made), x, y, DIGITS["Linf"])


class _SquareAlone(Suite):
    kind = "square-alone"

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        return [Case(name=name, threat=threat, attacks=(Square(queries=5),)) for name, threat in threats.items()]


def test_attacks_without_gradients_take_a_model_without() -> None:
    assert set(evaluate(_Fails(_no_graph), *digits(6), threats=LINF, suite=_SquareAlone()).robust) == {"Linf"}


def test_refuses_training_mode(model: nn.Module) -> None:
    part = trained()
    part[2].train()
    with pytest.raises(UserError, match=r"training mode \(1 modules: 2\).*call model.eval\(\)"):
        evaluate(part, *digits(12))
    assert part[2].training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x * 16, y), r"are in \[0, 16\].*divide by 255"),
        (lambda x, y: (x - 0.5, y), r"are in \[-0.5, 0.5\].*normalisation inside"),
        (lambda x, y: (x * float("nan"), y), "must be in .* 12 of 12 contain NaN"),
        (lambda x, y: (x * (1 + 1e-7), y), r"are in \[0, 1.00000012\].*x.clamp\(0, 1\)"),
        (lambda x, y: (x - 1e-7, y), r"are in \[-1.0000000\d*e-07, 0.99999\d*\].*x.clamp\(0, 1\)"),
        (lambda x, y: (x.double(), y), r"float32 tensor .* not torch.float64 \(12, 1, 8, 8\)"),
        (lambda x, y: (x.numpy(), y), "not ndarray"),
        (lambda x, y: (x[:, 0], y), r"\(n, C, H, W\)"),
        (lambda x, y: (x, y[1:]), r"int64 tensor \(12,\) for 12 images, not torch.int64 \(11,\)"),
        (lambda x, y: (x, y.float()), "int64"),
        (lambda x, y: (x, y - 1), "the smallest is -1"),
        (lambda x, y: (x, y + 1), "largest label is 10 but"),
        (lambda x, y: (x[:0], y[:0]), "no images"),
    ],
)
def test_refuses_data(model: nn.Module, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(model, *change(*digits(12)))


def test_refuses_what_it_does_not_know(model: nn.Module) -> None:
    x, y = digits(12)
    with pytest.raises(UserError, match=r"unknown suite kind 'autoatack'.*Did you mean 'autoattack'"):
        evaluate(model, x, y, suite="autoatack")
    with pytest.raises(UserError, match="no threats"):
        evaluate(model, x, y, threats=[])
    with pytest.raises(UserError, match="a threat must be a Threat"):
        evaluate(model, x, y, threats=["Linf"])
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        evaluate(model, x, y, batch_size=0)
    with pytest.raises(UserError, match="save_images must be one of none, fooled, all, not 'wrong'"):
        evaluate(model, x, y, save_images="wrong")
    with pytest.raises(UserError, match=r"model is on cpu: call model.to\('meta'\)"):
        evaluate(model, x, y, device="meta")
