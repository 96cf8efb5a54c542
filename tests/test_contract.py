"""Every registered member of a family keeps the family's contract; a new file is under it without being listed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rome.attacks
import rome.methods
from helpers.contexts import context_of
from helpers.problems import case
from helpers.small_models import TINY, grow
from rome.attacks import PGD, Attack
from rome.attacks.suites import Suite
from rome.core import component
from rome.core.component import Component
from rome.core.errors import UserError
from rome.data import Data
from rome.evaluation.evaluate import evaluate
from rome.experts import Experts, Gate, Regularizer, add_experts, expert_layers, record_gates
from rome.methods import Method
from rome.models import create_model
from rome.runs.config import parse
from rome.runs.launchers import Launcher
from rome.runs.loggers import Logger
from rome.threats import CIFAR10, AnyImage, LpBall, Perceptual, Threat

VIT = {key: value for key, value in TINY.items() if key != "num_classes"}
FEW: dict[str, Any] = {
    "steps": 2, "iterations": 5, "queries": 5, "targets": 1, "lpips_steps": 2, "bisections": 2, "deepfool_steps": 2
}  # fmt: skip
"""Settings that bound the work, where a member has them."""
NEEDED: dict[str, dict[str, Any]] = {
    "corruption": {"type": "fog", "severity": 1}, "corruptions": {"types": ("fog",), "severities": (1,)},
    "several": {"suites": ["lp", "corruptions"]},
    "cifar10": {"path": "data"}, "folder": {"path": "data"}, "parquet": {"path": "data"},
    "timm": {"path": "data"},
    "attack": {"attack": {"kind": "stadv"}}, "lp": {"norm": "L2", "eps": 0.5}, "perceptual": {"bound": 0.5},
    "pat": {"features": "self"}, "vr": {"features": "self"},
    "unseen": {"features": "self"}, "all": {"features": "self"},
}  # fmt: skip
"""Settings without a default, or that would need a file."""


def made(member: type[Component]) -> Component:
    """A member of any family with its defaults, doing little work."""
    few = {name: value for name, value in FEW.items() if name in member.model_fields}
    needed = {name: value for name, value in NEEDED.get(member.kind, {}).items() if name in member.model_fields}
    return member(**few, **needed)


def members(family: type[Component]) -> list[Any]:
    own = {kind: member for kind, member in family.members().items() if member.__module__.startswith("rome.")}
    return [pytest.param(made(member), id=kind) for kind, member in own.items()]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A small ViT with experts that do something, for colour images of 32 pixels."""
    torch.manual_seed(0)
    model = add_experts(create_model("vit_tiny_patch16_224", num_classes=10, **VIT), experts=3, rank=2)
    return grow(model).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


FAMILIES = [Attack, Method, Experts, Gate, Regularizer, Data, Suite, Threat, Logger, Launcher]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_settings_go_into_a_config_and_come_back(family: type[Component]) -> None:
    for kind, member in family.members().items():
        if not member.__module__.startswith("rome."):
            continue  # of another test
        with case(kind):
            one = made(member)
            assert family.model_validate(one.dump()) == one
            assert one.dump()["kind"] == kind
            assert member.summary().endswith((".", ":", ")")), "the first sentence says what it is"
            with pytest.raises(UserError, match=r"no_such_setting: unknown key"):
                member(**NEEDED.get(kind, {}), no_such_setting=1)


# Attacks


def place(attack: Attack) -> Threat:
    """A threat that the attack can search."""
    for threat in (LpBall(norm="Linf", eps=0.1), CIFAR10["L1"], Perceptual(bound=0.5), AnyImage(label=attack.kind)):
        try:
            attack.steps_for(threat)
        except UserError:
            continue
        return threat
    raise AssertionError(f"{attack.kind} searches no threat that is known here")


@pytest.mark.parametrize("attack", members(Attack))
def test_an_attack(attack: Attack, model: nn.Module, x: Tensor) -> None:
    threat, y = place(attack), model(x).argmax(1)
    before, state = x.clone(), torch.get_rng_state()
    flags = [(module.training, *(p.requires_grad for p in module.parameters())) for module in model.modules()]
    found = attack.run(model, x, y, threat)
    again = attack.run(model, x, y, threat)
    for images in found[:2]:
        assert images.shape == x.shape
        assert images.dtype == x.dtype
        assert not images.requires_grad
        assert bool(threat.contains(images, x).all())
    assert all(torch.equal(one, other) for one, other in zip(found[:3], again[:3], strict=True)), "it can be repeated"
    wrong = model(found.adversarial).argmax(1) != y
    assert bool(wrong[~found.robust].all()), "whom it calls fooled is misclassified"
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert flags == [(module.training, *(p.requires_grad for p in module.parameters())) for module in model.modules()]
    assert not attack.unsupported_reason(3)
    assert len(attack.run(model, x[:0], y[:0], threat).images) == 0


# Methods


def trained_model(method: Method) -> nn.Module:
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=10, **VIT)
    kind = method.own_experts or "low-rank"
    return Experts.of_kind(kind)(**{"experts": 3} if kind == "more" else {"experts": 3, "rank": 2}).inject(model)


@pytest.mark.parametrize("method", members(Method))
def test_a_method(method: Method, x: Tensor) -> None:
    """One update: a finite loss that can be differentiated, labels and verdicts of its examples; and its state comes
    back from a checkpoint."""
    model = trained_model(method).train()
    regularizer = None if method.own_experts else Regularizer.of_kind("diversification")()
    context = context_of(
        model,
        threats=method.training_threats(tuple(CIFAR10), PGD(steps=1)),
        attack=PGD(steps=1),
        regularizer=regularizer,
        lr=1e-3,
        epochs=range(2),
    )
    y = torch.tensor([0, 1, 2, 3])
    method = method.model_copy(deep=True)
    method.prepare(context)
    method.epoch_start(context, 0)
    outcome = method.loss(context, x, y)
    outcome.loss.backward()
    assert bool(outcome.loss.isfinite())
    assert outcome.loss.ndim == 0
    assert len(outcome.labels) == len(outcome.correct) >= 1
    assert set(outcome.labels.tolist()) <= set(range(len(context.threats)))
    assert all(bool(part.isfinite()) and not part.requires_grad for part in outcome.parts.values())
    assert any(bool((p.grad != 0).any()) for p in model.parameters() if p.grad is not None)
    state = copy.deepcopy(method.state())
    fresh = method.model_copy(deep=True)
    fresh.prepare(context)
    fresh.load_state(state)
    assert torch.utils._pytree.tree_all(lambda pair: bool(torch.as_tensor(pair).all()), _equal(fresh.state(), state))
    assert sum(map(len, method.stages(range(4)))) == 4


def _equal(one: Any, other: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda a, b: torch.as_tensor(a == b), one, other)


# Experts, gates, regularizers


@pytest.mark.parametrize("experts", members(Experts))
def test_experts(experts: Experts, x: Tensor) -> None:
    """They change nothing at the start, train, and say which layers they are in."""
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", num_classes=10, **VIT).eval()
    before = model(x)
    model = experts.inject(model)
    layers = expert_layers(model)
    assert layers
    if experts.kind not in ("more", "ffn"):  # a mixture of whole networks, and of copies that are drawn apart
        torch.testing.assert_close(model.eval()(x), before)
    model.train()(x).square().sum().backward()
    for layer in layers.values():
        assert all(p.grad is not None for p in layer.gate_parameters() if p.requires_grad)


@pytest.mark.parametrize("gate", members(Gate))
def test_a_gate(gate: Gate, x: Tensor) -> None:
    model = add_experts(create_model("vit_tiny_patch16_224", num_classes=10, **VIT), experts=3, rank=2, gate=gate)
    with record_gates(grow(model)) as recorder:
        model.eval()(x)
    for gates in recorder.gates.values():
        assert gates.weights.shape == (len(x), 17, 3)
        assert bool((gates.weights >= 0).all())
        torch.testing.assert_close(gates.weights.sum(-1), torch.ones(len(x), 17))


@pytest.mark.parametrize("regularizer", members(Regularizer))
def test_a_regularizer(regularizer: Regularizer, x: Tensor) -> None:
    """A finite scalar that teaches the gates, whichever threats occur."""
    torch.manual_seed(0)
    model = grow(add_experts(create_model("vit_tiny_patch16_224", num_classes=10, **VIT), experts=3, rank=2))
    for labels in (torch.tensor([0, 1, 2, 0]), torch.zeros(4, dtype=torch.int64)):
        with record_gates(model) as recorder:
            model(x)
        loss = regularizer.loss(recorder.complete(), labels, 3)
        assert loss.ndim == 0
        assert bool(loss.isfinite())
    assert loss.requires_grad or regularizer.kind == "diversification", "of one threat there is nothing to part"


# Data and suites


@pytest.mark.parametrize("data", members(Data))
def test_data(data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in [0, 1] with labels, or one line that says what is missing."""
    monkeypatch.chdir(tmp_path)
    if NEEDED.get(data.kind):
        with pytest.raises(UserError, match=r"^[^\n]*data[^\n]*$"):
            data.open("test")
        return
    split = data.open("test")
    x, y = split.first(3)
    assert x.dtype == torch.float32
    assert (x.shape, y.shape, y.dtype) == ((3, *split.shape), (3,), torch.int64)
    assert bool(((x >= 0) & (x <= 1)).all())
    assert 0 <= int(y.min()) <= int(y.max()) < len(split.classes)
    assert data.form() == (split.shape, len(split.classes))


@pytest.mark.parametrize("suite", members(Suite))
def test_a_suite(suite: Suite) -> None:
    """Columns of different names, each with attacks that can search its threat."""
    cases = suite.cases({threat.name: threat for threat in CIFAR10}, 10)
    assert cases
    assert len({each.name for each in cases}) == len(cases)
    for each in cases:
        for attack in each.attacks:
            searcher, inside = each.threat.resolve_attack(attack)
            searcher.steps_for(inside)


# One file adds a member


ATTACK = '''
import torch
from rome.attacks.base import Attack, AttackResult
from rome.attacks.engine import loss_and_gradient

class SignStep(Attack):
    """FGSM: one step along the sign of the gradient."""

    kind = "dropped-fgsm"

    def steps_for(self, threat):
        return 1

    def search(self, model, x, y, groups, noise):
        _, correct, gradient = loss_and_gradient(model, x, y)
        x_adv = x.clone()
        for group in groups:
            moved = x[group.rows] + group.threat.eps * gradient[group.rows].sign()
            x_adv[group.rows] = group.threat.project(moved, x[group.rows])
        correct = model(x_adv).argmax(1) == y
        return AttackResult(x_adv, x_adv, correct, torch.full_like(y, float("nan"), dtype=torch.float32))
'''
METHOD = '''
from rome.methods import Method, TrainContext
from rome.methods.base import training_forward
from rome.threats import PerExample

class OnlyFirst(Method):
    """Training on the first threat alone."""

    kind = "dropped-first"

    def loss(self, context: TrainContext, x, y):
        mixture = PerExample.repeated(context.threats[:1], len(x))
        images = context.attack(context.attacked, x, y, mixture, generator=context.attack_stream)
        return training_forward(context, images, y, mixture.labels)
'''


@pytest.fixture
def dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A file with an attack and one with a method, in further folders of these packages."""
    for package, name, text in ((rome.attacks, "dropped_attack", ATTACK), (rome.methods, "dropped_method", METHOD)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    component._import_package.cache_clear()
    yield
    for family in (Attack, Method):
        for kind, member in family.members().items():
            if kind.startswith("dropped-"):
                member.kind = ""  # no longer a member, for the tests after this one
    component._import_package.cache_clear()


def test_one_file_adds_an_attack_and_one_a_method(dropped: None, model: nn.Module, x: Tensor) -> None:
    """Nothing lists them: a config finds them by kind, an update is trained and an evaluation made with them."""
    config = parse(
        {
            "data": {"kind": "digits"},
            "model": {"name": "vit_tiny_patch16_224"},
            "method": "dropped-first",
            "attack": "dropped-fgsm",
        }
    )
    own = copy.deepcopy(model).train()
    context = context_of(
        own, threats=config.method.training_threats(tuple(CIFAR10), config.attack), attack=config.attack
    )
    outcome = config.method.loss(context, x, torch.tensor([0, 1, 2, 3]))
    outcome.loss.backward()
    assert outcome.labels.tolist() == [0, 0, 0, 0]
    y = model(x).argmax(1)
    linf = LpBall(norm="Linf", eps=0.1)
    assert bool(linf.contains(config.attack(model, x, y, linf), x).all())
    case = {"name": "fgsm", "threat": linf, "attacks": [config.attack]}

    class One(Suite):
        """The new attack alone."""

        kind = "toy-one"

        def cases(self, threats: Any, classes: int) -> Any:
            from rome.attacks.suites import Case

            return [Case(**case)]

    report = evaluate(model, x, y, threats=linf, suite=One())
    assert report.robust["fgsm"] == float((model(config.attack(model, x, y, linf)).argmax(1) == y).float().mean())
