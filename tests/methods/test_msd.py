"""Multi steepest descent: closed forms on linear pieces, a literal loop over single examples, MSD's loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.contexts import NO_ATTACK, context_of, gates_of_last_forward, network
from helpers.literal_apgd import project_l1
from helpers.problems import Digits, Problem, recorded
from helpers.tiny_runs import tiny
from rome.attacks.lp.msd import steepest_descent
from rome.core.errors import UserError
from rome.experts import Diversification
from rome.methods import MSD
from rome.threats import CIFAR10, DIGITS, IMAGENET, LpBall, budgets
from rome.training.progress import show_training
from rome.training.setup import train

SETTINGS: dict[str, Any] = {"steps": 8, "percentile": 90}
SMALL = budgets(1.2, 0.35, 0.07)  # each is the worst for some of the problem's images
SIZES = [threat.eps / 4 for threat in SMALL]


class Pieces(nn.Module):
    """Logits (0, <w_k, x>), where the first pixel of an image says which of the weights (3, D) is its w_k."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        score = (self.weights[(3 * flat[:, 0].detach()).long()] * flat).sum(dim=1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


def test_each_example_ends_at_the_optimum_of_the_norm_that_is_best_for_it() -> None:
    """On a linear piece a ball adds at most eps times the dual norm of w: with m equal weights of length 1 together,
    eps_1 / sqrt(m) in L1, eps_2 in L2, eps_inf sqrt(m) in Linf."""
    weights = torch.zeros(3, 64)
    for k, m in enumerate((1, 9, 63)):
        weights[k, 1 : m + 1] = m**-0.5
    weights *= torch.where(torch.arange(64) % 2 == 0, 1, -1)
    threats = budgets(0.3, 0.105, 0.03)
    x = 0.35 + 0.3 * torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))  # the box is out of reach
    x[:, 0, 0, 0] = torch.tensor([1 / 6, 1 / 2, 5 / 6])
    model, y = Pieces(weights), torch.zeros(3, dtype=torch.int64)
    found = steepest_descent(
        model, x, y, threats, [MSD().step_size_for(t) for t in threats], steps=20, percentile=99
    ).run()
    gains = [[0.3, 0.105, 0.03], [0.1, 0.105, 0.09], [0.3 / 63**0.5, 0.105, 0.03 * 63**0.5]]
    assert found.chosen.tolist() == np.argmax(gains, axis=1).tolist() == [0, 1, 2]
    gain = ((found.images - x).flatten(1) * weights).sum(dim=1)
    torch.testing.assert_close(gain, torch.tensor(gains).amax(dim=1), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.loss, F.cross_entropy(model(found.images), y, reduction="none"))


def literal(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threats: Sequence[LpBall],
    sizes: Sequence[float],
    steps: int,
    percentile: float,
) -> tuple[list[tuple[np.ndarray, int, float]], list[int]]:
    """The algorithm as the paper words it, one example and one candidate after the other: for each example its image,
    threat and loss, and the threat of its last step."""

    def loss_at(point: np.ndarray, label: Tensor) -> tuple[float, np.ndarray]:
        image = torch.tensor(point).view(1, *x.shape[1:]).requires_grad_()
        loss = F.cross_entropy(model(image).float(), label.view(1))
        loss.backward()
        return loss.item(), image.grad.flatten().numpy()

    results: list[tuple[np.ndarray, int, float]] = []
    lasts = []
    for image, label in zip(x, y, strict=True):
        origin = image.flatten().numpy()
        point, best = origin, (origin, 0, -np.inf)
        for _ in range(steps):
            _, gradient = loss_at(point, label)
            inward = np.where(((point <= 0) & (gradient < 0)) | ((point >= 1) & (gradient > 0)), 0, gradient)
            candidates = []
            for threat, size in zip(threats, sizes, strict=True):
                if threat.norm == "Linf":
                    delta = np.clip(point + size * np.sign(gradient) - origin, -threat.eps, threat.eps)
                elif threat.norm == "L2":
                    delta = point + size * inward / np.linalg.norm(inward) - origin
                    delta = delta * min(1, threat.eps / np.linalg.norm(delta))
                else:
                    top = np.sign(inward) * (np.abs(inward) >= np.percentile(np.abs(inward), percentile))
                    delta = project_l1(point + size * top / np.abs(top).sum() - origin, threat.eps)
                candidates.append(np.clip(origin + delta, 0, 1))
            losses = [loss_at(candidate, label)[0] for candidate in candidates]
            which = int(np.argmax(losses))
            point = candidates[which]
            if losses[which] > best[2]:
                best = (point, which, losses[which])
        results.append(best)
        lasts.append(which)
    return results, lasts


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (3 * x).sin()


def compare(model: nn.Module, x: Tensor, y: Tensor, threats: Sequence[LpBall], part: float) -> tuple[Tensor, list[int]]:
    """Check that both give the same, with steps of that part of the radius; the threats of the best and last points."""
    sizes = [part * threat.eps for threat in threats]
    found = steepest_descent(model, x, y, threats, sizes, **SETTINGS).run()
    expected, lasts = literal(model, x, y, threats, sizes, **SETTINGS)
    images = torch.tensor(np.stack([image for image, _, _ in expected])).view_as(x)
    torch.testing.assert_close(found.images, images, rtol=0, atol=1e-7)
    assert found.chosen.tolist() == [which for _, which, _ in expected]
    torch.testing.assert_close(found.loss, torch.tensor([loss for _, _, loss in expected]))
    assert len(found.chosen.unique()) == len(threats), "every norm is the best for someone, or this would say little"
    return found.chosen, lasts


@pytest.mark.parametrize("names", [("L1", "L2", "Linf"), ("Linf", "L1"), ("L2",)], ids=" ".join)
def test_it_does_what_a_loop_over_single_examples_does(names: tuple[str, ...], problem: Problem) -> None:
    compare(*problem(24), [SMALL[name] for name in names], 1 / 4)


def test_it_goes_back_to_the_best_point_and_its_norm_where_the_loss_is_rugged(problem: Problem) -> None:
    flatten, first, _, second = problem.model.children()
    model = nn.Sequential(flatten, first, Sine(), second)
    chosen, lasts = compare(model, problem.x, model(problem.x).argmax(1), SMALL, 1 / 2)
    assert chosen.tolist() != lasts


def test_every_image_is_inside_the_ball_it_is_counted_to(digits: Digits, digits_model: nn.Module) -> None:
    x, y = digits.test[0][:60], digits.test[1][:60]
    threats = budgets(1.15, 0.43, 0.085)
    found = steepest_descent(digits_model, x, y, threats, [t.eps / 5 for t in threats], steps=12, percentile=95).run()
    inside = torch.stack([threat.contains(found.images, x) for threat in threats])
    assert inside[found.chosen, torch.arange(60)].all()
    assert not inside.all(dim=0).any()
    assert set(found.chosen.tolist()) == {0, 1, 2}


def test_more_iterations_never_find_less(problem: Problem) -> None:
    model, x, y = problem(24)
    losses = [
        steepest_descent(model, x, y, SMALL, SIZES, steps=steps, percentile=90).run().loss for steps in (1, 2, 4, 8, 16)
    ]
    for fewer, more in itertools.pairwise(losses):
        assert (more >= fewer).all()
    assert (losses[-1] > losses[0] + 0.1).all()


def test_an_iteration_is_one_backward_and_one_forward_of_all_candidates(problem: Problem) -> None:
    model, x, y = problem(5)
    flags = [p.requires_grad for p in model.parameters()]
    with recorded(model.train()) as calls:
        steepest_descent(model, x, y, SMALL, SIZES, steps=3, percentile=90).run()
    assert [len(images) for images in calls.forwards] == [5, 15] * 3
    assert calls.backwards == [5] * 3
    assert torch.equal(calls.forwards[0], x), "it starts at the image"
    assert model.training
    model.eval()
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_gradient_that_is_not_finite_is_told() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3].sqrt()  # with an infinite slope at 0

    x = torch.full((2, 1, 2, 2), 0.5).index_fill(2, torch.tensor(0), 0.0)
    with pytest.raises(FloatingPointError, match="non-finite"):
        steepest_descent(Broken(), x, torch.zeros(2, dtype=torch.int64), SMALL, SIZES, **SETTINGS).run()


def test_images_outside_the_box_are_refused(problem: Problem) -> None:
    model, x, y = problem(2)
    with pytest.raises(UserError, match=r"must be in \[0, 1\]"):
        steepest_descent(model, 2 * x, y, SMALL, SIZES, **SETTINGS).run()


# The method


def test_steps_are_madaans_on_cifar_10_and_as_long_elsewhere() -> None:
    assert [MSD().step_size_for(threat) for threat in CIFAR10] == pytest.approx([1.0, 25 / 255, 1 / 255])
    for threats in (IMAGENET, DIGITS):
        for steps in (5, 40):
            paths = [steps * MSD(steps=steps).step_size_for(threat) / threat.eps for threat in threats]
            assert paths == pytest.approx([20 / 12, 20 * 25 / 255 / 0.5, 20 / 8])
    own = MSD(step_size={"L1": "3/2"})
    assert [own.step_size_for(threat) for threat in CIFAR10] == pytest.approx([1.5, 25 / 255, 1 / 255])


@pytest.mark.parametrize("experts", [False, True])
def test_the_loss_is_the_cross_entropy_of_the_worst_points_and_their_norms_regularizer(
    digits: Digits, experts: bool
) -> None:
    x, y = digits.train[0][:12].double(), digits.train[1][:12]
    method, model = MSD(steps=6, percentile=95), network(experts=experts)
    setting = context_of(model, attack=NO_ATTACK, regularizer=Diversification(weight=0.7) if experts else None)
    outcome = method.loss(setting, x, y)
    sizes = [method.step_size_for(threat) for threat in setting.threats]
    found = steepest_descent(model, x, y, setting.threats, sizes, steps=6, percentile=95).run()
    assert torch.equal(outcome.labels, found.chosen)
    assert len(found.chosen.unique()) > 1
    cross_entropy = F.cross_entropy(model(found.images), y)
    torch.testing.assert_close(outcome.parts["cross_entropy"].double(), cross_entropy, rtol=1e-5, atol=1e-6)
    penalty = gates_of_last_forward(model, found.images, found.chosen) if experts else torch.zeros(())
    torch.testing.assert_close(outcome.loss.double(), cross_entropy + 0.7 * penalty, rtol=1e-5, atol=1e-6)
    assert torch.equal(outcome.correct, model(found.images).argmax(1) == y)


def test_a_run_says_that_the_configs_attack_has_no_effect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, said in (("msd", True), ("avg", False)):
        settings = {"kind": "msd", "steps": 1} if said else method
        train(
            tiny(name="run", method=settings, epochs=1, data__train_limit=12),
            tmp_path / method,
            progress=show_training,
        )
        line = "run: msd attacks with multi steepest descent; attack: pgd has no effect"
        assert (line in capsys.readouterr().err.splitlines()) == said
