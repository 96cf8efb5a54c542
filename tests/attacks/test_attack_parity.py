"""Strength: not weaker than the reference implementations, on 360 digits and a CNN of middling robustness."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers.literal_apgd import literal_apgd, project_l1
from helpers.problems import Digits, Problem, rest_slow
from rome.attacks import APGD, PGD
from rome.evaluation.statistics import mcnemar
from rome.threats import LpBall

RADII = {"L1": 2.0, "L2": 0.6, "Linf": 0.15}
"""Robust accuracies of about a half, where one attack differs most from another."""


@pytest.fixture
def threat(norm: str) -> LpBall:
    return LpBall(norm=norm, eps=RADII[norm])


def not_weaker(model: nn.Module, y: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Of the images that only one of two equal attacks fools, which one does is a coin toss: chance alone fails this
    once in 10,000 times. Both must leave some images and fool some, or it would say nothing."""
    robust, expected = (model(images).argmax(1) == y for images in (ours, theirs))
    assert 0.2 < expected.double().mean() < 0.8
    stronger, weaker = int((expected & ~robust).sum()), int((robust & ~expected).sum())
    assert stronger >= weaker or mcnemar(stronger, weaker) > 1e-4, f"{stronger} images more, {weaker} less"


# -- APGD against AutoAttack's own -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps", "share"),
    rest_slow([("L1", 20, None), ("L2", 20, None), ("Linf", 20, None), ("L1", 100, None), ("L1", 20, 0.2)], 3),
)
def test_apgd_is_not_weaker_than_autoattacks_apgd(
    name: str, steps: int, share: float | None, digits: Digits, digits_model: nn.Module
) -> None:
    """AutoAttack starts at random, and in L1 with a fifth of the coordinates; ours starts at the image."""
    threat = LpBall(norm=name, eps=RADII[name])
    reference = pytest.importorskip("pyautoattack.autopgd_base")
    x, y = digits.test
    ours = APGD(steps=steps, l1_share=share).run(digits_model, x, y, threat).adversarial
    with torch.random.fork_rng():
        theirs = reference.APGDAttack(
            digits_model, n_iter=steps, norm=threat.norm, eps=threat.eps, n_restarts=1, device="cpu"
        ).perturb(x, y)
    not_weaker(digits_model, y, ours, theirs)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("name", ["L2", "Linf"])
def test_apgd_is_autoattacks_apgd_started_at_the_image(name: str, steps: int, problem: Problem) -> None:
    """In L1 ours differs, see docs/decisions/l1-projection.md."""
    reference = pytest.importorskip("pyautoattack.autopgd_base")
    model, x, y = problem(24)
    threat = LpBall(norm=name, eps={"L2": 0.6, "Linf": 0.1}[name])
    attack = reference.APGDAttack(model, n_iter=steps, norm=name, eps=threat.eps, device="cpu")
    attack.init_hyperparam(x)
    with torch.random.fork_rng():
        best, robust, loss, adversarial = attack.attack_single_run(x.clone(), y, x_init=x.clone())
    found = APGD(steps=steps).run(model, x, y, threat)
    clear = [i for i in range(len(x)) if literal_apgd(model, x[i].numpy(), int(y[i]), name, threat.eps, steps)[4]]
    assert clear, "rounding decides them all"
    torch.testing.assert_close(found.images[clear], best.detach()[clear], rtol=0, atol=1e-6)
    torch.testing.assert_close(found.loss[clear], loss.detach()[clear], rtol=1e-5, atol=1e-6, check_dtype=False)
    assert torch.equal(found.robust[clear], robust[clear])
    wrong = [i for i in clear if not robust[i]]
    torch.testing.assert_close(found.adversarial[wrong], adversarial.detach()[wrong], rtol=0, atol=1e-6)


# -- PGD against foolbox -----------------------------------------------------------------------------------------------


def foolbox_pgd(norm: str, *, corrected: bool, **settings: Any) -> Callable[..., Tensor]:
    """foolbox's attack of that norm, as a function (model, x, y, eps) -> images.

    Its L1 projection takes theta at the first index that fails the test instead of the last that passes: the result
    is up to 7% longer than eps. ``corrected`` puts the right one in its place.
    """
    fb = pytest.importorskip("foolbox")
    ep = pytest.importorskip("eagerpy")
    base = {"L1": fb.attacks.SparseL1DescentAttack, "L2": fb.attacks.L2PGD, "Linf": fb.attacks.LinfPGD}[norm]

    class Corrected(base):  # type: ignore[misc, valid-type]
        def project(self, x: Any, x0: Any, epsilon: float) -> Any:
            delta = (x - x0).numpy().astype(np.float64)
            rows = [project_l1(row.ravel(), epsilon).reshape(row.shape) for row in delta]
            return x0 + ep.from_numpy(x0, np.stack(rows).astype(x0.numpy().dtype))

    attack = (Corrected if corrected and norm == "L1" else base)(**settings)

    def run(model: nn.Module, x: Tensor, y: Tensor, eps: float) -> Tensor:
        wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")
        return attack.run(wrapped, x, fb.criteria.Misclassification(y), epsilon=eps)

    return run


@pytest.mark.parametrize("start", [False, True])
def test_pgd_is_not_weaker_than_foolbox(threat: LpBall, start: bool, digits: Digits, digits_model: nn.Module) -> None:
    (x, y), steps = digits.test, 20
    reference = foolbox_pgd(
        threat.norm, corrected=True, abs_stepsize=2.5 * threat.eps / steps, steps=steps, random_start=start
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = reference(digits_model, x, y, threat.eps)
    not_weaker(digits_model, y, PGD(steps=steps, random_start=start)(digits_model, x, y, threat), theirs)


@pytest.mark.parametrize("steps", [1, 5, 20])
@pytest.mark.parametrize("name", ["L1", "Linf"])
def test_pgd_is_foolbox_iterate_by_iterate(name: str, steps: int, problem: Problem) -> None:
    """The same images without a random start; in L2 foolbox keeps the gradient of saturated pixels, ours does not."""
    model, x, y = problem(24)
    threat = LpBall(norm=name, eps=RADII[name])
    size = threat.eps / 8
    theirs = foolbox_pgd(name, corrected=True, abs_stepsize=size, steps=steps, random_start=False)
    ours = PGD(steps=steps, step_size=size, random_start=False)(model, x, y, threat)
    torch.testing.assert_close(ours, theirs(model, x, y, threat.eps), rtol=0, atol=1e-9)
