"""RANDOM, AVG and MAX against their definitions: each threat attacked on its own, losses joined by hand (Eq. 1, 9)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.contexts import BUDGETS, NO_ATTACK, context_of, gates_of_last_forward, network
from helpers.problems import Digits, FixedNoise, recorded
from rome.attacks import PGD
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.experts import Diversification, record_gates
from rome.methods import Average, Maximum, Method, Outcome, Random
from rome.threats import PerExample

METHODS: list[Method] = [Random(), Random(per="batch"), Average(), Maximum(), Maximum(per="batch")]
each_method = pytest.mark.parametrize(
    "method", METHODS, ids=["random", "random per batch", "avg", "max", "max per batch"]
)


@pytest.fixture
def batch(digits: Digits) -> tuple[Tensor, Tensor]:
    """Eight digits, float64."""
    x, y = digits.train
    return x[:8].double(), y[:8]


def threats_of(method: Method, n: int, *, rank: int = 0, world: int = 1, seed: int = 0) -> Tensor:
    """The threat labels that a method gives to a batch of n."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    context = context_of(model, attack=NO_ATTACK, rank=rank, world=world, seed=seed)
    return method.loss(context, torch.zeros(n, 1, 8, 8), torch.zeros(n, dtype=torch.int64)).labels


# RANDOM


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 11, 64])
def test_random_shares_the_batch_evenly(n: int) -> None:
    for seed in range(10):
        counts = torch.bincount(threats_of(Random(), n, seed=seed), minlength=3)
        assert counts.sum() == n
        assert counts.max() - counts.min() <= 1


def test_random_gives_the_odd_example_to_every_threat_in_turn_by_chance() -> None:
    extra = Counter(int(torch.bincount(threats_of(Random(), 4, seed=s), minlength=3).argmax()) for s in range(90))
    short = Counter(int(torch.bincount(threats_of(Random(), 5, seed=s), minlength=3).argmin()) for s in range(90))
    for counts in (extra, short):
        assert set(counts) == {0, 1, 2}
        assert min(counts.values()) >= 15  # 30 expected, standard deviation 4.5


def test_random_gives_every_position_every_threat() -> None:
    drawn = torch.stack([threats_of(Random(), 6, seed=s) for s in range(60)])
    shares = torch.stack([(drawn == p).double().mean(0) for p in range(3)])
    assert (shares > 1 / 3 - 0.2).all()  # 3.3 standard deviations
    assert (shares < 1 / 3 + 0.2).all()
    together = (drawn.unsqueeze(1) == drawn.unsqueeze(2)).double().mean(0)  # 1/5 expected: the order is random
    assert (together[~torch.eye(6, dtype=torch.bool)] - 1 / 5).abs().max() < 0.2


@pytest.mark.parametrize("per", ["example", "batch"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_draw_their_rows_of_one_global_draw(per: Any, world: int) -> None:
    method = Random(per=per)
    for seed in range(5):
        parts = [threats_of(method, 4, rank=rank, world=world, seed=seed) for rank in range(world)]
        assert torch.equal(torch.cat(parts), threats_of(method, 4 * world, seed=seed))


def test_random_per_batch_keeps_its_threat_for_all_steps_of_an_update(batch: tuple[Tensor, Tensor]) -> None:
    method, context = Random(per="batch"), context_of(network(experts=False))
    updates = []
    for _ in range(12):
        updates.append([set(method.loss(context, *batch).labels.tolist()) for _ in range(3)])
        method.update_end(context)
    assert all(len(set.union(*parts)) == 1 for parts in updates)
    assert len(set.union(*(parts[0] for parts in updates))) == 3, "another one in another update"


def test_random_per_batch_draws_one_threat_uniformly() -> None:
    drawn = [threats_of(Random(per="batch"), 5, seed=s) for s in range(90)]
    assert all(len(labels.unique()) == 1 for labels in drawn)
    assert min(Counter(int(labels[0]) for labels in drawn).values()) >= 15


def test_random_draws_anew_at_every_update(batch: tuple[Tensor, Tensor]) -> None:
    context = context_of(network(experts=False), attack=NO_ATTACK)
    draws = {tuple(Random().loss(context, *batch).labels.tolist()) for _ in range(6)}
    assert len(draws) > 1


def test_random_loss_is_the_mean_over_examples_each_attacked_by_its_own_threat(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network(experts=False)
    outcome = Random().loss(context_of(model), x, y)
    noise = stream(0, "attack").uniform(x.shape)
    losses = []
    for i, label in enumerate(outcome.labels.tolist()):
        one = slice(i, i + 1)
        image = PGD(steps=3)(model, x[one], y[one], BUDGETS[label], generator=FixedNoise(noise[one]))
        losses.append(F.cross_entropy(model(image), y[one]))
    torch.testing.assert_close(outcome.loss.double(), sum(losses) / 8, rtol=1e-6, atol=1e-6)


# AVG and MAX


def three_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy (3, B) of three separate attacks and forwards, with the noise that one joint draw would give."""
    noise = stream(0, "attack").uniform((3 * len(x), *x.shape[1:])).view(len(x), 3, *x.shape[1:]).transpose(0, 1)
    losses = []
    for threat, start in zip(BUDGETS, noise, strict=True):
        images = PGD(steps=3)(model, x, y, threat, generator=FixedNoise(start))
        losses.append(F.cross_entropy(model(images), y, reduction="none"))
    return torch.stack(losses)


@pytest.mark.parametrize("experts", [False, True])
def test_avg_is_the_mean_of_three_separate_losses(batch: tuple[Tensor, Tensor], experts: bool) -> None:
    model = network(experts=experts)
    outcome = Average().loss(context_of(model), *batch)
    torch.testing.assert_close(outcome.loss.double(), three_losses(model, *batch).mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("experts", [False, True])
def test_max_is_each_examples_largest_of_three_separate_losses(batch: tuple[Tensor, Tensor], experts: bool) -> None:
    model = network(experts=experts)
    outcome = Maximum().loss(context_of(model), *batch)
    losses = three_losses(model, *batch)
    assert len(losses.argmax(0).unique()) > 1  # no threat is the worst for all, or this would say little
    torch.testing.assert_close(outcome.loss.double(), losses.amax(0).mean(), rtol=1e-6, atol=1e-6)


def test_max_per_batch_is_the_largest_of_the_threats_mean_losses() -> None:
    losses = torch.tensor([[1.0, 5.0], [4.0, 3.0], [0.0, 0.0]], requires_grad=True)  # threats x examples
    assert Maximum().join(losses) == 4.5
    joined = Maximum(per="batch").join(losses)
    assert joined == 3.5
    (gradient,) = torch.autograd.grad(joined, losses)
    assert gradient.tolist() == [[0, 0], [0.5, 0.5], [0, 0]]


def test_gradient_of_max_is_that_of_the_worst_threats_alone(batch: tuple[Tensor, Tensor]) -> None:
    model = network(experts=False)
    Maximum().loss(context_of(model), *batch).loss.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    losses = three_losses(model, *batch)
    losses[losses.argmax(0), torch.arange(8)].mean().backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", [Average(), Maximum()], ids=["avg", "max"])
def test_avg_and_max_train_on_every_example_under_every_threat(method: Method, batch: tuple[Tensor, Tensor]) -> None:
    model = network(experts=False)
    outcome = method.loss(context_of(model), *batch)
    assert outcome.labels.tolist() == [0, 1, 2] * 8  # an example's three stand together
    assert outcome.correct.shape == (24,)


# What every method promises


@each_method
def test_every_image_is_inside_the_threat_of_its_label(method: Method, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network(experts=False)
    with recorded(model) as calls:
        outcome = method.loss(context_of(model), x, y)
    images, originals = calls.forwards[-1], x.repeat_interleave(len(outcome.labels) // len(x), dim=0)
    inside = torch.stack([threat.contains(images, originals) for threat in BUDGETS])
    assert inside[outcome.labels, torch.arange(len(images))].all()
    assert not inside.all()  # the threats are not interchangeable here
    assert ((images - originals).flatten(1).abs().sum(1) > 0.1).all()


@each_method
def test_two_processes_train_on_the_images_of_one(method: Method, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network(experts=True)

    def images(rows: slice, rank: int, world: int) -> tuple[Tensor, Tensor]:
        with recorded(model) as calls:
            outcome = method.loss(context_of(model, rank=rank, world=world), x[rows], y[rows])
        return calls.forwards[-1], outcome.labels

    first, second = images(slice(0, 4), 0, 2), images(slice(4, 8), 1, 2)
    whole = images(slice(None), 0, 1)
    torch.testing.assert_close(torch.cat([first[0], second[0]]), whole[0])
    assert torch.equal(torch.cat([first[1], second[1]]), whole[1])


@each_method
def test_correct_says_how_the_training_forward_went(method: Method, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network(experts=False)
    y = torch.where(torch.arange(8) % 2 == 0, model(x).argmax(1), y)  # some right, some wrong
    with recorded(model) as calls:
        outcome = method.loss(context_of(model, attack=PGD(steps=1, step_size=1e-3, random_start=False)), x, y)
    predicted = model(calls.forwards[-1]).argmax(1)
    expected = predicted == y.repeat_interleave(len(outcome.labels) // len(y))
    assert torch.equal(outcome.correct, expected)
    assert 0 < expected.sum() < len(expected)
    assert outcome.correct.dtype == torch.bool
    assert outcome.labels.dtype == torch.int64
    assert outcome.labels.device.type == "cpu"


@each_method
def test_one_training_forward_and_one_forward_an_attack_step(method: Method, batch: tuple[Tensor, Tensor]) -> None:
    model = network(experts=False)
    with recorded(model) as calls:
        outcome = method.loss(context_of(model, attack=PGD(steps=3)), *batch)
    assert [len(images) for images in calls.forwards] == [len(outcome.labels)] * 4


@each_method
def test_the_model_keeps_its_modes_and_every_trained_parameter_gets_a_gradient(
    method: Method, batch: tuple[Tensor, Tensor]
) -> None:
    model = network(experts=True)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model(batch[0])  # the first pass of fresh experts is looked at by another
    training: list[bool] = []
    handle = model.register_forward_hook(lambda module, args, out: training.append(module.training))
    outcome = method.loss(context_of(model, regularizer=Diversification()), *batch)
    handle.remove()
    assert training == [False] * 3 + [True]  # attacked in evaluation mode, trained in training mode
    assert all(module.training for module in model.modules())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(p.grad is None for p in model.parameters())  # the attack left none
    outcome.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert "projection" in name
            assert parameter.grad is None


def run(method: Method, model: nn.Module, batch: tuple[Tensor, Tensor], **settings: Any) -> tuple[Outcome, Tensor]:
    """The outcome, and L_div of the images it trained on, computed apart."""
    with recorded(model) as calls:
        outcome = method.loss(context_of(model, regularizer=Diversification(**settings)), *batch)
    return outcome, gates_of_last_forward(model, calls.forwards[-1], outcome.labels)


@pytest.mark.parametrize("method", [Random(), Average(), Maximum()], ids=["random", "avg", "max"])
def test_the_regularizer_enters_with_its_weight(method: Method, batch: tuple[Tensor, Tensor]) -> None:
    model = network(experts=True)
    plain = method.loss(context_of(model), *batch)
    assert set(plain.parts) == {"cross_entropy"}
    for weight in (0.1, 0.7):
        outcome, penalty = run(method, model, batch, weight=weight)
        assert penalty < -1e-3
        torch.testing.assert_close(outcome.loss.double(), plain.loss.double() + weight * penalty)  # Eq. 9
        torch.testing.assert_close(outcome.parts["regularizer"].double(), weight * penalty)
        torch.testing.assert_close(outcome.parts["cross_entropy"], plain.loss)
        assert not any(part.requires_grad for part in outcome.parts.values())


def test_a_batch_of_one_threat_has_no_pairs(batch: tuple[Tensor, Tensor]) -> None:
    outcome, penalty = run(Random(per="batch"), network(experts=True), batch)
    assert outcome.parts["regularizer"] == penalty == 0


def test_the_attack_climbs_the_cross_entropy_alone(batch: tuple[Tensor, Tensor]) -> None:
    model = network(experts=True)
    seen = []
    for regularizer in (None, Diversification(weight=1000)):
        with recorded(model) as calls:
            Random().loss(context_of(model, regularizer=regularizer), *batch)
        seen.append(calls.forwards[-1])
    assert torch.equal(*seen)


def test_the_regularizer_is_not_rounded_to_bf16_by_autocast(digits: Digits) -> None:
    # Early in training the gates of different threats differ by a thousandth: less than bf16 tells apart at 1/3.
    x, y = digits.train[0][:48], digits.train[1][:48]
    model = network(experts=True).float()
    with recorded(model) as calls, torch.autocast("cpu", torch.bfloat16):
        outcome = Random().loss(context_of(model, regularizer=Diversification(weight=1)), x, y)
    with torch.autocast("cpu", torch.bfloat16), record_gates(model) as recorder:
        model(calls.forwards[-1])
    expected = Diversification().loss(recorder.complete(), outcome.labels, 3)  # the very gates, joined in fp32
    assert outcome.parts["regularizer"].dtype == torch.float32
    torch.testing.assert_close(outcome.parts["regularizer"], expected.detach(), rtol=1e-5, atol=1e-9)


def test_a_regularizer_needs_experts(batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(UserError, match="no experts"):
        Random().loss(context_of(network(experts=False), regularizer=Diversification()), *batch)


@each_method
def test_the_same_streams_give_the_same_loss(method: Method, batch: tuple[Tensor, Tensor]) -> None:
    model = network(experts=True)
    one, two, other = (method.loss(context_of(model, seed=seed), *batch).loss for seed in (0, 0, 1))
    assert one == two
    assert one != other


def test_methods_are_found_by_kind_and_have_nothing_to_save() -> None:
    assert set(Method.members()) >= {"random", "avg", "max"}
    assert Method.of_kind("max") is Maximum
    for method in METHODS:
        assert method.state() == {}
    with pytest.raises(UserError):
        Random(per="epoch")


def test_clean_training_is_the_method_without_attack(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = network(experts=False)
    expected = F.cross_entropy(model(x), y)
    for method in METHODS:
        outcome = method.loss(context_of(model, attack=NO_ATTACK), x, y)
        torch.testing.assert_close(outcome.loss.double(), expected, rtol=1e-6, atol=1e-6)
        assert PerExample(tuple(BUDGETS), outcome.labels).groups()
