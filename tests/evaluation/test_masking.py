"""Signs of masked gradients: raised by models that mask them, silent on one that does not; and how sure numbers are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from rome.attacks import APGD
from rome.attacks.base import AttackResult
from rome.attacks.suites.base import APGDSuite
from rome.evaluation import masking
from rome.evaluation.batch import Examples
from rome.evaluation.evaluate import Report, Suite, evaluate
from rome.evaluation.masking import SAMPLE, run_checks, worth_checking
from rome.evaluation.statistics import mcnemar, paired_difference
from rome.threats import CIFAR10, DIGITS, LpBall

LINF = [DIGITS["Linf"]]
QUICK = APGDSuite(iterations=10)


class Masked(nn.Module):
    """A model behind a function of its images or its logits."""

    def __init__(self, model: nn.Module, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += len(x)
        logits = self.model(x if self.before is None else self.before(x))
        return logits if self.after is None else self.after(logits)


def checks_of(model: nn.Module, data: tuple[Tensor, Tensor], n: int = 320) -> dict[str, dict[str, Any]]:
    x, y = data[0][:n], data[1][:n]
    clean = (model(x).argmax(1) == y).numpy()
    cases = QUICK.cases({"Linf": DIGITS["Linf"]}, 10)
    return {check["check"]: check for check in run_checks(model.eval(), Examples(x, y, x.device), cases, clean)}


def test_an_honest_model_raises_nothing(digits_model: nn.Module, digits: Any) -> None:
    found = checks_of(digits_model, digits.test)
    assert list(found) == ["zero-input-gradients", "more-steps", "unbounded-attack"]
    assert not any(check["raised"] for check in found.values())
    assert found["zero-input-gradients"]["values"] == {"share": 0.0}
    assert found["unbounded-attack"]["values"] == {"share": 0.0}
    assert 0 < found["more-steps"]["values"]["100"] <= found["more-steps"]["values"]["10"] < 1
    assert {check["examples"] for check in found.values()} == {320 // 16}


@pytest.mark.parametrize(
    ("mask", "raised"),
    [
        ({"after": lambda logits: 1e4 * logits}, {"zero-input-gradients"}),
        ({"after": lambda logits: logits.round()}, {"zero-input-gradients", "unbounded-attack"}),
        ({"before": lambda x: (x * 4).round() / 4}, {"zero-input-gradients", "unbounded-attack"}),
        ({"after": lambda z: z + (z - z).sum(1, keepdim=True).sqrt()}, {"zero-input-gradients", "unbounded-attack"}),
    ],
    ids=["saturated", "quantised logits", "quantised images", "not finite"],
)
def test_a_model_that_masks_its_gradients_is_seen(
    mask: dict[str, Any], raised: set[str], digits_model: nn.Module, digits: Any
) -> None:
    found = checks_of(Masked(digits_model, **mask), digits.test)
    assert {name for name, check in found.items() if check["raised"]} == raised
    assert found["zero-input-gradients"]["values"]["share"] > 0.5


@pytest.mark.parametrize(("better", "worse", "raised"), [(6, 0, True), (5, 0, False), (0, 6, False), (9, 1, True)])
def test_more_steps_that_hurt_by_more_than_noise(
    better: int, worse: int, raised: bool, digits_model: nn.Module, digits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20 examples, so many are right with 100 steps alone, and so many with 10 alone."""

    def run(self: APGD, model: nn.Module, x: Tensor, y: Tensor, threat: LpBall) -> AttackResult:
        place = torch.arange(len(x))
        robust = {10: place >= better, 100: place < 20 - worse}.get(int(self.steps), place < 0)  # type: ignore[call-overload]
        return AttackResult(x, x, robust, y.float())

    monkeypatch.setattr(APGD, "run", run)
    check = checks_of(digits_model, digits.test)["more-steps"]
    assert check["raised"] is raised
    assert check["values"] == {"10": 1 - better / 20, "100": 1 - worse / 20, "p": mcnemar(better, worse)}


def test_the_checks_cost_less_than_a_tenth_of_the_suite(digits: Any) -> None:
    """Even of the suite's least: one threat, and a model that every attack breaks at once."""
    x, y = (part[:160] for part in digits.test)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.normal_(linear[1].weight, generator=torch.Generator().manual_seed(0))
    y = linear(x).argmax(1)
    model = Masked(linear).eval()
    passes = {}
    for checks in (False, True):
        model.passes = 0
        evaluate(model, x, y, threats=LpBall(norm="Linf", eps=0.3), suite="apgd", checks=checks)
        passes[checks] = model.passes
    assert 0 < passes[True] - passes[False] < 0.1 * passes[False]


def test_checks_are_made_where_they_cost_little() -> None:
    def default(suite: str, n: int, threats: tuple[str, ...] = ("Linf",)) -> bool:
        return worth_checking(Suite.of_kind(suite)().cases({name: CIFAR10[name] for name in threats}, 10), n)

    assert default("apgd", 100)
    assert default("autoattack", 100)
    assert not default("apgd", 99)
    assert not default("lp", 1000)
    assert default("lp", 1000, ("L1", "L2", "Linf"))
    assert default("unseen", 1000)
    assert not default("corruptions", 1000)


def test_checks_are_in_the_result(digits_model: nn.Module, digits: Any, tmp_path: Path) -> None:
    x, y = (part[:20] for part in digits.test)
    model = Masked(digits_model, after=lambda logits: 1e4 * logits).eval()
    settings: dict[str, Any] = {"threats": LINF, "suite": QUICK, "out": tmp_path}
    assert evaluate(model, x, y, **settings, checks=False).checks == []
    (tmp_path / "result.json").unlink()
    found = evaluate(model, x, y, **settings, checks=True)
    raised = [check["check"] for check in found.checks if check["raised"]]
    assert "zero-input-gradients" in raised
    assert [warning["check"] for warning in found.warnings if warning["case"] is None] == raised
    assert "gradients may be masked" in found.warnings[-1]["message"]
    assert Report.load(tmp_path).to_json() == found.to_json() == json.loads(json.dumps(found.to_json()))


def test_checks_are_added_to_a_finished_result(digits_model: nn.Module, digits: Any, tmp_path: Path) -> None:
    x, y = (part[:20] for part in digits.test)
    settings: dict[str, Any] = {"threats": LINF, "suite": QUICK}
    whole = evaluate(digits_model, x, y, **settings, checks=True)
    first = evaluate(digits_model, x, y, **settings, out=tmp_path, checks=False)
    shutil.rmtree(tmp_path / "batches")  # no attack is made again for them
    found = evaluate(digits_model, x, y, **settings, out=tmp_path, checks=True)
    assert found.checks == whole.checks != []
    assert not (tmp_path / "batches").exists()
    assert (found.correct == first.correct).all()
    before = (tmp_path / "result.json").stat().st_mtime_ns
    for checks in (None, False, True):
        assert evaluate(digits_model, x, y, **settings, out=tmp_path, checks=checks).checks == whole.checks
    assert (tmp_path / "result.json").stat().st_mtime_ns == before


def test_a_small_batch_size_holds_for_the_checks_too(digits_model: nn.Module, digits: Any) -> None:
    x, y = digits.test
    largest = 0

    def seen(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal largest
        largest = max(largest, len(args[0]))

    clean = (digits_model(x).argmax(1) == y).numpy()
    cases = QUICK.cases({"Linf": DIGITS["Linf"]}, 10)
    whole = run_checks(digits_model, Examples(x, y, x.device), cases, clean)
    handle = digits_model.register_forward_pre_hook(seen)
    parts = run_checks(digits_model, Examples(x, y, x.device), cases, clean, batch_size=5)
    handle.remove()
    assert largest == 5
    assert parts == whole
    assert whole[0]["examples"] == len(x) // 16 < SAMPLE


def test_no_example_no_check(digits_model: nn.Module, digits: Any) -> None:
    x, y = digits.test
    assert run_checks(digits_model, Examples(x, y, x.device), [], np.zeros(len(x), bool)) == []


def test_without_a_ball_steps_are_not_compared(digits_model: nn.Module, digits: Any) -> None:
    x, y = digits.test
    found = run_checks(digits_model, Examples(x, y, x.device), [], (digits_model(x).argmax(1) == y).numpy())
    assert [check["check"] for check in found] == ["zero-input-gradients", "unbounded-attack"]
    assert masking.WIDE.eps == 1


# -------- statistics


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 0), (6, 0), (3, 9), (10, 10), (700, 620), (0, 2000)])
def test_mcnemar_is_the_exact_binomial_test(b: int, c: int) -> None:
    expected = binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_by_hand() -> None:
    assert mcnemar(1, 4) == pytest.approx(2 * (1 + 5) / 32)


def pattern(both: int, only_a: int, only_b: int, none: int) -> tuple[np.ndarray, np.ndarray]:
    counts = (both, only_a, only_b, none)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def test_a_difference_is_clear_if_the_exact_test_rejects() -> None:
    borderline = paired_difference(*pattern(40, 5, 0, 15))
    assert borderline.low > 0
    assert borderline.p == pytest.approx(0.0625)
    assert not borderline.clear
    assert paired_difference(*pattern(40, 9, 0, 15)).clear
    assert not paired_difference(*pattern(40, 9, 9, 15)).clear


def test_the_test_keeps_its_level() -> None:
    """Of two models that are equally good, the exact test calls at most one in twenty different."""
    a, b = np.random.default_rng(0).random((2, 400, 60)) < 0.7
    assert np.mean([paired_difference(*pair).p < 0.05 for pair in zip(a, b, strict=True)]) <= 0.06
