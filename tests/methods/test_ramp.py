"""RAMP: its loss by hand, the fusion's formula, and an epoch against training two models one after the other."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import PrivateAttr
from torch import Tensor, nn

from helpers.contexts import BUDGETS, context_of, gates_of_last_forward, network
from helpers.problems import Digits, FixedNoise, recorded
from helpers.tiny_runs import STEPS, same, tiny, updates, weights
from rome.attacks import PGD, Attack, AttackResult
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.experts import Diversification
from rome.methods import RAMP, TrainContext
from rome.methods.ramp import divergence, fuse
from rome.runs.folder import Run
from rome.runs.optim import SGD, AdamW, Optimizer
from rome.threats import Threat, budgets
from rome.training.setup import train

SOURCE, TARGET = BUDGETS["Linf"], BUDGETS["L1"]


class Given(Attack):
    """Finds what a test gives it: images and losses, by threat."""

    kind = "given"
    _images: dict[str, Tensor] = PrivateAttr(default_factory=dict)
    _losses: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    @property
    def uses_noise(self) -> bool:
        return False

    def steps_for(self, threat: Threat) -> int:
        return 1

    def search(self, model: Any, x: Tensor, y: Tensor, groups: Any, noise: Tensor) -> AttackResult:
        images = torch.cat([self._images[group.threat.name] for group in groups])
        losses = torch.cat([self._losses[group.threat.name] for group in groups])
        return AttackResult(images, images, torch.zeros_like(y, dtype=torch.bool), losses)


class Logarithm(nn.Module):
    """An image is a distribution over the classes, and the softmax of its logits is the image."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x.flatten(1).log()


def prepared(method: RAMP, model: nn.Module, *, optimizer: Optimizer | None = None, **settings: Any) -> TrainContext:
    context = replace(context_of(model, **settings), new_optimizer=(optimizer or AdamW()).build)
    context = replace(context, threats=method.training_threats(context.threats, context.attack))
    method.prepare(context)
    return context


def by_hand(source: list[list[float]], target: list[list[float]], losses: list[list[float]], **settings: Any) -> Any:
    """RAMP on distributions over three classes, all of label 0, and losses (source, target) that the attack reports."""
    attack = Given()
    for name, images, reported in zip(("Linf", "L1"), (source, target), zip(*losses, strict=True), strict=True):
        attack._images[name] = torch.tensor(images).view(-1, 1, 1, 3)
        attack._losses[name] = torch.tensor(reported)
    method = RAMP(fusion=None, **settings)
    context = context_of(Logarithm(), attack=attack)
    context = replace(context, threats=method.training_threats(tuple(budgets(9, 9, 1)), attack))
    x = torch.tensor([0.5, 0.3, 0.2]).view(1, 1, 1, 3).repeat(len(source), 1, 1, 1)
    return method.loss(context, x, torch.zeros(len(source), dtype=torch.int64))


# The loss


def test_divergence_is_that_of_the_first_from_the_second() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert divergence(p, q + 3).item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    assert divergence(q, p).item() == pytest.approx(0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5))


def test_pairs_are_those_whose_source_is_classified_right_and_the_attacks_loss_says_which_is_worse() -> None:
    source = [[0.5, 0.25, 0.25], [0.2, 0.5, 0.3], [0.6, 0.2, 0.2]]  # right, wrong, right
    target = [[0.25, 0.5, 0.25], [0.6, 0.2, 0.2], [0.5, 0.3, 0.2]]  # wrong, right, right
    losses = [[3.0, 1.0], [0.0, 1.0], [1.0, 2.0]]  # against the training forward: there x_t, x_s and x_t are worse
    outcome = by_hand(source, target, losses, weight=5)
    cross_entropy = -(math.log(0.5) + math.log(0.6) + math.log(0.5)) / 3
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    third = 0.6 * math.log(0.6 / 0.5) + 0.2 * math.log(0.2 / 0.3)
    assert outcome.parts["cross_entropy"].item() == pytest.approx(cross_entropy)
    assert outcome.parts["pairing"].item() == pytest.approx(5 * (first + third) / 2)
    assert outcome.loss.item() == pytest.approx(cross_entropy + 5 * (first + third) / 2)
    assert outcome.labels.tolist() == [0, 1] * 3
    assert outcome.correct.tolist() == [True, False, False, True, True, True]


def test_no_pair_costs_nothing() -> None:
    outcome = by_hand([[0.2, 0.5, 0.3]], [[0.6, 0.2, 0.2]], [[2.0, 1.0]])
    assert outcome.parts["pairing"] == 0
    assert outcome.loss.item() == pytest.approx(-math.log(0.2))
    outcome.loss.backward()


def test_where_the_attack_reports_no_loss_the_training_forward_says_which_is_worse() -> None:
    nan = math.nan
    outcome = by_hand([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1]], [[0.6, 0.2, 0.2], [0.4, 0.5, 0.1]], [[nan, nan], [nan, nan]])
    assert outcome.parts["cross_entropy"].item() == pytest.approx(-(math.log(0.2) + math.log(0.4)) / 2)


def test_trades_keeps_the_clean_image_and_pulls_the_worse_one_to_it() -> None:
    outcome = by_hand([[0.2, 0.5, 0.3]], [[0.6, 0.2, 0.2]], [[2.0, 1.0]], trades=6, weight=2)
    clean, worst = (0.5, 0.3, 0.2), (0.2, 0.5, 0.3)
    expected = 6 * sum(p * math.log(p / q) for p, q in zip(clean, worst, strict=True))
    assert outcome.parts["cross_entropy"].item() == pytest.approx(-math.log(0.5))
    assert outcome.parts["trades"].item() == pytest.approx(expected)
    assert outcome.loss.item() == pytest.approx(-math.log(0.5) + expected, rel=1e-5)
    assert len(outcome.correct) == len(outcome.labels) == 2


def attacked_apart(model: nn.Module, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Each example's images under source and target, each attacked on its own with its rows of the noise."""
    noise = stream(0, "attack").uniform((2 * len(x), *x.shape[1:])).view(len(x), 2, *x.shape[1:])
    attack, rows = PGD(steps=3), [slice(i, i + 1) for i in range(len(x))]
    return [
        (
            attack(model, x[i], y[i], SOURCE, generator=FixedNoise(noise[i, 0])),
            attack(model, x[i], y[i], TARGET, generator=FixedNoise(noise[i, 1])),
        )
        for i in rows
    ]


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("trades", [None, 6.0])
def test_loss_and_gradients_are_those_of_a_loop_over_examples(
    trades: float | None, experts: bool, digits: Digits
) -> None:
    x, y = digits.train[0][:12].double(), digits.train[1][:12]
    model = network(experts=experts)
    y = torch.where(torch.arange(12) % 3 > 0, model(x).argmax(1), y)
    method = RAMP(trades=trades, weight=2, fusion=None)
    regularizer = Diversification(weight=0.7) if experts else None
    context = prepared(method, model, attack=PGD(steps=3), regularizer=regularizer)
    outcome = method.loss(context, x, y)
    outcome.loss.backward()
    found = [p.grad for p in model.parameters()]
    model.zero_grad()

    expected, pairings, worse = torch.zeros((), dtype=torch.float64), [], []
    images = attacked_apart(model, x, y)
    for (source, target), image, label in zip(images, x, y, strict=True):
        s, t, clean = model(source)[0], model(target)[0], model(image[None])[0]
        worse.append(int(F.cross_entropy(t, label) > F.cross_entropy(s, label)))
        worst = (s, t)[worse[-1]]
        if trades is None:
            expected = expected + F.cross_entropy(worst, label) / 12
        else:
            drift = F.kl_div(worst.log_softmax(0), clean.log_softmax(0), log_target=True, reduction="sum")
            expected = expected + (F.cross_entropy(clean, label) + trades * drift) / 12
        if s.argmax() == label:
            pairings.append(F.kl_div(t.log_softmax(0), s.log_softmax(0), log_target=True, reduction="sum"))
    assert set(worse) == {0, 1}
    assert 0 < len(pairings) < 12
    expected = expected + 2 * sum(pairings) / len(pairings)
    if experts:
        pair = torch.cat([image for images_of_one in images for image in images_of_one])
        expected = expected + 0.7 * gates_of_last_forward(model, pair, torch.arange(2).repeat(12))
    torch.testing.assert_close(outcome.loss.double(), expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    for parameter, gradient in zip(model.parameters(), found, strict=True):
        if parameter.grad is None:
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("trades", "factor"), [(None, 2), (6, 3)])
def test_one_training_forward(trades: float | None, factor: int, digits: Digits) -> None:
    x, y = digits.train[0][:5].double(), digits.train[1][:5]
    model, method = network(experts=False), RAMP(trades=trades)
    context = prepared(method, model, attack=PGD(steps=1))
    with recorded(model) as calls:
        method.loss(context, x, y)
    # a step, the losses of what it found, the training; the clean copy is another model
    assert [len(images) for images in calls.forwards] == [10, 10, 5 * factor]


def test_two_processes_train_on_the_images_of_one(digits: Digits) -> None:
    x, y = digits.train[0][:8].double(), digits.train[1][:8]
    model = network(experts=False)

    def images(rows: slice, rank: int, world: int) -> Tensor:
        method = RAMP(fusion=None)
        context = prepared(method, model, rank=rank, world=world)
        with recorded(model) as calls:
            method.loss(context, x[rows], y[rows])
        return calls.forwards[-1]

    parts = images(slice(0, 4), 0, 2), images(slice(4, 8), 1, 2)
    torch.testing.assert_close(torch.cat(parts), images(slice(None), 0, 1))


# The fusion


def test_the_fusion_by_hand() -> None:
    start, robust = torch.zeros(2), torch.tensor([2.0, 0.0])
    root = 0.5**0.5
    cases = {  # where clean training went: its agreement with (2, 0)
        (1.0, 1.0): root,
        (3.0, 0.0): 1.0,
        (0.0, 1.0): 0.0,
        (-1.0, 1.0): 0.0,
        (-2.0, 0.0): 0.0,
    }
    for clean, agreement in cases.items():
        for share in (0.5, 0.25):
            expected = (1 - share) * robust + share * agreement * torch.tensor(clean)
            torch.testing.assert_close(fuse(start, torch.tensor(clean), robust, share), expected)
    moved = torch.tensor([10.0, -4.0])  # relative to the start
    torch.testing.assert_close(
        fuse(moved, moved + torch.tensor([1.0, 1.0]), moved + robust, 0.5),
        moved + torch.tensor([1 + root / 2, root / 2]),
    )


def test_the_fusion_takes_a_tensor_as_one_vector() -> None:
    g = torch.Generator().manual_seed(0)
    start, clean, robust = (torch.randn(3, 4, 2, generator=g) for _ in range(3))
    flat = fuse(start.flatten(), clean.flatten(), robust.flatten(), 0.5)
    torch.testing.assert_close(fuse(start, clean, robust, 0.5), flat.view(3, 4, 2))


def test_counters_scalars_and_what_did_not_move() -> None:
    for robust in (torch.tensor(7), torch.tensor([7, 8]), torch.tensor(0.3)):
        fused = fuse(torch.zeros_like(robust), torch.ones_like(robust), robust, 0.5)
        assert torch.equal(fused, robust)
        assert fused.data_ptr() != robust.data_ptr()
    frozen = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fuse(frozen, frozen, frozen, 0.5), frozen)
    half = fuse(frozen, frozen, frozen + 1, 0.5)  # clean training left it alone
    torch.testing.assert_close(half, frozen + 0.5)


# Whole epochs


def batchnorm_network() -> nn.Module:
    """With buffers that training moves, a layer that is frozen, and dropout off."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 10))
    model[1].bias.requires_grad_(False)
    return model.double()


def epochs(
    method: RAMP, context: TrainContext, optimizer: torch.optim.Optimizer, batches: list[list[tuple[Tensor, Tensor]]]
) -> None:
    """Two epochs as the loop runs them; each inner list is one update's accumulation steps."""
    for epoch in range(2):
        context.model.train()
        method.epoch_start(context, epoch)
        for number, parts in enumerate(batches):
            context.lr = 0.05 / (1 + number + epoch)
            for group in optimizer.param_groups:
                group["lr"] = context.lr
            for x, y in parts:
                (method.loss(context, x, y).loss / len(parts)).backward()
            optimizer.step()
            optimizer.zero_grad()
            method.update_end(context)
        method.epoch_end(context, epoch)


@pytest.mark.parametrize("parts", [1, 2])
def test_two_epochs_are_those_of_two_models_trained_one_after_the_other(parts: int, digits: Digits) -> None:
    """Also that the copy starts anew each epoch, that both optimizers go on, and that BatchNorm is fused."""
    sizes = [slice(12 * i, 12 * (i + 1)) for i in range(3 * parts)]
    batches = [(digits.train[0][rows].double(), digits.train[1][rows]) for rows in sizes]
    grouped = [batches[i : i + parts] for i in range(0, len(batches), parts)]
    settings = {"optimizer": SGD(lr=0.05), "attack": PGD(steps=2, random_start=False)}

    model, method = batchnorm_network(), RAMP()
    epochs(method, prepared(method, model, **settings), SGD(lr=0.05).build(model), grouped)

    def train_one(one: nn.Module, optimizer: Any, epoch: int, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        one.train()
        for number, group in enumerate(grouped):
            for part in optimizer.param_groups:
                part["lr"] = 0.05 / (1 + number + epoch)
            optimizer.zero_grad()
            sum(loss(x, y) for x, y in group).div(parts).backward()
            optimizer.step()

    robust, plain = batchnorm_network(), RAMP(fusion=None)
    clean = copy.deepcopy(robust)
    context = prepared(plain, robust, **settings)
    optimizers = SGD(lr=0.05).build(robust), SGD(lr=0.05).build(clean)
    for epoch in range(2):
        start = copy.deepcopy(robust.state_dict())
        clean.load_state_dict(start)
        train_one(clean, optimizers[1], epoch, lambda x, y: F.cross_entropy(clean(x).float(), y))
        train_one(robust, optimizers[0], epoch, lambda x, y: plain.loss(context, x, y).loss)
        fused = {}
        for name, w in start.items():
            w_n, w_a = clean.state_dict()[name], robust.state_dict()[name]
            if name.endswith("num_batches_tracked"):
                fused[name] = w_a
            else:
                product = ((w_n - w) * (w_a - w)).sum()
                cosine = product / ((w_n - w).norm() * (w_a - w).norm()).clamp(min=1e-16)
                fused[name] = w + 0.5 * (w_a - w) + 0.5 * cosine.clamp(min=0) * (w_n - w)
        robust.load_state_dict(fused)

    own = model.state_dict()
    assert own.keys() == fused.keys()
    for name in fused:
        torch.testing.assert_close(own[name], fused[name], rtol=1e-6, atol=1e-9)
    assert torch.equal(own["1.bias"], batchnorm_network().state_dict()["1.bias"])
    assert own["2.num_batches_tracked"] == 6 * parts
    assert own["2.running_mean"].abs().sum() > 0


def test_a_run_fuses_at_the_end_of_every_epoch_after_the_natural_ones(tmp_path: Path) -> None:
    runs = {}
    for name, fusion in (("fused", 0.5), ("plain", None), ("clean", 1.0)):
        config = tiny(epochs=3, natural_epochs=1, method={"kind": "ramp", "fusion": fusion})
        runs[name] = train(config, tmp_path / name)
    logs = {name: [line["loss"] for line in updates(run.log())] for name, run in runs.items()}
    for one in ("plain", "clean"):
        assert logs[one][: 2 * STEPS] == logs["fused"][: 2 * STEPS], "the natural epoch, and until the first fusion"
        assert not set(logs[one][2 * STEPS :]) & set(logs["fused"][2 * STEPS :])
    assert not same(weights(runs["fused"].folder), weights(runs["plain"].folder))
    lines = updates(runs["fused"].log())
    assert all("clean_copy" not in line for line in lines[:STEPS])
    for line in lines[STEPS:]:
        assert set(line["accuracy"]) == {"Linf", "L1"}
        parts = line["cross_entropy"] + line["pairing"] + line["regularizer"]
        assert line["loss"] == pytest.approx(parts, abs=1e-5)
        assert line["clean_copy"] > 0
    assert all("clean_copy" not in line for line in updates(runs["plain"].log()))


def test_the_clean_copy_never_sees_an_attack_and_starts_as_the_model(tmp_path: Path) -> None:
    """Its loss in the first update is the model's clean cross-entropy, whatever the attack does."""
    losses = []
    for steps in (1, 3):
        run = train(tiny(epochs=1, method="ramp", attack__steps=steps), tmp_path / str(steps))
        losses.append([line["clean_copy"] for line in updates(run.log())])
    assert losses[0] == losses[1]
    natural = train(tiny(epochs=1, natural_epochs=1), tmp_path / "natural")
    assert [line["loss"] for line in updates(natural.log())] == pytest.approx(losses[0], abs=1e-6)


def test_without_fusion_there_is_no_copy_to_save() -> None:
    method = RAMP(fusion=None)
    prepared(method, network(experts=False))
    assert method.state() == {}


def test_a_clean_copy_that_diverges_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rome.methods.ramp._CleanCopy.backward", lambda self, x, y: torch.tensor(math.nan))
    with pytest.raises(UserError, match=r"Lower optimizer\.lr"):
        train(tiny(method="ramp"), tmp_path / "run")
    assert not Run(tmp_path / "run").finished


def test_source_and_target_are_two_of_the_configs_threats() -> None:
    assert [threat.name for threat in RAMP(source="L2", target="L1").training_threats(tuple(BUDGETS), PGD())] == [
        "L2",
        "L1",
    ]
    with pytest.raises(UserError, match=r"ramp trains on Linf, which is missing from threats \(there are L1, L2\)"):
        tiny(method="ramp", threats=[{"norm": "L1", "eps": 1}, {"norm": "L2", "eps": 1}])
    with pytest.raises(UserError, match="name two threats"):
        RAMP(source="L1")
