"""PPGD and LPA: inside the bound, stronger with more room, each example alone, step and projection in closed form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.problems import recorded
from helpers.small_models import Line
from rome.attacks import LPA, PGD, PPGD, Attack
from rome.attacks.base import Group
from rome.attacks.engine import margin
from rome.attacks.perceptual.features import Features, distance, measure
from rome.attacks.perceptual.ppgd_lpa import _Space
from rome.core.errors import UserError
from rome.threats import CIFAR10, Perceptual


class Net(nn.Module):
    """A small smooth network with two layers to compare."""

    feature_layers = ("one", "two")

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.one = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Softplus())
            self.two = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Softplus())
            self.head = nn.Linear(8 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.two(self.one(8 * (x - 0.5))).flatten(1))


@pytest.fixture
def model() -> nn.Module:
    return Net().double().eval().requires_grad_(False)


@pytest.fixture
def batch(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Images that the model classifies as labelled."""
    x = torch.rand(10, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return x, model(x).argmax(1)


ATTACKS: list[Attack] = [PPGD(steps=4), LPA(steps=4, rounds=3)]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.kind)
@pytest.mark.parametrize("bound", [0.05, 0.3])
def test_every_image_is_inside_the_bound_and_the_box(
    attack: Attack, bound: float, model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    threat = Perceptual(bound=bound)
    found = attack.run(model, x, y, threat)
    for images in (found.images, found.adversarial):
        assert bool(((images >= 0) & (images <= 1)).all())
        assert float(measure(threat, model, images, x).max()) <= bound * (1 + 1e-4)
    assert torch.equal(model(found.adversarial).argmax(1) == y, found.robust)


@pytest.mark.parametrize("attack", [PPGD(), LPA()], ids=lambda a: a.kind)
@pytest.mark.parametrize("bound", [0.0, 0.1, 0.2, 0.4])
def test_an_image_is_fooled_where_the_boundary_lies_inside_the_bound(attack: Attack, bound: float) -> None:
    """On a line. The last steps are a tenth of the bound in PPGD, 0.112 of it in LPA: nearer the bound it may fail."""
    x = torch.linspace(0, 0.48, 25, dtype=torch.float64).view(-1, 1, 1, 1)
    way, model = 2 * ((0.5 - x.flatten()) / 2).sin(), Line()
    robust = attack.run(model, x, torch.zeros(25, dtype=torch.int64), Perceptual(bound=bound)).robust
    assert robust[way > bound].all()
    assert not robust[way < 0.88 * bound].any()


@pytest.mark.parametrize("attack", [PPGD, LPA], ids=lambda a: a.kind)
def test_more_steps_raise_the_margin(attack: type[PPGD | LPA], model: nn.Module) -> None:
    x = torch.rand(40, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = model(x).argmax(1)
    found = [attack(steps=steps).run(model, x, y, Perceptual(bound=0.1)) for steps in (1, 16)]
    first, last = (float(margin(model(each.images), y).clamp(max=0).mean()) for each in found)  # beyond, they are done
    assert first < last


class Broken(Net):
    """Fine answers whose gradients are infinity times zero."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x - x).flatten(1).sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.kind)
def test_gradients_that_are_not_finite_are_said_to_be(attack: Attack, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(FloatingPointError, match=f"{attack.kind}: the gradients of the model are not finite"):
        attack(Broken().double().eval(), *batch, Perceptual(bound=0.3))


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.kind)
def test_they_beat_random_images_at_the_same_distance(
    attack: Attack, model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    threat = Perceptual(bound=0.3)
    space = _Space(model, x, [Group(threat, slice(0, len(x)), 1)])
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(2))
    chance = space.project((x + noise).clamp(0, 1))
    random = int((model(chance).argmax(1) == y).sum())
    assert int(attack.run(model, x, y, threat).robust.sum()) < random


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.kind)
def test_an_example_does_not_notice_its_batch_mates(
    attack: Attack, model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    threat = Perceptual(bound=0.3)
    whole = attack(model, x, y, threat)
    order = torch.tensor([7, 2, 9])
    torch.testing.assert_close(attack(model, x[order], y[order], threat), whole[order], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.kind)
def test_another_network_measures(attack: Attack, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    other = Net(seed=5).double().eval()
    assert all(parameter.requires_grad for parameter in other.parameters())
    threat = Perceptual(bound=0.2, features="other").measured_by(other)
    images = attack(model, x, y, threat)
    assert float(measure(threat, model, images, x).max()) <= 0.2 * (1 + 1e-4)
    assert float(measure(Perceptual(bound=1), model, images, x).max()) != pytest.approx(0.2, rel=1e-3)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in other.parameters())
    other.one.append(nn.Dropout())
    assert torch.equal(attack(model, x, y, threat), images)
    other.train()
    assert torch.equal(attack(model, x, y, threat), images), "in evaluation mode, whatever its own"


def test_a_step_of_ppgd_is_the_steepest_in_features(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Enough conjugate-gradient iterations solve (J^T J) v = grad; the dense solution by least squares."""
    x = batch[0][:1]
    space = _Space(model, x, [Group(Perceptual(bound=0.3), slice(0, 1), 1)])
    leaf = x.clone().requires_grad_()
    logits, phi = space.perception(leaf)
    (gradient,) = torch.autograd.grad(logits[0, 0] - logits[0, 1], leaf, retain_graph=True)
    direction = PPGD(iterations=400, h=1e-5)._direction(space, leaf, phi, gradient).flatten()
    J = torch.func.jacrev(lambda image: space.perception.features(image.view_as(x))[0][0])(x.flatten())
    dense = torch.linalg.lstsq(J.t() @ J, gradient.flatten().unsqueeze(1), driver="gelsd").solution.flatten()
    dense = dense / torch.linalg.vector_norm(J @ dense)
    assert float(torch.linalg.vector_norm(J @ direction)) == pytest.approx(1, rel=1e-3)
    assert float((J @ direction) @ (J @ dense)) == pytest.approx(1, rel=0.02)


def test_projection_leaves_what_is_inside_and_reaches_the_bound_otherwise(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, _ = batch
    space = _Space(model, x, [Group(Perceptual(bound=0.2), slice(0, len(x)), 1)])
    point = (x + torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))).clamp(0, 1)
    point[:5] = x[:5] + 1e-4
    projected = space.project(point)
    assert torch.equal(projected[:5], point[:5])
    assert bool((space._distances(projected) <= 0.2).all())
    bisected = space.project(point, rounds=0, halvings=30)
    assert space._distances(bisected)[5:].tolist() == pytest.approx([0.2] * 5, abs=1e-6)


def test_where_newton_arrives_the_projection_is_newtons(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """x' - 1.1 (d - bound + 0.1) grad d / |grad d|^2, once; the segment to the original is for where that fails."""
    x = batch[0]
    noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    features, leaf = Features(model), (x + 0.1 * noise).clamp(0, 1).requires_grad_()
    apart = distance(features(leaf)[1], features(x)[1])
    (gradient,) = torch.autograd.grad(apart.sum(), leaf)
    far, apart = leaf.detach(), apart.detach()
    bound = 0.97 * float(apart.min())
    share = 1.1 * (apart - bound + 0.1) / gradient.square().flatten(1).sum(1)
    moved = (far - share.view(-1, 1, 1, 1) * gradient).clamp(0, 1)
    arrived = measure(Perceptual(bound=bound), model, moved, x) <= bound
    assert arrived.any()
    space = _Space(model, x, [Group(Perceptual(bound=bound), slice(0, len(x)), 1)])
    torch.testing.assert_close(space.project(far)[arrived], moved[arrived])


def literal_ppgd(
    model: nn.Module, x: Tensor, y: Tensor, point: Tensor, bound: float, attack: PPGD
) -> tuple[Tensor, Tensor | None]:
    """One image (1, C, H, W) from its start, every step taken whatever the answers: the last point, the first wrong."""
    space, wrong = _Space(model, x, [Group(Perceptual(bound=bound), slice(0, 1), 1)]), None
    point = space.project(point)
    for _ in range(attack.steps):
        leaf = point.clone().requires_grad_()
        logits, phi = space.perception(leaf)
        if wrong is None and margin(logits, y) > 0:
            wrong = point
        (gradient,) = torch.autograd.grad(margin(logits, y).clamp(max=1).sum(), leaf, retain_graph=True)
        move = attack._direction(space, leaf, phi, gradient) * 2 * bound / attack.steps
        point = space.project((point + move).clamp(0, 1))
    return point, wrong


@pytest.mark.parametrize("bound", [0.05, 0.1])
def test_ppgd_image_by_image_without_an_early_end(bound: float, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Who is done leaves with the first image that is misclassified; to the others it makes no difference."""
    x, y = batch
    attack = PPGD(steps=6)
    start = (x + 0.01 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))).clamp(0, 1)
    with recorded(model) as calls:
        point, found = attack.climb(_Space(model, x, [Group(Perceptual(bound=bound), slice(0, 10), 6)]), start, y)
    assert found.any()
    assert not found.all()
    done, expected = [], []
    for i in range(len(x)):
        last, wrong = literal_ppgd(model, x[i : i + 1], y[i : i + 1], start[i : i + 1], bound, attack)
        done.append(wrong is not None)
        expected.append(last if wrong is None else wrong)
    assert found.tolist() == done
    torch.testing.assert_close(point, torch.cat(expected), rtol=1e-5, atol=1e-7)
    assert len(calls.forwards[-1]) < len(x), "some left"


def test_what_is_inside_the_bound_is_not_computed_while_others_are_projected(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, _ = batch
    space = _Space(model, x, [Group(Perceptual(bound=0.2), slice(0, len(x)), 1)])
    point = x.clone()
    point[4] = torch.rand(x.shape[1:], dtype=x.dtype, generator=torch.Generator().manual_seed(3))
    counts: list[int] = []
    handle = model.one.register_forward_hook(lambda module, args, out: counts.append(len(out)))
    projected = space.project(point)
    handle.remove()
    assert counts[0] == 10
    assert set(counts[1:]) == {1}
    assert torch.equal(projected[5:], x[5:])


def literal_lpa(
    model: nn.Module, x: Tensor, y: Tensor, point: Tensor, bound: float, attack: LPA
) -> tuple[Tensor, bool]:
    """One image (1, C, H, W) from its start: where it gets before the projection, and whether it is done."""
    features, weight = Features(model), 0.01
    origin = features(x)[1]
    for _ in range(attack.rounds):
        for i in range(attack.steps):
            leaf = point.clone().requires_grad_()
            logits, phi = features(leaf)
            apart, gained = distance(phi, origin)[0], margin(logits, y)[0]
            if gained > 0 and apart <= bound:
                return point, True
            (gradient,) = torch.autograd.grad(weight * (apart - bound).relu() - gained.clamp(max=1), leaf)
            gradient = gradient / (gradient.norm() + 1e-8)
            rate = (features(point - 0.1 * gradient)[1] - phi.detach()).norm() / 0.1
            point = (point - bound * 0.1 ** (i / attack.steps) / (rate + 1e-8) * gradient).clamp(0, 1)
        if distance(features(point)[1], origin)[0] >= bound:
            weight *= 10
    return point, False


def test_lpa_image_by_image_by_the_letter(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    attack, bound = LPA(steps=3, rounds=5), 0.15
    start = (x + 0.01 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(4))).clamp(0, 1)
    space = _Space(model, x, [Group(Perceptual(bound=bound), slice(0, len(x)), 3)])
    point, found = attack.climb(space, start, y)
    assert found.any()
    assert not found.all()
    for i in range(len(x)):
        expected, done = literal_lpa(model, x[i : i + 1], y[i : i + 1], start[i : i + 1], bound, attack)
        assert bool(found[i]) == done
        if not done:
            expected = _Space(model, x[i : i + 1], [Group(Perceptual(bound=bound), slice(0, 1), 3)]).project(expected)
        torch.testing.assert_close(point[i : i + 1], expected, rtol=1e-6, atol=1e-8)


def test_other_threats_are_refused(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UserError, match="ppgd searches inside perceptual threats, not LpBall"):
        PPGD()(model, *batch, CIFAR10["Linf"])
    with pytest.raises(UserError, match="pgd searches inside Lp balls, not Perceptual"):
        PGD()(model, *batch, Perceptual(bound=0.1))


def test_defaults_are_the_papers() -> None:
    settings: dict[str, Any] = PPGD().dump()
    assert (settings["steps"], settings["iterations"]) == (20, 5)
    assert (LPA().steps, LPA().rounds) == (20, 5)


def test_the_networks_file_is_read_once_however_many_examples_leave(
    model: nn.Module, batch: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def read(path: str) -> nn.Module:
        reads.append(path)
        return Net(seed=5).double().eval()

    monkeypatch.setattr("rome.attacks.perceptual.features.load_model", read)
    found = LPA(steps=4, rounds=3).run(model, *batch, Perceptual(bound=0.8, features="net"))
    assert not bool(found.robust.all()), "some left"
    assert reads == ["net"]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.kind)
def test_autocast_changes_nothing(attack: Attack, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    """Their finite differences drown in bfloat16, so they compute as the model does without it."""
    net, x, threat = model.float(), batch[0].float(), Perceptual(features="self", bound=0.3)
    expected = attack(net, x, batch[1], threat)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(net(x).float(), net.double()(x.double()).float())
        assert torch.equal(attack(net.float(), x, batch[1], threat), expected)


@pytest.mark.parametrize("seed", range(4))
def test_ppgd_makes_finite_images_where_the_features_are_few(seed: int) -> None:
    """J v is a finite difference: of a network with kinks and few features, v J^T J v may come out negative."""

    class Narrow(nn.Module):
        feature_layers = ("0",)

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.add_module("0", nn.Sequential(nn.Conv2d(3, 1, 3), nn.ReLU()))
            self.head = nn.Linear(36, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.get_submodule("0")(x).flatten(1))

    narrow = Narrow().eval()
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    y = narrow(x).argmax(dim=1)
    found = PPGD(steps=5).run(narrow, x, y, Perceptual(features="self", bound=0.3))
    assert bool(found.images.isfinite().all())
