"""PAT and PAT+VR against their definitions, and as runs: resumed, spread over processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.contexts import context_of
from helpers.problems import Digits, FixedNoise, recorded
from helpers.tiny_runs import (
    STEPS,
    assert_same_run,
    both,
    changed,
    same,
    tiny,
    two_processes,
    updates,
    watched,
    weights,
    without_times,
    write_yaml,
)
from rome.attacks import PGD, FastLPA
from rome.attacks.perceptual.fast_lpa import FastLPAWithPair
from rome.core.errors import Interrupted, UserError
from rome.core.randomness import stream
from rome.experts import Diversification, Regularizer, add_experts, expert_layers, record_gates
from rome.methods import PAT, VR, Method, TrainContext
from rome.models import create_model, save_model
from rome.runs.folder import Run
from rome.threats import DIGITS, Perceptual, PerExample
from rome.training.setup import train

BOUND = 0.3


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a fixed network for the digits."""
    return save_network(tmp_path_factory.mktemp("runs") / "net", seed=1)


def save_network(folder: Path, seed: int) -> str:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = create_model(
            "convnext_atto", num_classes=10, in_chans=1, patch_size=1, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8)
        )
    save_model(network, folder / "model.safetensors")
    return str(folder)


def network(*, experts: bool = False) -> nn.Module:
    """A ViT of two blocks on the digits, float64, so that attacking in another batch changes no digit that matters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(
            "vit_tiny_patch16_224", num_classes=10, in_chans=1, img_size=8, patch_size=4, embed_dim=16, depth=2,
            num_heads=2,
        )  # fmt: skip
        nn.init.normal_(model.backbone.head.weight, std=0.5)
        if experts:
            add_experts(model, experts=3, rank=2)
            for layer in expert_layers(model).values():
                nn.init.normal_(layer.B, std=0.3)
    return model.double().train()


def prepared(
    method: Method, model: nn.Module, *, regularizer: Regularizer | None = None, rank: int = 0, world: int = 1
) -> TrainContext:
    """The context of a method that was prepared; its networks are float64 as the model."""
    context = context_of(
        model,
        threats=method.training_threats(tuple(DIGITS), PGD()),
        attack=PGD(),
        regularizer=regularizer,
        rank=rank,
        world=world,
    )
    method.prepare(context)
    for threat in held(method):
        if threat.network is not None:
            threat.network.double()
    return context


def held(method: Method) -> tuple[Perceptual, ...]:
    assert isinstance(method, PAT)
    return method._threats


@pytest.fixture
def batch(digits: Digits) -> tuple[Tensor, Tensor]:
    """Twelve digits, float64, of which the model gets 8 right."""
    x = digits.train[0][:12].double()
    y = network().eval()(x).argmax(1)
    y[::3] = (y[::3] + 1) % 10
    return x, y


def trained_on(method: Method, context: TrainContext, batch: tuple[Tensor, Tensor]) -> tuple[Any, Tensor]:
    """The outcome, and the images of the training forward."""
    with recorded(context.attacked) as calls:
        outcome = method.loss(context, *batch)
    return outcome, calls.forwards[-1]


# PAT


def test_pat_is_the_cross_entropy_of_examples_that_meet_one_threat_each(batch: tuple[Tensor, Tensor], net: str) -> None:
    method, model = PAT(features=("self", net), bound=BOUND, steps=3), network()
    outcome, images = trained_on(method, prepared(method, model), batch)
    x, y = batch
    noise = stream(0, "attack").uniform(x.shape)
    assert torch.bincount(outcome.labels).tolist() == [6, 6]
    right = model.eval()(x).argmax(1) == y
    for i in range(12):
        one, threat = slice(i, i + 1), held(method)[int(outcome.labels[i])]
        if not right[i]:
            assert torch.equal(images[i], x[i])
            continue
        expected = FastLPA(steps=3)(model, x[one], y[one], threat, generator=FixedNoise(noise[one]))
        torch.testing.assert_close(images[one], expected, rtol=1e-6, atol=1e-8)
        assert not torch.equal(images[i], x[i])
    assert right.sum() == 8
    torch.testing.assert_close(outcome.loss.double(), F.cross_entropy(model(images), y), rtol=1e-6, atol=1e-6)
    assert set(outcome.parts) == {"cross_entropy"}
    assert torch.equal(outcome.correct, model(images).argmax(1) == y)


def test_one_network_is_one_threat_for_all(batch: tuple[Tensor, Tensor]) -> None:
    method, model = PAT(features="self", bound=BOUND, steps=2), network()
    context = prepared(method, model)
    outcome, images = trained_on(method, context, batch)
    assert [threat.name for threat in context.threats] == ["LPIPS-self"]
    expected = FastLPA(steps=2, only_correct=True)(
        model, *batch, Perceptual(bound=BOUND), generator=stream(0, "attack")
    )
    assert torch.equal(images, expected)
    assert outcome.labels.tolist() == [0] * 12


def test_whether_an_example_is_right_is_asked_in_evaluation_mode(batch: tuple[Tensor, Tensor]) -> None:
    method, model = PAT(features="self", steps=1), network()
    model.backbone.head_drop.p = 1.0  # in training mode all logits are the head's bias
    model.backbone.head.bias.data[0] = 100
    model.backbone.head.weight.data *= 1000
    x, _ = batch
    y = model.eval()(x).argmax(1)
    model.train()
    _, images = trained_on(method, prepared(method, model), (x, y))
    assert (images != x).flatten(1).any(1).all()
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("kind", [PAT, VR])
def test_threats_are_the_parts_of_the_diversification(kind: type[PAT], batch: tuple[Tensor, Tensor], net: str) -> None:
    """RoME+PAT: L_div between examples of the two perceptual threats; of VR's three images it takes the first."""
    method, model = kind(features=("self", net), bound=BOUND, steps=2), network(experts=True)
    context = prepared(method, model, regularizer=Diversification(weight=0.7))
    outcome, images = trained_on(method, context, batch)
    with record_gates(model) as recorder:
        model(images[:12])
    expected = Diversification().loss(list(recorder.complete()), outcome.labels, 2)
    assert expected < -1e-4
    torch.testing.assert_close(outcome.parts["regularizer"].double(), 0.7 * expected.detach())
    torch.testing.assert_close(outcome.loss.detach(), sum(outcome.parts.values()), rtol=1e-6, atol=1e-6)
    outcome.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


# VR


class Pixels(nn.Module):
    """Logits that are the pixels of 1x2x2 images, times ten."""

    def __init__(self) -> None:
        super().__init__()
        self.ten, self.flat = nn.Conv2d(1, 1, 1, bias=False), nn.Flatten()
        nn.init.constant_(self.ten.weight, 10.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.flat(self.ten(x))


def test_variation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the pair differ by (3, 4, 0, 0) and by (0, 0, 0, 2): the mean of 5 and 2, times lambda."""
    x = torch.tensor([[0.9, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.9]]).view(2, 1, 2, 2)
    y = torch.tensor([0, 3])
    pair = torch.tensor([[0.3, 0.4, 0.0, 0.0], [0.0, 0.0, 0.0, 0.2]]).view(2, 1, 2, 2)
    rows = torch.stack([x, torch.zeros_like(x) + pair, torch.zeros_like(x)], dim=1).view(6, 1, 2, 2)
    monkeypatch.setattr(FastLPAWithPair, "__call__", lambda *arguments, **named: rows)
    method = VR(features="self", layers="flat", weight=0.2)
    outcome = method.loss(prepared(method, Pixels()), x, y)
    log_sum = torch.tensor([9.0, 1.0, 1.0, 1.0]).logsumexp(0)
    assert outcome.parts["cross_entropy"].item() == pytest.approx(log_sum.item() - 9, abs=1e-6)
    assert outcome.parts["variation"].item() == pytest.approx(0.2 * 3.5, abs=1e-6)
    assert outcome.loss.item() == pytest.approx(log_sum.item() - 9 + 0.7, abs=1e-6)
    assert outcome.correct.tolist() == [True, True]
    assert len(outcome.labels) == 2
    outcome.loss.backward()  # the norm of no difference has a gradient, too


def test_vr_trains_on_what_the_joint_search_found(batch: tuple[Tensor, Tensor], net: str) -> None:
    method, model = VR(features=("self", net), bound=BOUND, steps=3, weight=0.4), network()
    outcome, images = trained_on(method, prepared(method, model), batch)
    x, y = (part.repeat_interleave(3, dim=0) for part in batch)
    mixture = PerExample(held(method), outcome.labels.repeat_interleave(3))
    attack = FastLPAWithPair(steps=3, only_correct=True)
    rows = attack(model, x, y, mixture, generator=stream(0, "attack"))
    assert torch.equal(images, torch.cat([rows[0::3], rows[1::3], rows[2::3]]))
    right = model.eval()(batch[0]).argmax(1) == batch[1]
    one, other = model(images[12:24]), model(images[24:])
    distance = (one - other).norm(dim=1)
    assert (distance[~right] == 0).all()
    assert (distance[right] > 0.1).all()
    torch.testing.assert_close(outcome.parts["variation"].double(), 0.4 * distance.mean(), rtol=1e-5, atol=1e-7)
    cross_entropy = F.cross_entropy(model(images[:12]), batch[1])
    torch.testing.assert_close(outcome.parts["cross_entropy"].double(), cross_entropy, rtol=1e-5, atol=1e-6)


def test_the_pair_varies_more_than_chance(digits: Digits) -> None:
    """The search is worth its cost: its logits are farther apart than those of two random starts."""
    model = network().eval()
    x = digits.train[0][:20].double().repeat_interleave(3, dim=0)
    y = model(x).argmax(1)
    found = FastLPAWithPair(steps=5)(model, x, y, Perceptual(bound=BOUND))
    start = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))

    def apart(images: Tensor) -> Tensor:
        return (model(images[1::3]) - model(images[2::3])).norm(dim=1)

    assert (apart(found) > 3 * apart(start)).all()


# What both promise


@pytest.mark.parametrize("kind", [PAT, VR])
def test_two_processes_train_on_the_images_of_one(kind: type[PAT], batch: tuple[Tensor, Tensor], net: str) -> None:
    method, model = kind(features=("self", net), bound=BOUND, steps=2), network()
    found = [
        trained_on(method, prepared(method, model, rank=rank, world=2), tuple(part[rows] for part in batch))
        for rank, rows in enumerate((slice(0, 6), slice(6, 12)))
    ]
    whole, images = trained_on(method, prepared(method, model), batch)
    assert torch.equal(torch.cat([outcome.labels for outcome, _ in found]), whole.labels)
    copies = len(images) // 12
    joined = torch.cat([part.view(copies, 6, *part.shape[1:]) for _, part in found], dim=1)
    torch.testing.assert_close(joined.flatten(0, 1), images, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [PAT, VR])
def test_networks_learn_nothing_and_the_attack_leaves_no_gradient(
    kind: type[PAT], batch: tuple[Tensor, Tensor], net: str
) -> None:
    method, model = kind(features=("self", net), steps=1), network()
    outcome = method.loss(prepared(method, model), *batch)
    assert all(parameter.grad is None for parameter in model.parameters())
    outcome.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    fixed = held(method)[1].network
    assert fixed is not None
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
    assert not any(module.training for module in fixed.modules())


def test_the_settings_name_networks_and_ignore_the_lp_threats(net: str) -> None:
    method = PAT()
    threats = method.training_threats(tuple(DIGITS), PGD())
    assert [threat.name for threat in threats] == ["LPIPS-self", "LPIPS-alexnet"]
    assert all(isinstance(threat, Perceptual) and threat.bound == 0.5 for threat in threats)
    assert method.own_attack == FastLPA.kind
    assert (method.steps, VR().weight) == (10, 0.1)
    own, fixed = PAT(features=["self", net], layers="blocks.0").training_threats((), PGD())
    assert (own.dump()["layers"], fixed.dump()["layers"]) == (["blocks.0"], [])
    with pytest.raises(UserError, match="threats of the same name"):
        PAT(features=("a/net", "b/net")).training_threats((), PGD())
    with pytest.raises(UserError, match="features"):
        PAT(features=())


def test_layers_that_are_not_there_are_refused_before_training(net: str) -> None:
    method = PAT(features=("self", net), layers=("blocks.7",))
    with pytest.raises(UserError, match=r"no layer 'blocks\.7'"):
        prepared(method, network())


# Runs


@pytest.fixture
def changes(net: str) -> dict[str, Any]:
    """Changes of the tiny config, which has experts: RoME+PAT+VR."""
    return {"method": {"kind": "vr", "bound": BOUND, "steps": 2, "features": ["self", net]}}


def interrupted(run: Run, **changes: Any) -> None:
    """Trained until the second update of the second epoch."""
    strike = watched(lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == STEPS + 2 else None)
    with pytest.raises(Interrupted):
        train(tiny(**changes), run.folder, progress=strike)


@pytest.mark.parametrize("other", [{}, {"method__kind": "pat", "experts": None, "natural_epochs": 1}])
def test_a_run_goes_on_with_the_same_bits(other: dict[str, Any], changes: dict[str, Any], tmp_path: Path) -> None:
    changes, run = {**changes, **other}, Run(tmp_path / "run")
    interrupted(run, **changes)
    whole = train(tiny(**changes), tmp_path / "whole")
    train(tiny(**changes), run.folder, resume=True)
    assert same(weights(run.folder), weights(whole.folder))
    assert without_times(run.log()) == without_times(whole.log())
    assert set(updates(run.log())[-1]["accuracy"]) == {"LPIPS-self", "LPIPS-net"}


@pytest.mark.slow
def test_several_processes_compute_what_one_computes(changes: dict[str, Any], tmp_path: Path) -> None:
    config, run = write_yaml(tmp_path / "tiny.yaml", changed(name="tiny", **changes)), Run(tmp_path / "two")
    ended = both(two_processes("train", config, "--out", run.folder, logs=tmp_path / "logs"))
    assert [process.code for process in ended] == [0, 0], ended
    assert_same_run(run, train(tiny(**changes), tmp_path / "one"))


def test_bf16_and_accumulation_train(net: str, tmp_path: Path) -> None:
    method = {"kind": "vr", "bound": BOUND, "steps": 1, "features": ["self", net]}
    one = train(tiny(method=method, epochs=1, accumulate=2, precision="bf16"), tmp_path / "one")
    full = train(tiny(method=method, epochs=1, accumulate=2), tmp_path / "full")
    for line, other in zip(updates(one.log()), updates(full.log()), strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=0.05)
    assert not same(weights(one.folder), weights(full.folder))


def test_a_run_does_not_go_on_with_another_network(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    changes = {"method": {"kind": "pat", "steps": 1, "features": ["self", save_network(folder, seed=1)]}}
    run = Run(tmp_path / "run")
    interrupted(run, **changes)
    save_network(folder, seed=2)
    with pytest.raises(UserError, match="net is not the network that this run started with"):
        train(tiny(**changes), run.folder, resume=True)
    save_network(folder, seed=1)
    train(tiny(**changes), run.folder, resume=True)


def test_a_missing_network_is_named_before_anything_is_written(tmp_path: Path) -> None:
    missing = str(tmp_path / "alexnet")
    config = tiny(method={"kind": "pat", "features": ["self", missing]})  # a config is valid without it
    message = rf"pat: no network .*: there is no model at {missing}.*Train it.*method\.features="
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
