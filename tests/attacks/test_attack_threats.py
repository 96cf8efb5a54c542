"""Threats that bring the attack that searches them: in mixtures, methods, training, validation and evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.contexts import context_of
from helpers.problems import Digits, FixedNoise, recorded
from helpers.tiny_runs import STEPS, Moment, changed, rome, same, tiny, updates, weights, without_times, write_yaml
from rome.attacks import APGD, PGD, Attack, AttackThreat, FastLPA, Fog, ReColorAdv, StAdv
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.evaluation.evaluate import evaluate
from rome.evaluation.run import evaluate_saved
from rome.evaluation.statistics import mcnemar
from rome.methods import Maximum, Method, Random
from rome.models import load_model
from rome.report.explore.explorer import Explorer, open_explorers
from rome.report.subject import attack_all
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.threats import AnyImage, LpBall, Perceptual, PerExample, Threat
from rome.training.setup import train

LINF, L2 = LpBall(norm="Linf", eps=0.1), LpBall(norm="L2", eps=0.4)
STADV = StAdv(steps=3, bound=0.2, lr=0.07, tau=0.01)
FLOW, FOG = AttackThreat(attack=STADV), AttackThreat(attack=Fog(steps=2))
WEAK = StAdv(steps=3, bound=0.03, lr=0.01)
"""Fools a model that was not trained for some images and not for others."""
FEATURES = AttackThreat(attack=FastLPA(steps=2), inside=Perceptual(bound=0.5))
OWN_START = AttackThreat(attack=PGD(steps=2), inside=LpBall(norm="Linf", eps=0.05), label="small")


def network(classes: int = 10) -> nn.Module:
    """Convolutions on gray images in float64, so that attacking in another batch changes no digit that matters."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(6 * 64, classes)
    model = nn.Sequential(*layers)
    model.feature_layers = ("1",)  # type: ignore[assignment]
    return model.double()


@pytest.fixture
def batch(digits: Digits) -> tuple[Tensor, Tensor]:
    """Twelve digits, float64."""
    x, y = digits.train
    return x[:12].double(), y[:12]


# Who searches what


@pytest.mark.parametrize("attack", [PGD(steps=3), APGD(steps=3)], ids=lambda attack: attack.kind)
def test_in_a_mixture_each_example_gets_what_its_attack_alone_gives_it(
    attack: Attack, batch: tuple[Tensor, Tensor]
) -> None:
    """With the same noise; every field of what was found, in the order of the batch."""
    (x, y), model = batch, network()
    threats = (FOG, LINF, FLOW, L2, FEATURES, OWN_START)
    labels = torch.tensor([2, 0, 1, 5, 3, 4, 1, 2, 0, 3, 4, 5])
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)
    mixed = attack.run(model, x, y, PerExample(threats, labels), generator=FixedNoise(noise))
    alone: list[tuple[Attack, Threat]] = [
        (Fog(steps=2), AnyImage()),
        (attack, LINF),
        (STADV, AnyImage()),
        (attack, L2),
        (FastLPA(steps=2), FEATURES),
        (PGD(steps=2), OWN_START),
    ]
    for number, (searcher, threat) in enumerate(alone):
        rows = labels == number
        found = searcher.run(model, x[rows], y[rows], threat, generator=FixedNoise(noise[rows]))
        assert (found.images != x[rows]).flatten(1).any(dim=1).all()
        for whole, part in zip(mixed, found, strict=True):
            torch.testing.assert_close(whole[rows], part, rtol=1e-6, atol=1e-9, equal_nan=True)


def test_lp_balls_still_share_one_batch(batch: tuple[Tensor, Tensor]) -> None:
    """Three steps over the nine examples of both balls, then three over the flow's three."""
    (x, y), model = batch, network()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 2, 2])
    with recorded(model) as calls:
        PGD(steps=3)(model, x, y, PerExample((LINF, FLOW, L2), labels))
    assert [len(images) for images in calls.forwards] == [9] * 3 + [3] * 3


def test_two_threats_of_one_attack_are_searched_together(batch: tuple[Tensor, Tensor]) -> None:
    (x, y), model = batch, network()
    other = FEATURES.model_copy(update={"inside": Perceptual(bound=0.2), "label": "near"})
    with recorded(model) as calls:
        PGD()(model, x, y, PerExample((FEATURES, other), torch.arange(12) % 2))
    assert {len(images) for images in calls.forwards} == {12}


def test_an_attack_on_other_examples_moves_nobodys_random_numbers(batch: tuple[Tensor, Tensor]) -> None:
    (x, y), model, labels = batch, network(), torch.arange(12) % 2
    for other in (FLOW, FOG, OWN_START):
        together = PGD(steps=2)(model, x, y, PerExample((LINF, other), labels), generator=stream(3, "attack"))
        without = PGD(steps=2)(model, x, y, PerExample((LINF, L2), labels), generator=stream(3, "attack"))
        torch.testing.assert_close(together[labels == 0], without[labels == 0], rtol=0, atol=1e-9)


def test_processes_draw_alike_where_one_has_no_lp_example(batch: tuple[Tensor, Tensor]) -> None:
    """The second call's starts show whether both streams moved by as much in the first."""
    (x, y), model = batch, network()
    first, second = torch.tensor([1] * 6 + [0] * 6), torch.arange(12) % 2
    parts: dict[int, list[Tensor]] = {1: [], 2: []}
    for world in (1, 2):
        for rank in range(world):
            own, source = slice(rank * 12 // world, (rank + 1) * 12 // world), stream(0, "a", rank=rank, world=world)
            for labels in (first, second):
                mixture = PerExample((LINF, FOG), labels[own])
                images = PGD(steps=1)(model, x[own], y[own], mixture, generator=source)
            parts[world].append(images)
    torch.testing.assert_close(torch.cat(parts[2]), torch.cat(parts[1]), rtol=0, atol=1e-9)


def test_under_autocast_flows_and_colours_are_not_rounded() -> None:
    """A model without products gives the same images with and without bf16, bit for bit."""

    class Elementwise(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            flat = x.flatten(1)
            ramp = torch.linspace(-1, 1, flat.shape[1])
            return torch.stack([(flat * ramp).sum(1), (flat * ramp.flip(0).square()).sum(1)], dim=1)

    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    y, model = torch.tensor([0, 1, 0, 1]), Elementwise()
    threats = (LINF, FLOW, AttackThreat(attack=ReColorAdv(steps=2, lr=0.01)), FOG)
    plain = PGD(steps=2)(model, x, y, PerExample(threats, torch.arange(4)))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = PGD(steps=2)(model, x, y, PerExample(threats, torch.arange(4)))
    assert rounded.dtype == torch.float32
    assert torch.equal(plain, rounded)


def test_what_is_allowed_is_what_the_place_allows(batch: tuple[Tensor, Tensor]) -> None:
    x, _ = batch
    inside, outside = (x + 0.04).clamp(max=1), x + 0.2 * (x > 0.9)
    ball = LpBall(norm="Linf", eps=0.05)
    assert OWN_START.contains(inside, x).all()
    assert not OWN_START.contains((x - 0.06).abs(), x).any()
    assert torch.equal(OWN_START.project(outside, x), ball.project(outside, x))
    assert FLOW.contains((1 - x), x).all()
    assert not FLOW.contains(outside, x).all()
    torch.testing.assert_close(FLOW.size(1 - x, x), (1 - 2 * x).abs().flatten(1).amax(1))


def test_a_threat_is_named_by_attack_and_steps_and_reads_back() -> None:
    assert [threat.name for threat in (FLOW, FOG, FEATURES, OWN_START)] == ["stadv-3", "fog-2", "fast-lpa-2", "small"]
    for threat in (FLOW, FOG, FEATURES, OWN_START):
        assert Threat.model_validate(threat.dump()) == threat
    config = tiny(threats=[{"norm": "l2", "eps": 0.4}, {"kind": "attack", "attack": "stadv"}])
    assert config.threats == (L2, AttackThreat(attack=StAdv()))


# Methods


def test_random_gives_each_of_four_threats_its_share(batch: tuple[Tensor, Tensor]) -> None:
    model, still = network(), {"steps": 0}
    threats = (LINF, L2, *(AttackThreat(attack=each) for each in (StAdv(**still), Fog(**still))))
    for n, world in ((12, 1), (3, 2), (5, 2)):
        for seed in range(4):
            x, y = torch.zeros(n, 1, 8, 8, dtype=torch.float64), torch.zeros(n, dtype=torch.int64)
            settings = [context_of(model, threats=threats, rank=rank, world=world, seed=seed) for rank in range(world)]
            labels = torch.cat([Random().loss(context, x, y).labels for context in settings])
            counts = torch.bincount(labels, minlength=4)
            assert counts.max() - counts.min() <= 1


def test_max_takes_the_flow_where_its_loss_is_the_largest_and_the_ball_elsewhere() -> None:
    """f = (s, -s) with s = w x. On a flat image a flow moves nothing that w sees, and Linf wins; beside an edge that w
    compares, a flow of most of a pixel wins over a ball of 0.01."""
    w = torch.zeros(8, 8, dtype=torch.float64)
    w[2:6, 3], w[2:6, 4] = 1.0, -1.0

    class Edge(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            s = (x[:, 0] * w).sum(dim=(1, 2))
            return torch.stack([s, -s], dim=1)

    x = torch.full((2, 1, 8, 8), 0.5, dtype=torch.float64)
    x[1, :, :, :4], x[1, :, :, 4:] = 0.9, 0.1
    y, model, small = torch.tensor([0, 0]), Edge(), LpBall(norm="Linf", eps=0.01)
    flow = AttackThreat(attack=StAdv(steps=5, bound=0.2, lr=0.1, tau=0))
    outcome = Maximum().loss(context_of(model, threats=(small, flow)), x, y)
    moved = STADV.model_copy(update={"steps": 5, "lr": 0.1, "tau": 0})(model, x, y, AnyImage())
    by_flow = F.cross_entropy(model(moved), y, reduction="none")
    s = (x[:, 0] * w).sum(dim=(1, 2)) - 0.01 * w.abs().sum()  # the ball's optimum, which PGD reaches
    by_ball = F.softplus(-2 * s)
    assert by_flow[0] < by_ball[0]
    assert by_flow[1] > by_ball[1] + 1e-3
    assert float(outcome.loss) == pytest.approx(float(by_ball[0] + by_flow[1]) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ({"kind": "random"}, ["Linf", "L2", "stadv-3"]),
        ({"kind": "eat", "threats": ["Linf", "stadv-3"]}, ["Linf", "stadv-3"]),
        ({"kind": "ramp", "source": "stadv-3", "target": "L2"}, ["stadv-3", "L2"]),
    ],
)
def test_any_threat_may_be_named_where_threats_are_named(method: dict[str, Any], trained: list[str]) -> None:
    config = tiny(threats=[LINF.dump(), L2.dump(), FLOW.dump()], method=method, attack__steps=1)
    assert [threat.name for threat in config.method.training_threats(config.threats, config.attack)] == trained


def test_e_at_counts_what_the_threats_own_attack_fools(batch: tuple[Tensor, Tensor]) -> None:
    (x, y), model = batch, network()
    y = model(x).argmax(1)
    method = Method.of_kind("eat")(threats=("Linf", "stadv-3"), per="example")
    context = context_of(model, threats=(LINF, AttackThreat(attack=WEAK)))
    method.prepare(context)
    labels = method.loss(context, x, y).labels
    method.update_end(context)
    flow = labels == 1
    fooled = model(WEAK(model, x[flow], y[flow], AnyImage())).argmax(1) != y[flow]
    state = method.state()
    assert state["seen"] == [int((~flow).sum()), int(flow.sum())]
    assert state["robust"][1] == int((~fooled).sum())
    assert 0 < int(fooled.sum()) < len(fooled)


# What is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attack": "sparsefool"}, "sparsefool cannot define a threat to train on: it has no budget"),
        (
            {"attack": {"kind": "corruption", "type": "fog", "severity": 1}},
            "corruption cannot define a threat.* fixed change",
        ),
        (
            {"attack": "square", "inside": {"norm": "l2", "eps": 1}},
            "square cannot define a threat.* made for evaluation",
        ),
        ({"attack": "fast-lpa"}, "fast-lpa searches inside perceptual threats, not AnyImage; give it a threat"),
        ({"attack": "stadv", "inside": {"norm": "l2", "eps": 1}}, "stadv bounds its perturbation itself"),
        ({"attack": "fast-lpa", "inside": {"kind": "perceptual", "bound": 1, "features": "x"}}, "or train with method"),
        ({"attack": "fog", "label": "two words"}, "label"),
        ({}, "attack: is missing"),
    ],
)
def test_threats_that_cannot_be_trained_on_are_refused_with_their_place(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=rf"^threats\.1.*{message}"):
        tiny(threats=[LINF.dump(), {"kind": "attack", **settings}])


@pytest.mark.parametrize("threat", [AnyImage(), Perceptual(bound=0.5)])
def test_a_bare_threat_is_told_how_to_name_its_attack(threat: Threat) -> None:
    with pytest.raises(UserError, match=r"cannot be trained on as such.*\{kind: attack, attack: \{kind: stadv\}\}"):
        tiny(threats=[threat.dump()])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("msd", "msd: it takes steps in Lp norms, but stadv-3 is not an Lp ball"),
        ("eat", r"eat trains on L1, which is missing from threats \(there are Linf, stadv-3\)"),
        ("ramp", r"ramp trains on L1, which is missing from threats \(there are Linf, stadv-3\)"),
        ("more", "it trains experts of kind more"),
    ],
)
def test_methods_refuse_what_they_cannot_use(method: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(threats=[LINF.dump(), FLOW.dump()], method=method)


def test_an_experts_regularizer_counts_such_a_threat_as_one_more() -> None:
    experts = {"experts": 2, "rank": 2, "regularizer": {"kind": "classification"}}
    tiny(threats=[LINF.dump(), FLOW.dump()], experts=experts)
    with pytest.raises(UserError, match="one expert for each of the 3 threats"):
        tiny(threats=[LINF.dump(), L2.dump(), FLOW.dump()], experts=experts)


def test_images_of_other_channels_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    config = tiny(threats=[LINF.dump(), {"kind": "attack", "attack": "recoloradv"}], natural_epochs=1)
    with pytest.raises(UserError, match=r"threats: recoloradv-20: recoloradv changes colours.*3 channels, not 1"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Runs

MIXED: dict[str, Any] = {"threats": [LINF.dump(), L2.dump(), FLOW.dump(), FOG.dump()], "attack__steps": 1}
VALIDATED: dict[str, Any] = {**MIXED, "validation": {"n": 4, "steps": 2}, "natural_epochs": 1, "epochs": 3}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(**VALIDATED), tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(undisturbed: Run, tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed(name="run", **VALIDATED))
    run = Run(tmp_path / "run")
    moment = Moment("update", 2 * STEPS - 2)
    ended = rome("train", config, "--out", run.folder, logs=tmp_path / "logs", at=moment).wait()
    assert ended.code != 0
    assert not run.finished
    train(tiny(name="run", **VALIDATED), run.folder, resume=True)
    assert same(weights(run.folder), weights(undisturbed.folder))
    assert without_times(run.log()) == without_times(undisturbed.log())


def test_natural_epochs_come_first_and_then_every_threat_is_trained_on(undisturbed: Run) -> None:
    seen = [set(line["accuracy"]) for line in updates(undisturbed.log())]
    assert seen[:STEPS] == [{"clean"}] * STEPS
    assert all(names == {"Linf", "L2", "stadv-3", "fog-2"} for names in seen[STEPS:])


def test_validation_attacks_each_threat_with_its_own_attack(undisturbed: Run) -> None:
    last = [line for line in undisturbed.log() if line["event"] == "validation"][-1]
    assert list(last["robust"]) == ["Linf", "L2", "stadv-3", "fog-2"]
    assert last["union"] <= min(last["robust"].values())


@pytest.mark.parametrize("suite", ["lp", {"kind": "apgd", "iterations": 5}, {"kind": "autoattack", "iterations": 5}])
def test_a_suite_gives_such_a_threat_its_own_column(suite: Any, digits: Digits) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    x, _ = digits.test
    x = x[:20]
    y = model(x).argmax(1)
    if isinstance(suite, dict) and suite["kind"] == "autoattack":
        suite = {**suite, "square_queries": 20}
    report = evaluate(model, x, y, threats=[LINF, AttackThreat(attack=WEAK)], suite=suite)
    assert report.cases == ("clean", "Linf", "stadv-3")
    column = report.correct[:, 2]
    assert column.tolist() == WEAK.run(model, x, y, AnyImage()).robust.tolist()
    assert 0 < column.mean() < 1
    assert report.union == pytest.approx((report.correct[:, 1] & column).mean())
    (told,) = (warning for warning in report.warnings if warning["case"] == "stadv-3")
    assert "searched only by stadv" in told["message"]


def test_a_finished_run_is_evaluated_drawn_and_explored_under_its_threats(undisturbed: Run) -> None:
    report, _ = evaluate_saved(undisturbed.folder)
    assert report.cases == ("clean", "Linf", "L2", "stadv-3", "fog-2")
    (explorer,) = open_explorers([undisturbed.folder], "cpu")
    assert isinstance(explorer, Explorer)
    image, label = explorer.test_image(0)
    answer = explorer.look(image, "stadv-3", label=label)
    x, y = image[None], torch.tensor([label])
    expected = STADV(explorer.subject.model, x, y, AnyImage())
    torch.testing.assert_close(answer.perturbed, expected[0])
    assert answer.threat == FLOW
    assert answer.size == pytest.approx(float((expected - x).abs().max()))
    drawn = attack_all(explorer.subject.model, x, y, explorer.subject.threats)
    torch.testing.assert_close(drawn["stadv-3"], expected)


CNN = """
import torch
from torch import nn

def build(num_classes):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, num_classes),
    )
"""


@pytest.mark.slow
def test_training_on_stadv_makes_robust_against_stadv(tmp_path: Path) -> None:
    """Against natural training of the same length, with other steps than in training."""
    (tmp_path / "own.py").write_text(CNN)
    flow = {"kind": "stadv", "steps": 4, "bound": 0.1, "lr": 0.04}
    settings: dict[str, Any] = {
        "data": {"kind": "digits", "train_limit": 1200},
        "model": {"name": f"{tmp_path / 'own.py'}:build"},
        "threats": [{"kind": "attack", "attack": flow}],
        "experts": None,
        "batch_size": 32,
        "optimizer": {"kind": "adamw", "lr": 4e-3},
        "epochs": 7,
    }
    robust: dict[int, Tensor] = {}
    for natural in (1, 7):
        config: Config = tiny(**settings, natural_epochs=natural)
        model = load_model(train(config, tmp_path / str(natural)).model_file).eval()
        x, y = config.data.open("test").first(100)
        found = StAdv(steps=20, bound=0.1, lr=0.02).run(model, x, y, AnyImage())
        robust[natural] = found.robust
    gained, lost = int((robust[1] & ~robust[7]).sum()), int((robust[7] & ~robust[1]).sum())
    assert gained > lost
    assert mcnemar(gained, lost) < 0.01, "more than chance explains"
