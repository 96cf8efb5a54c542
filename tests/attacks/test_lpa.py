"""Fast-LPA against a literal computation, one example at a time; mixtures, pairs, and what it must not touch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.problems import FixedNoise, recorded
from helpers.small_models import Line, cnn, hooks
from rome.attacks import FastLPA
from rome.attacks.engine import margin
from rome.attacks.perceptual.fast_lpa import FastLPAWithPair, gaussian
from rome.attacks.perceptual.features import Features, measure
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.threats import LpBall, Perceptual, PerExample

MODEL, NETWORK = cnn(0), cnn(1)
OWN = Perceptual(bound=0.3)
FIXED = Perceptual(bound=0.2, features="runs/net").measured_by(NETWORK)


@pytest.fixture
def x() -> Tensor:
    """Twelve images with some pixels at a bound of the box, float64, so that batching changes no digit that matters."""
    g = torch.Generator().manual_seed(0)
    return (1.4 * torch.rand(12, 3, 8, 8, generator=g, dtype=torch.float64) - 0.2).clamp(0, 1)


@pytest.fixture
def y(x: Tensor) -> Tensor:
    """What the model says, but for four examples: it gets 8 of 12 right."""
    y = MODEL(x).argmax(1)
    y[::3] = (y[::3] + 1) % 5
    return y


@pytest.fixture
def noise(x: Tensor) -> Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def normal(noise: Tensor) -> Tensor:
    """The quantiles of N(0, 1)."""
    return torch.distributions.Normal(0.0, 1.0).icdf(noise)


def phi_of(network: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda image: Features(network).phi(image)[0]


def literal(
    gain: Callable[[Tensor], Tensor], phi: Callable[[Tensor], Tensor], x: Tensor, starts: Tensor, bound: float, n: int
) -> Tensor:
    """Fast-LPA on the copies of one image (1, C, H, W), each with its start; ``gain`` is of their logits."""
    deltas = [0.01 * start for start in starts]
    for i in range(n):
        step, weight = bound * 0.1 ** (i / n), 10 * 0.1 ** (1 - i / n)
        deltas = [delta.detach().requires_grad_() for delta in deltas]
        excess = [F.relu((phi(x + delta) - phi(x)).square().sum().sqrt() - bound) for delta in deltas]
        loss = -gain(torch.cat([MODEL(x + delta) for delta in deltas])) + weight * torch.stack(excess).sum()
        gradients = torch.autograd.grad(loss, deltas)
        moved = []
        for delta, gradient in zip(deltas, gradients, strict=True):
            g = gradient / gradient.square().sum().sqrt()
            rate = (phi(x + delta) - phi(x + delta - 0.1 * g)).square().sum().sqrt() / 0.1
            moved.append(((x + delta - g * step / (rate + 1e-4)).clamp(0, 1) - x).detach())
        deltas = moved
    return torch.cat([x + delta for delta in deltas])


def margin_of(label: Tensor) -> Callable[[Tensor], Tensor]:
    def gain(logits: Tensor) -> Tensor:
        others = [logits[0, j] for j in range(5) if j != label]
        return torch.stack(others).max() - logits[0, label]

    return gain


def test_the_margin_by_hand() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [1.0, 4.0, 2.0]])
    assert margin(logits, torch.tensor([1, 2])).tolist() == [-2, 2]


def test_the_start_is_gaussian() -> None:
    noise = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(gaussian(noise), normal(noise), rtol=1e-4, atol=1e-6)
    assert gaussian(torch.tensor([0.0, 1.0])).isfinite().all()


@pytest.mark.parametrize("threat", [OWN, FIXED], ids=["self", "fixed"])
def test_every_step_is_the_published_one(threat: Perceptual, x: Tensor, y: Tensor, noise: Tensor) -> None:
    network = MODEL if threat is OWN else NETWORK
    found = FastLPA(steps=4)(MODEL, x, y, threat, generator=FixedNoise(noise))
    for i in range(len(x)):
        one = slice(i, i + 1)
        expected = literal(margin_of(y[i]), phi_of(network), x[one], normal(noise[one]), threat.bound, 4)
        torch.testing.assert_close(found[one], expected, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(expected, x[one], rtol=1e-5, atol=1e-6), "a test of nothing"


@pytest.mark.parametrize("only_correct", [False, True])
def test_a_mixture_is_attacked_as_its_parts_are(only_correct: bool, x: Tensor, y: Tensor, noise: Tensor) -> None:
    attack, labels = FastLPA(steps=5, only_correct=only_correct), torch.tensor([0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 0])
    found = attack(MODEL, x, y, PerExample((OWN, FIXED), labels), generator=FixedNoise(noise))
    for label, threat in enumerate((OWN, FIXED)):
        rows = labels == label
        alone = attack(MODEL, x[rows], y[rows], threat, generator=FixedNoise(noise[rows]))
        torch.testing.assert_close(found[rows], alone, rtol=1e-7, atol=1e-9)


def test_an_example_does_not_depend_on_its_batch_mates(x: Tensor, y: Tensor, noise: Tensor) -> None:
    attack, labels = FastLPA(steps=5, only_correct=True), torch.arange(12) % 2
    whole = attack(MODEL, x, y, PerExample((OWN, FIXED), labels), generator=FixedNoise(noise))
    order = stream(0, "order").permutation(12)
    parts = []
    for rows in order.split(5):
        mixture = PerExample((OWN, FIXED), labels[rows])
        parts.append(attack(MODEL, x[rows], y[rows], mixture, generator=FixedNoise(noise[rows])))
    torch.testing.assert_close(torch.cat(parts), whole[order], rtol=1e-7, atol=1e-9)


def test_only_what_is_right_is_attacked(x: Tensor, y: Tensor, noise: Tensor) -> None:
    right = MODEL(x).argmax(1) == y
    assert right.sum() == 8
    mixture = PerExample((OWN, FIXED), torch.arange(12) % 2)
    everything = FastLPA(steps=3)(MODEL, x, y, mixture, generator=FixedNoise(noise))
    found = FastLPA(steps=3, only_correct=True)(MODEL, x, y, mixture, generator=FixedNoise(noise))
    assert torch.equal(found[~right], x[~right])
    assert (everything[~right] != x[~right]).flatten(1).any(1).all()
    torch.testing.assert_close(found[right], everything[right], rtol=1e-7, atol=1e-9)


def test_nothing_right_is_nothing_to_attack(x: Tensor) -> None:
    wrong = (MODEL(x).argmax(1) + 1) % 5
    with recorded(MODEL) as calls:
        found = FastLPA(only_correct=True)(MODEL, x, wrong, OWN)
    assert torch.equal(found, x)
    assert len(calls.forwards) == 1


def test_a_group_of_which_nothing_is_right_is_left_out(x: Tensor, y: Tensor, noise: Tensor) -> None:
    labels = (MODEL(x).argmax(1) == y).long()  # FIXED meets what is right
    mixture = PerExample((OWN, FIXED), labels)
    found = FastLPA(steps=2, only_correct=True)(MODEL, x, y, mixture, generator=FixedNoise(noise))
    assert ((found != x).flatten(1).any(1) == labels.bool()).all()


class Passes(nn.Module):
    """A model that counts forwards by batch size, also those that end early, and backwards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model
        self.forwards: list[int] = []
        self.backwards: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.append(len(x))
        x = x * 1
        if x.requires_grad:
            x.register_hook(lambda g: self.backwards.append(len(g)))
        return self.backbone(x)


def test_a_step_is_one_forward_and_backward_of_the_batch_and_a_forward_for_the_step_size(x: Tensor, y: Tensor) -> None:
    model, network = Passes(MODEL), Passes(NETWORK)
    layers = ("backbone.1", "backbone.3")
    own = Perceptual(bound=0.3, layers=layers)
    fixed = Perceptual(bound=0.2, features="net", layers=layers).measured_by(network)
    labels = torch.tensor([0] * 7 + [1] * 5)
    FastLPA(steps=3)(model, x, y, PerExample((own, fixed), labels))
    assert model.forwards == [7] + 3 * [12, 7]  # the originals' features, then steps
    assert network.forwards == [5] + 3 * [5, 5]
    assert (model.backwards, network.backwards) == ([12] * 3, [5] * 3)
    model.forwards.clear()
    network.forwards.clear()
    FastLPA(steps=2)(model, x, y, fixed)
    assert model.forwards == [12] * 2  # its features are not needed
    assert network.forwards == [12] * 5


@pytest.mark.parametrize("bound", [0.1, 0.3])
def test_it_goes_to_the_bound_and_beyond_by_its_last_step_at_most(bound: float) -> None:
    """Where a unit of distance raises the margin by 1/2 and lambda is 1 and more, every step leads to the bound, and
    past it only from less than its own length away. What is left is a step, bound * 0.1^((n - 1)/n) in the end."""
    n, x = 20, torch.linspace(0, 0.45, 19, dtype=torch.float64).view(-1, 1, 1, 1)
    model, threat, y = Line(), Perceptual(bound=bound), torch.zeros(19, dtype=torch.int64)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = FastLPA(steps=n).run(model, x, y, threat, generator=FixedNoise(noise))
    steps = bound * 0.1 ** (torch.arange(n) / n)
    left = steps[-1].item() * 1.01  # the circle is no line
    moved = (found.images - x).flatten()
    assert torch.allclose(measure(threat, model, found.images, x), moved.new_tensor(bound), rtol=0, atol=left)
    assert (moved > 0).all()
    assert (found.loss > F.cross_entropy(model(x), y, reduction="none")).all()
    way = (0.5 - x).flatten()
    assert not found.robust[way < bound - left].any()
    assert found.robust[way > (bound + left) * 1.01].all()
    free = FastLPA(steps=n, penalty=0)(model, x, y, threat, generator=FixedNoise(noise))
    torch.testing.assert_close(free, (x + 0.01 * normal(noise) + steps.sum()).clamp(max=1), rtol=1e-2, atol=0)


# Pairs


def test_a_pair_raises_the_distance_of_its_logits(x: Tensor, y: Tensor, noise: Tensor) -> None:
    """Three rows an example: the first as by FastLPA, the others as by the literal search for a pair."""
    labels = torch.arange(4) % 2
    noise = noise[:12]
    mixture = PerExample((OWN, FIXED), labels.repeat_interleave(3))
    images, classes = x[:4].repeat_interleave(3, dim=0), y[:4].repeat_interleave(3)
    found = FastLPAWithPair(steps=4)(MODEL, images, classes, mixture, generator=FixedNoise(noise))
    for i in range(4):
        threat, network = (OWN, MODEL) if labels[i] == 0 else (FIXED, NETWORK)
        start, one = normal(noise[3 * i : 3 * i + 3]), slice(i, i + 1)
        phi = phi_of(network)
        single = literal(margin_of(y[i]), phi, x[one], start[:1], threat.bound, 4)
        pair = literal(lambda z: (z[0] - z[1]).square().sum().sqrt(), phi, x[one], start[1:], threat.bound, 4)
        torch.testing.assert_close(found[3 * i : 3 * i + 3], torch.cat([single, pair]), rtol=1e-5, atol=1e-6)


def test_of_a_pair_only_what_is_right_is_attacked(x: Tensor, y: Tensor) -> None:
    right = (MODEL(x).argmax(1) == y).repeat_interleave(3)
    images, classes = x.repeat_interleave(3, dim=0), y.repeat_interleave(3)
    mixture = PerExample((OWN, FIXED), (torch.arange(12) % 2).repeat_interleave(3))
    attack = FastLPAWithPair(steps=2, only_correct=True)
    with recorded(MODEL) as calls:
        found = attack(MODEL, images, classes, mixture)
    assert torch.equal(found[~right], images[~right])
    assert (found != images).flatten(1).any(1)[right].all()
    assert len(calls.forwards[0]) == 12, "whether it is right is asked once for the three"
    assert (MODEL(found[1::3]) != MODEL(found[2::3]))[right[::3]].any(1).all()


# What every attack promises


def test_model_and_network_are_as_before(x: Tensor, y: Tensor) -> None:
    model, network = cnn(0).requires_grad_(True).train(), cnn(1).requires_grad_(True).train()
    threat = Perceptual(bound=0.2, features="net").measured_by(network)
    modes: list[bool] = []
    handle = network.backbone[0].register_forward_hook(lambda module, args, out: modes.append(module.training))
    FastLPA(steps=2)(model, x, y, PerExample((OWN, threat), torch.arange(12) % 2))
    handle.remove()
    assert modes == [False] * 5
    for part in (model, network):
        assert all(module.training for module in part.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in part.parameters())
        assert hooks(part) == 0


def test_the_box_is_kept_and_draws_repeat(x: Tensor, y: Tensor) -> None:
    found = FastLPA()(MODEL, x, y, Perceptual(bound=2))
    assert (found.amin(), found.amax()) == (0, 1)
    again = FastLPA()(MODEL, x, y, Perceptual(bound=2))
    other = FastLPA()(MODEL, x, y, Perceptual(bound=2), generator=stream(1, "other"))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)


def test_it_searches_inside_perceptual_threats_of_modules(x: Tensor, y: Tensor) -> None:
    with pytest.raises(UserError, match="fast-lpa searches inside perceptual threats, not LpBall"):
        FastLPA()(MODEL, x, y, LpBall(norm="L2", eps=1))
    with pytest.raises(UserError, match="a torch module"):
        FastLPA()(lambda images: MODEL(images), x, y, OWN)
