"""On a device that is not the CPU all of it gives what it gives on the CPU, and nothing is left behind there.

The device is one that pretends (:mod:`helpers.pretend`), so this runs without a GPU; ``make test-gpu`` is for a
real one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rome
from helpers.contexts import context_of
from helpers.pretend import DEVICE, WAITED, Device, Pretend, WrongDevice, moved
from helpers.problems import rest_slow
from rome.attacks import APGD, PGD, Attack
from rome.attacks.checks import deferred_checks
from rome.attacks.lp.autoattack import APGDCE, APGDT, FABT, Square
from rome.attacks.suites.base import Case, QuickSuite
from rome.attacks.suites.unseen import CorruptionsSuite, UnseenSuite
from rome.experts import (
    Diversification,
    Gate,
    Networks,
    Regularizer,
    add_experts,
    expert_layers,
    record_gates,
    set_routing,
)
from rome.methods import Method
from rome.models import create_model
from rome.report.gates import collect
from rome.runs.optim import AdamW
from rome.threats import CIFAR10, LpBall, PerExample, Threat


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with Device():
        yield


def vit(*, experts: bool = True, side: int = 32, **settings: Any) -> nn.Module:
    model = create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=side, patch_size=side // 4, embed_dim=16, depth=1, num_heads=2
    )
    torch.manual_seed(0)
    nn.init.normal_(model.backbone.head.weight, std=0.5)  # type: ignore[union-attr,arg-type]
    if experts:
        add_experts(model, **{"experts": 3, "rank": 2, **settings})
        for layer in expert_layers(model).values():
            nn.init.normal_(layer.B, std=0.3)  # type: ignore[arg-type]
    return model.eval()


def resnet() -> nn.Module:
    torch.manual_seed(0)
    model = create_model("wide_resnet", num_classes=10, depth=10, width=1)
    add_experts(model, experts=3, rank=2)
    return model.eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def both(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The model on the device, the images there, the model's answers there and here."""
    y = model(x).argmax(dim=1)
    return moved(copy.deepcopy(model)), x.to(DEVICE), y.to(DEVICE), y


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# The device itself


def test_the_device_refuses_what_lies_on_the_cpu() -> None:
    here, there = torch.ones(3), torch.ones(3, device=DEVICE)
    assert isinstance(there, Pretend)
    assert there.device == DEVICE
    assert isinstance((2 * there + torch.tensor(1.0)).sum(), Pretend)
    assert (2 * there + torch.tensor(1.0)).tolist() == [3, 3, 3]
    assert not isinstance(there.cpu(), Pretend)
    assert there[torch.tensor([0, 1])].tolist() == [1, 1]
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.long()]):
        with pytest.raises(WrongDevice):
            mixed()
    with pytest.raises(TypeError):
        there.numpy()


def test_gradients_stay_there() -> None:
    layer = moved(nn.Linear(3, 2))
    layer(torch.ones(4, 3, device=DEVICE)).sum().backward()
    assert all(isinstance(parameter.grad, Pretend) for parameter in layer.parameters())
    with pytest.raises(WrongDevice):
        layer(torch.ones(4, 3))


def test_waits_are_seen() -> None:
    there = torch.ones(3, device=DEVICE)
    WAITED.clear()
    _ = there.sum() > 2, there[torch.tensor([0])], there.to(torch.float64), torch.where(there > 0, there, 0)
    assert WAITED == []
    _ = bool(there.sum() > 2), there[there > 0], there.nonzero(), there.cpu(), float(there[0])
    assert WAITED == ["_local_scalar_dense", "index", "nonzero", "_to_copy", "_local_scalar_dense"]


# Attacks


MIXED = PerExample(tuple(CIFAR10), torch.arange(6) % 3)
BALLS: list[tuple[Attack, Threat | PerExample]] = [
    *((attack, threat) for attack in (PGD(steps=2), APGD(steps=6)) for threat in (*CIFAR10, MIXED)),
    *((attack, CIFAR10[0]) for attack in (APGDCE(iterations=5), APGDT(iterations=5, targets=1), FABT(iterations=2))),
    *((Square(queries=10), threat) for threat in CIFAR10),
]


@pytest.mark.parametrize(
    ("attack", "threat"), rest_slow([BALLS[3], BALLS[7], *BALLS[8:12], *BALLS[:3], *BALLS[4:7], *BALLS[12:]], 6)
)
def test_attacks_in_balls(attack: Attack, threat: Threat | PerExample, x: Tensor) -> None:
    model = vit()
    on_device, images, labels, y = both(model, x)
    found = attack.run(on_device, images, labels, threat, generator=seeded())
    expected = attack.run(model, x, y, threat, generator=seeded())
    assert isinstance(found.adversarial, Pretend)
    torch.testing.assert_close(found.adversarial.cpu(), expected.adversarial, rtol=0, atol=1e-4)
    assert found.robust.tolist() == expected.robust.tolist()


def few_steps(case: Case) -> Case:
    (attack,) = case.attacks
    return case.model_copy(
        update={
            "attacks": (attack.model_copy(update={"steps": 2}) if "steps" in type(attack).model_fields else attack,)
        }
    )


BEYOND = [
    few_steps(case)
    for suite in (
        UnseenSuite(features="self"),
        UnseenSuite(features="self", stop=True),
        CorruptionsSuite(types=("fog", "glass_blur", "jpeg_compression"), severities=(5,)),
    )
    for case in suite.cases({threat.name: threat for threat in CIFAR10}, 10)
    if not getattr(suite, "stop", False) or case.name == "fog"  # all stop in one place
]


@pytest.mark.parametrize("case", rest_slow({case.name: case for case in BEYOND}, 9))
def test_attacks_and_corruptions_beyond_balls(case: Case, x: Tensor) -> None:
    model = vit()
    on_device, images, labels, y = both(model, x)
    (attack,) = case.attacks
    found = attack.run(on_device, images, labels, case.threat, generator=seeded())
    expected = attack.run(model, x, y, case.threat, generator=seeded())
    assert isinstance(found.adversarial, Pretend)
    # Adam's first steps are signs of gradients, and Gabor's noise jumps: rounding may move a few pixels by much
    apart = (found.adversarial.cpu() - expected.adversarial).abs()
    assert float(apart.mean()) < 1e-3
    assert sum(a != b for a, b in zip(found.robust.tolist(), expected.robust.tolist(), strict=True)) <= 1


# Experts and gates


@pytest.mark.parametrize("gate", ["dual-scale", "local", "global", "uniform"])
@pytest.mark.parametrize("routing", ["learned", "random", "inverse", "none"])
def test_gates(gate: str, routing: Any, x: Tensor) -> None:
    model = vit(gate=Gate.of_kind(gate)())
    on_device, images, _, _ = both(model, x)
    for one in (model, on_device):
        set_routing(one, routing, seed=0)
    with record_gates(on_device) as found, record_gates(model) as expected:
        torch.testing.assert_close(on_device(images).cpu(), model(x))
    for name, gates in found.gates.items():
        torch.testing.assert_close(gates.weights.cpu(), expected.gates[name].weights)
    after, images, _, _ = both(model, x)  # moved with the routing it has, as `rome evaluate --routing` does
    torch.testing.assert_close(after(images).cpu(), model(x))


@pytest.mark.parametrize("build", [vit, resnet])
def test_gate_statistics(build: Any, x: Tensor) -> None:
    model, x = build(), x[:3]
    on_device, images, labels, y = both(model, x)
    threats, attack = {threat.name: threat for threat in CIFAR10}, APGD(steps=3)
    found = collect(on_device, images, labels, threats, attack=attack)
    expected = collect(model, x, y, threats, attack=attack)
    for name in ("weights", "local", "global_", "entropy"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-3)


# Training


REGULARIZERS: list[Regularizer] = [
    Diversification(),
    Diversification(distance="kl", gradient="gates"),
    Diversification(estimate="unbiased"),
    *(Regularizer.of_kind(kind)() for kind in ("load-balancing", "importance", "classification")),
]


def updated(
    method: Method, model: nn.Module, x: Tensor, y: Tensor, *, regularizer: Regularizer | None
) -> tuple[list[float], nn.Module]:
    """Losses of two epochs of one update each, and the model after them."""
    attack = APGD(steps=2) if method.kind in ("eat", "ramp") else PGD(steps=1)
    optimizer = AdamW(lr=1e-3).build(model)
    context = context_of(
        model,
        threats=method.training_threats(tuple(CIFAR10), attack),
        attack=attack,
        regularizer=regularizer,
        lr=1e-3,
        epochs=range(2),
    )
    method.prepare(context)
    losses = []
    for epoch in range(2):
        context.epoch, context.lr = epoch, 1e-3
        model.train()
        method.epoch_start(context, epoch)
        outcome = method.loss(context, x, y)
        outcome.loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        method.update_end(context)
        method.epoch_end(context, epoch)
        losses.append(float(outcome.loss.detach()))
    return losses, model


@pytest.mark.parametrize("kind", ["random", "avg", "max", "msd"])
def test_an_update_waits_for_nothing_before_its_checks(kind: str, x: Tensor) -> None:
    model, images, labels, _ = both(vit(), x)
    method = Method.of_kind(kind)()
    attack = PGD(steps=2)
    optimizer = AdamW(lr=1e-3).build(model)
    threats = method.training_threats(tuple(CIFAR10), attack)
    context = context_of(model, threats=threats, attack=attack, regularizer=Diversification())
    model.train()
    WAITED.clear()
    with deferred_checks() as settle:
        method.loss(context, images, labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert WAITED == []
        settle()
    assert WAITED == ["_local_scalar_dense"]


def compare_training(method: Method, model: nn.Module, x: Tensor, regularizer: Regularizer | None) -> None:
    on_device, images, labels, y = both(model, x)
    found, after = updated(method.model_copy(deep=True), on_device, images, labels, regularizer=regularizer)
    expected, reference = updated(method.model_copy(deep=True), model, x, y, regularizer=regularizer)
    assert found == pytest.approx(expected, rel=1e-4)
    for one, other in zip(after.parameters(), reference.parameters(), strict=True):
        assert isinstance(one.data, Pretend)
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    "regularizer", rest_slow({f"{one.kind}-{getattr(one, 'distance', '')}": one for one in REGULARIZERS}, 4)
)
def test_losses_on_the_gates(regularizer: Regularizer, x: Tensor) -> None:
    compare_training(Method.of_kind("random")(), vit(), x, regularizer)


@pytest.mark.parametrize("kind", rest_slow(["random", "ramp", "eat", "msd", "avg", "max"], 3))
def test_methods(kind: str, x: Tensor) -> None:
    compare_training(Method.of_kind(kind)(), vit(), x, Diversification())


def test_more_in_both_stages(x: Tensor) -> None:
    compare_training(Method.of_kind("more")(), Networks(experts=3).inject(vit(experts=False)), x, None)


@pytest.mark.parametrize("kind", ["pat", "vr"])
def test_perceptual_methods(kind: str, x: Tensor) -> None:
    compare_training(Method.of_kind(kind)(features="self", steps=2), vit(), x, Diversification())


# Evaluation


def test_an_evaluation(x: Tensor) -> None:
    model = vit()
    on_device, images, labels, y = both(model, x)
    settings = {"threats": LpBall(norm="L2", eps=0.1), "suite": QuickSuite(steps=2), "checks": False}
    found = rome.evaluate(on_device, images, labels, **settings)
    expected = rome.evaluate(model, x, y, **settings)
    assert (found.correct == expected.correct).all()
