"""MORE: networks mixed by a gate network; experts that learn their own threat alone, then their gate."""

from __future__ import annotations

import copy
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rome
from helpers.contexts import BUDGETS, context_of
from helpers.problems import Digits, recorded, rest_slow
from helpers.tiny_runs import changed, same, tiny, watched, weights
from rome.attacks import PGD
from rome.core.errors import Interrupted, UserError
from rome.core.randomness import stream
from rome.evaluation.run import evaluate_saved
from rome.experts import Classification, LowRank, ModelMixture, Networks, expert_layers, record_gates
from rome.methods import MORE, Random, TrainContext
from rome.models import Classifier, create_model, load_experts, load_model, save_experts, save_model
from rome.report import cost
from rome.runs.config import parse
from rome.runs.folder import Run
from rome.runs.optim import AdamW
from rome.training.setup import train

PLAIN = {"num_classes": 10, "img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "in_chans": 1}


def vit(**changes: Any) -> Classifier:
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", **(PLAIN | changes))


def convolutions() -> Classifier:
    """With BatchNorm, dropout and no word of timm's; its normalisation does something."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.2), nn.Flatten(), nn.Linear(54, 10)
    )
    return Classifier(network, (0.3,), (0.4,))


def mixed(model: Classifier, *, experts: int = 3, apart: bool = True) -> Classifier:
    """A mixture in float64; ``apart``: whose networks are not each other's copies any more."""
    Networks(experts=experts).inject(model)
    if apart:
        g = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data += 0.3 * parameter.std() * torch.randn(parameter.shape, generator=g)
    return model.double().train()


def mixture_in(model: Classifier) -> ModelMixture:
    assert isinstance(model.backbone, ModelMixture)
    return model.backbone


def stage_of(model: nn.Module, *, stage: int = 1, **settings: Any) -> TrainContext:
    """For an epoch of the first or second stage of a run of two, or (0) for a natural epoch before."""
    return context_of(model, epochs=range(1, 3), epoch=stage, **settings)


@pytest.fixture
def batch(digits: Digits) -> tuple[Tensor, Tensor]:
    x, y = digits.train
    return x[:6].double(), y[:6]


@pytest.fixture(params=[vit, convolutions], ids=["ViT", "CNN"])
def model(request: pytest.FixtureRequest) -> Classifier:
    return mixed(request.param())


# The mixture


@pytest.mark.slow
def test_vit_b_has_the_papers_parameters_and_multiply_accumulates() -> None:
    """Table 6: 340.60M and 22.43G, which is four times its 5.61G; we count products alone, 5.601G each."""
    with torch.device("meta"):
        model = create_model("vit_base_patch16_224", num_classes=10, img_size=32, patch_size=4)
        plain, one = cost.parameters(model)["parameters"], cost.macs(model.eval(), (3, 32, 32))
        Networks().inject(model)
    count = cost.parameters(model)
    assert count["parameters"] == count["trainable"] == 340_602_657
    assert count["parameters"] - count["experts"] == plain == 85_152_010
    assert cost.macs(model.eval(), (3, 32, 32)) == 4 * one - 7 * 768  # three outputs instead of ten
    assert 4 * one / 1e9 == pytest.approx(22.43, rel=2e-3)


def test_output_and_gates_are_the_literal_sum(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    mixture, x = mixture_in(model.eval()), batch[0]
    with record_gates(model) as recorder:
        found = model(x)
    images = (x - model.mean) / model.std
    weights, expected = torch.zeros(6, 3, dtype=x.dtype), torch.zeros(6, 10, dtype=x.dtype)
    for b in range(6):
        scores = mixture.router(images[b : b + 1])[0]
        for k in range(3):
            weights[b, k] = scores[k].exp() / sum(score.exp() for score in scores)
            expected[b] += weights[b, k] * mixture.networks[k](images[b : b + 1])[0]
    torch.testing.assert_close(found, expected)
    (gates,) = recorder.gates.values()
    torch.testing.assert_close(gates.weights, weights.unsqueeze(1))
    torch.testing.assert_close(gates.global_, weights)
    assert gates.local is None
    assert weights.std(dim=0).min() > 1e-3, "images differ in their weights"
    assert set(recorder.gates) == {"backbone"}


@pytest.mark.parametrize("build", [vit, convolutions])
def test_the_function_does_not_change_at_first(build: Any, batch: tuple[Tensor, Tensor]) -> None:
    plain = build().double().eval()
    model = mixed(copy.deepcopy(plain), experts=4, apart=False).eval()
    torch.testing.assert_close(model(batch[0]), plain(batch[0]))
    before, router = plain.backbone.state_dict(), mixture_in(model).router.state_dict()
    assert len(mixture_in(model).networks) == 4
    for network in mixture_in(model).networks:
        assert same(dict(network.state_dict()), dict(before))
    new = {name for name in before if before[name].shape != router[name].shape}
    assert new == {name for name in before if name.startswith(("head.", "5."))}
    assert all(router[name].shape[0] == 4 for name in new)
    assert same({n: before[n] for n in before if n not in new}, {n: router[n] for n in router if n not in new})


def test_a_bf16_forward_is_near_that_in_fp32(batch: tuple[Tensor, Tensor]) -> None:
    model = mixed(vit()).float().eval()
    with torch.autocast("cpu", torch.bfloat16), record_gates(model) as recorder:
        logits = model(batch[0].float())
    exact = model(batch[0].float())
    assert (logits - exact).norm() < 0.02 * exact.norm()
    assert (recorder.gates["backbone"].weights.sum(dim=-1) - 1).abs().max() < 0.01


def test_inside_apart_each_part_of_the_batch_meets_one_expert(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    mixture, x = mixture_in(model.eval()), batch[0]
    alone = [network((x - model.mean) / model.std) for network in mixture.networks]
    with mixture.separate_experts(2, 0):
        torch.testing.assert_close(model(x), torch.cat([alone[2][:3], alone[0][3:]]))
        with mixture.separate_experts(1):
            torch.testing.assert_close(model(x), alone[1])
        with pytest.raises(RuntimeError, match="invalid for input"):
            model(x[:5])
    with record_gates(model) as recorder:
        model(x)
    assert len(recorder.gates) == 1, "the gate is back"


def test_weight_decay_leaves_out_what_each_network_leaves_out() -> None:
    plain, model = vit(), mixed(vit())

    def free(model: nn.Module) -> set[str]:
        exempt, decayed = AdamW().groups(model)
        assert (exempt["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        return {names[id(parameter)].removeprefix("backbone.") for parameter in exempt["params"]}

    assert "pos_embed" in free(plain)
    places = ["networks.0", "networks.1", "networks.2", "router"]
    assert free(model) == {f"{place}.{name}" for place in places for name in free(plain)}


# Files


def test_a_file_rebuilds_the_mixture(model: Classifier, batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    model = model.float().eval()
    save_model(model, tmp_path / "m.safetensors")
    own = convolutions() if model.recipe is None else None
    found = load_model(tmp_path / "m.safetensors", own)
    assert same(dict(found.state_dict()), dict(model.state_dict()))
    assert torch.equal(found(batch[0].float()), model(batch[0].float()))
    assert not found.training
    with pytest.raises(UserError, match="does not fit"):
        load_model(tmp_path / "m.safetensors", mixed(vit(depth=1)).float())


def test_experts_alone_are_what_the_first_network_lacks(
    model: Classifier, batch: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    model = model.float().eval()
    save_experts(model, tmp_path / "e.safetensors")
    fresh = vit() if model.recipe else convolutions()
    fresh.backbone.load_state_dict(mixture_in(model).networks[0].state_dict())
    load_experts(fresh, tmp_path / "e.safetensors")
    assert torch.equal(fresh.eval()(batch[0].float()), model(batch[0].float()))
    assert len(expert_layers(fresh)) == 1
    _, tensors = rome.models.read_tensors(tmp_path / "e.safetensors")
    assert sum(t.numel() for t in tensors.values() if t.is_floating_point()) >= cost.parameters(model)["experts"]
    assert {name.split(".")[1] for name in tensors} == {"networks", "router"}
    assert not any(name.startswith("backbone.networks.0.") for name in tensors)


# Training the experts


def test_every_expert_meets_its_own_threat_alone(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    mixture = mixture_in(model)
    calls = []
    for network in mixture.networks:
        opened = recorded(network)
        calls.append((opened, opened.__enter__()))
    with recorded(mixture.router) as router:
        outcome = MORE().loss(stage_of(model), x, y)
    for opened, _ in calls:
        opened.__exit__(None, None, None)
    assert router.forwards == []
    assert outcome.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    for p, (_, seen) in enumerate(calls):
        assert [len(images) for images in seen.forwards] == [6] * 4, "three steps of its own attack, then it trains"
        images = (seen.forwards[-1] * model.std + model.mean).clamp(0, 1)
        inside = [bool(threat.contains(images, x).all()) for threat in BUDGETS]
        assert inside[p]
        assert sum(inside) == 1, "no image is allowed by another threat too"


def test_an_experts_gradient_is_that_of_a_lone_network(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    lone = [Classifier(copy.deepcopy(network), (0,), (1,)) for network in mixture_in(model).networks]
    outcome = MORE().loss(stage_of(model), x, y)
    outcome.loss.backward()
    noise, total = stream(0, "attack"), 0.0
    for p, network in enumerate(lone):
        network.mean, network.std = model.mean, model.std
        images = PGD(steps=3)(network, x, y, BUDGETS[p], generator=noise)
        logits = network(images)
        loss = F.cross_entropy(logits, y)
        loss.backward()
        total += loss.item()
        for (name, own), wanted in zip(
            mixture_in(model).networks[p].named_parameters(), network.backbone.parameters(), strict=True
        ):
            # the loss is float32: 6e-8 of each term of the sums that a gradient is, also where they cancel
            off = (own.grad - wanted.grad).abs().amax()
            assert off <= 1e-5 * max(wanted.grad.abs().amax(), 1e-3), name
        assert torch.equal(outcome.correct[6 * p : 6 * p + 6], logits.argmax(1) == y)
        buffers = mixture_in(model).networks[p].buffers()
        assert all(torch.equal(a, b) for a, b in zip(buffers, network.backbone.buffers(), strict=True))
    assert all(parameter.grad is None for parameter in mixture_in(model).router.parameters())
    assert outcome.loss.item() == pytest.approx(total, rel=1e-5)
    assert outcome.parts["cross_entropy"].item() == pytest.approx(total / 3, rel=1e-5)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A stage an epoch, without random starts."""
    return train(more(**SAME_DRAWS), tmp_path_factory.mktemp("more") / "run")


SAME_DRAWS: dict[str, Any] = {
    "attack": {"kind": "pgd", "steps": 2, "random_start": False},
    "schedule": {"points": [[0, 1], [1, 1]]},
}


def more(**changes: Any) -> rome.Config:
    return tiny(**({"experts": {"kind": "more"}, "method": "more"} | changes))


@pytest.mark.parametrize("p", range(3))
def test_the_first_stage_is_adversarial_training_of_lone_networks(p: int, run: Run, tmp_path: Path) -> None:
    """And the second stage does not touch what it made, to the last bit, the classifiers apart."""
    threat = run.config.threats[p].dump()
    lone = weights(train(tiny(experts=None, epochs=1, threats=[threat], **SAME_DRAWS), tmp_path / "lone").folder)
    found = weights(run.folder)
    for name, tensor in lone.items():
        own = found[name.replace("backbone.", f"backbone.networks.{p}.")]
        assert torch.equal(own, tensor) == (not name.startswith("backbone.head.")), name


# Training the gate


def test_the_second_stage_moves_gate_and_classifiers_alone(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    """Also with moments of the first stage, weight decay, BatchNorm and dropout."""
    method, optimizer = MORE(), AdamW(lr=1e-2, weight_decay=5).build(model)
    states = []
    for stage in (1, 1, 2, 2, 2):
        model.train()  # as the loop does when an epoch starts
        method.loss(stage_of(model, stage=stage), *batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        states.append({name: value.clone() for name, value in model.state_dict().items()})
    experts = {name for name in states[0] if ".networks." in name and not name.endswith("num_batches_tracked")}
    heads = {name for name in experts if ".head." in name or name.split(".")[-2] == "5"}
    gate = {name for name, _ in model.named_parameters() if ".router." in name}
    assert len(heads) == 6
    for name in states[0]:
        first, second = torch.equal(states[0][name], states[1][name]), torch.equal(states[1][name], states[4][name])
        if name in experts:
            assert not first, name
            assert second == (name not in heads), name
        elif name in gate:
            assert first, name
            assert not second, name
    assert not any(module.training for network in mixture_in(model).networks for module in network.modules())
    assert all(module.training for module in mixture_in(model).router.modules())


def test_the_second_stage_is_random_against_the_mixture_itself(model: Classifier, batch: tuple[Tensor, Tensor]) -> None:
    for module in mixture_in(model).router.modules():
        module.train(not isinstance(module, nn.Dropout))
    twin = copy.deepcopy(model)
    with recorded(model) as calls:
        outcome = MORE().loss(stage_of(model, stage=2), *batch)
    for network in mixture_in(twin).networks:
        network.eval()
    with recorded(twin) as expected:
        other = Random().loss(stage_of(twin), *batch)
    assert [len(images) for images in calls.forwards] == [6] * 4
    assert all(torch.equal(a, b) for a, b in zip(calls.forwards, expected.forwards, strict=True))
    assert torch.equal(outcome.loss, other.loss)
    assert sorted(outcome.labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_a_regularizer_trains_the_gate_in_the_second_stage(batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    model = mixed(vit())
    assert set(MORE().loss(stage_of(model, regularizer=Classification()), x, y).parts) == {"cross_entropy"}
    slopes = []
    for gradient in ("backbone", "gates"):
        with recorded(model) as calls:
            loss = Classification(weight=2, gradient=gradient)
            outcome = MORE().loss(stage_of(model, stage=2, regularizer=loss), x, y)
        with record_gates(model) as recorder:
            named = F.cross_entropy(model(calls.forwards[-1]), y)
        w = recorder.gates["backbone"].weights[torch.arange(6), 0, outcome.labels]  # expert p for threat p
        penalty = -2 * w.log().mean()
        torch.testing.assert_close(outcome.parts["regularizer"], penalty.detach())
        router = list(mixture_in(model).router.parameters())
        slopes += [torch.autograd.grad(outcome.loss, router), torch.autograd.grad(named + penalty, router)]
    for of_loss, expected, *same_again in zip(*slopes, strict=True):
        torch.testing.assert_close(of_loss, expected, rtol=1e-5, atol=1e-7)
        for other in same_again:  # nothing that learns stands before the gate
            torch.testing.assert_close(other, of_loss, rtol=1e-5, atol=1e-7)


# Natural epochs


def test_natural_epochs_train_the_first_network_and_all_start_from_it(
    model: Classifier, batch: tuple[Tensor, Tensor]
) -> None:
    mixture, method = mixture_in(model), MORE()
    before = copy.deepcopy(mixture)
    lone = Classifier(copy.deepcopy(mixture.networks[0]), (0,), (1,))
    lone.mean, lone.std = model.mean, model.std
    context = stage_of(model, stage=0, regularizer=Classification(), attack=PGD(steps=0, random_start=False))
    torch.manual_seed(1)  # dropout
    method.loss(context, *batch).loss.backward()
    torch.manual_seed(1)
    F.cross_entropy(lone(batch[0]), batch[1]).backward()
    for own, wanted in zip(mixture.networks[0].parameters(), lone.parameters(), strict=True):
        torch.testing.assert_close(own.grad, wanted.grad)
    assert all(p.grad is None for name, p in mixture.named_parameters() if not name.startswith("networks.0."))
    first = dict(mixture.networks[0].state_dict())
    method.epoch_start(context, 0)
    assert not same(dict(mixture.networks[1].state_dict()), first)
    method.epoch_start(context, 1)
    assert all(same(dict(network.state_dict()), first) for network in mixture.networks)
    head = ("head.", "5.")
    for name, tensor in mixture.router.state_dict().items():
        assert torch.equal(tensor, before.router.state_dict()[name] if name.startswith(head) else first[name]), name


def test_without_natural_epochs_nothing_is_copied(model: Classifier) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    context = stage_of(model)
    context.epochs = range(0, 2)
    MORE().epoch_start(context, 0)
    assert same(dict(model.state_dict()), before)


# Runs


RESUMED = {"epochs": 3, "natural_epochs": 1, "batch_size": 15}
"""Four updates an epoch: natural, experts, gate."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(more(**RESUMED), tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.parametrize("update", rest_slow([6, 10, 2, 4, 8], 2))
def test_a_run_goes_on_in_either_stage_as_if_nothing_had_happened(
    update: int, undisturbed: Run, tmp_path: Path
) -> None:
    def strike(now: int) -> None:
        if now == update:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        train(more(**RESUMED), tmp_path / "run", progress=watched(strike))
    resumed = train(more(**RESUMED), tmp_path / "run", resume=True)
    assert same(weights(resumed.folder), weights(undisturbed.folder))
    assert [line["loss"] for line in resumed.log()] == [line["loss"] for line in undisturbed.log()]


def test_the_log_tells_each_stages_threats(undisturbed: Run) -> None:
    epochs = [line for line in undisturbed.log() if line["event"] == "epoch"]
    assert [set(line["accuracy"]) for line in epochs] == [{"clean"}, {"L1", "L2", "Linf"}, {"L1", "L2", "Linf"}]
    natural, experts, gate = (line["loss"] / line["cross_entropy"] for line in epochs)
    assert (natural, experts, gate) == pytest.approx((1, 3, 1))


@pytest.mark.slow
def test_a_finished_run_is_evaluated_from_its_file(run: Run, tmp_path: Path) -> None:
    report, _ = evaluate_saved(run.folder, n=12, out=tmp_path / "evaluation")
    model, (x, y) = load_model(run.folder), run.config.data.open("test").first(12)
    assert isinstance(mixture_in(model), ModelMixture)
    assert report.clean == (model(x).argmax(1) == y).double().mean()
    assert set(report.robust) == {"L1", "L2", "Linf"}
    assert report.union <= min(report.robust.values()) <= report.clean


def test_cost_is_the_mean_over_both_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs: list[int] = []
    loss, times = MORE.loss, iter([0.5, 0.5, 2.0, 4.0])  # latencies, an update of each stage

    def spy(self: MORE, context: TrainContext, x: Tensor, y: Tensor) -> Any:
        epochs.append(context.epoch)
        return loss(self, context, x, y)

    def in_turn(works: Any, rounds: int, warm_ups: int) -> list[list[float]]:
        totals = []
        for parts in works:
            for work, _ in parts:
                work()
            totals.append([sum(share * next(times) for _, share in parts)])
        return totals

    monkeypatch.setattr(MORE, "loss", spy)
    monkeypatch.setattr(cost, "_in_turn", in_turn)
    config = more(epochs=6, natural_epochs=1, method={"kind": "more", "expert_epochs": 2})
    assert cost.measure(config, repeats=1)["seconds_per_update"] == pytest.approx((2 * 2.0 + 3 * 4.0) / 5)
    assert epochs == [1, 3]


@pytest.mark.parametrize(
    ("expert_epochs", "epochs", "stages"),
    [
        (None, range(40), (range(20), range(20, 40))),
        (20, range(40), (range(20), range(20, 40))),
        (None, range(14, 19), (range(14, 16), range(16, 19))),
        (1, range(2, 9), (range(2, 3), range(3, 9))),
    ],
)
def test_stages(expert_epochs: int | None, epochs: range, stages: tuple[range, range]) -> None:
    assert MORE(expert_epochs=expert_epochs).stages(epochs) == stages


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": None}, "more: it trains experts of kind more, but the model has none; set experts.kind=more"),
        ({"experts": {"kind": "low-rank"}}, "but the model has low-rank; set experts.kind=more"),
        ({"method": "random"}, "random: experts of kind more have a method of their own; set method.kind=more"),
        ({"experts": {"kind": "more", "experts": 4}}, "one expert for each of the 3 threats, not 4; set experts.exp"),
        ({"threats": [{"norm": "L1", "eps": 1}]}, "one expert for each of the 1 threats, not 3; set experts.experts=1"),
        ({"epochs": 1}, "needs epochs for the experts and epochs for the gate, but has 1 .* expert_epochs null"),
        ({"epochs": 4, "natural_epochs": 3}, "but has 1 "),
        ({"method": {"kind": "more", "expert_epochs": 2}}, "but has 2 .* expert_epochs 2; raise epochs"),
        ({"method": {"kind": "more", "expert_epochs": 0}}, "expert_epochs: "),
        ({"experts": {"kind": "more", "rank": 2}}, "unknown key"),
    ],
)
def test_settings_that_do_not_fit_are_refused_when_the_config_is_read(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse(changed(**({"experts": {"kind": "more"}, "method": "more"} | changes)))


def test_the_method_refuses_models_that_do_not_fit() -> None:
    with pytest.raises(UserError, match="this model has none; set experts"):
        MORE().prepare(stage_of(vit()))
    with pytest.raises(UserError, match="each of the 3 threats, not 2"):
        MORE().prepare(stage_of(mixed(vit(), experts=2)))
    MORE().prepare(stage_of(mixed(vit())))


class Wrong(nn.Module):
    """Its last Linear layer is not its classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier, self.other = nn.Linear(64, 10), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x.flatten(1))


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("it holds a socket")


def backbone(*layers: nn.Module) -> Classifier:
    return Classifier(nn.Sequential(*layers), (0.5,), (0.5,))


def headless() -> nn.Module:
    model = vit()
    model.backbone.reset_classifier(0)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no backbone": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), "this Sequential has none; wrap it: rome"),
    "adapted": (lambda: LowRank(experts=2, rank=2).inject(vit()), "has experts already"),
    "twice": (lambda: Networks().inject(vit()), "has experts already"),
    "compiled": (lambda: torch.compile(vit()), "compiled already"),
    "features": (headless, "this VisionTransformer has no classifier"),
    "no Linear": (lambda: backbone(nn.Conv2d(1, 10, 8), nn.Flatten()), "this Sequential has no classifier"),
    "not plain": (lambda: backbone(nn.Flatten(), Uncopyable(64, 10)), "this Sequential has no classifier"),
    "uncopyable": (
        lambda: backbone(nn.Flatten(), Uncopyable(64, 64), nn.Linear(64, 10)),
        "cannot be copied: it holds a socket",
    ),
}


@pytest.mark.parametrize(("build", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_cannot_be_multiplied_are_refused_and_unchanged(
    build: Callable[[], nn.Module], message: str
) -> None:
    model = build()
    before = [(name, id(module)) for name, module in model.named_modules()]
    with pytest.raises(UserError, match=message):
        Networks().inject(model)
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_a_gate_that_does_not_answer_with_a_weight_for_each_expert_is_told() -> None:
    model = Networks().inject(Classifier(Wrong(), (0.5,), (0.5,)))
    with pytest.raises(UserError, match=r"returns \(2, 10\) for 2 images, not 3 weights each"):
        model(torch.rand(2, 1, 8, 8))
