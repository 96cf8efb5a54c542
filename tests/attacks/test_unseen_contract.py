"""SparseFool, patch, StAdv, ReColorAdv and GMA keep the contract of attacks; no example depends on its batch mates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.problems import recorded, rest_slow
from helpers.small_models import grow, tiny_vit
from rome.attacks import GMA, JPEG, Attack, Elastic, Fog, Gabor, Patch, ReColorAdv, Snow, SparseFool, StAdv
from rome.attacks.free import FreeAttack, LastIterate
from rome.attacks.suites.base import Case, Suite
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.evaluation.evaluate import evaluate
from rome.experts import add_experts
from rome.runs.config import Config
from rome.threats import AnyImage, LpBall, PerExample, Threat

ATTACKS: dict[str, Attack] = {
    attack.kind: attack
    for attack in (SparseFool(), Patch(steps=20), StAdv(steps=20), ReColorAdv(steps=5, lr=0.004), GMA(steps=20))
}


class Block(nn.Module):
    """A residual block of a ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.other = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.other(self.two(F.relu(self.norm(self.one(x))))))


def resnet() -> nn.Module:
    """A small ResNet whose BatchNorms have seen data."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), Block(12), nn.Dropout(0.3), Block(12),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 6),
    )  # fmt: skip
    for _ in range(20):
        model(torch.rand(16, 3, 16, 16))
    model[-1].weight.data *= 20  # answers that depend on the image
    return model.eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    model = grow(add_experts(tiny_vit(img_size=16, patch_size=4), experts=3, rank=2))
    model.head.weight.data *= 100
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet": resnet, "vit": vit}


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    return ATTACKS[request.param]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return MODELS[request.param]()


def images(dtype: torch.dtype = torch.float64, n: int = 6) -> Tensor:
    coarse = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return F.interpolate(coarse, size=16, mode="bilinear").clamp(0, 1).to(dtype)


def threat_of(attack: Attack) -> Threat:
    return AnyImage(label="any") if isinstance(attack, FreeAttack) else LpBall(norm="Linf", eps=8 / 255)


def test_an_example_does_not_depend_on_its_batch_mates(attack: Attack, model: nn.Module) -> None:
    """In float64, and few steps of ReColorAdv: its roughness, sqrt(d^2 + 1e-10), makes each step amplify differences by
    up to lr / 1e-5 = 400."""
    if isinstance(attack, ReColorAdv):
        attack = attack.model_copy(update={"steps": 3})
    model, x, threat = model.double(), images(), threat_of(attack)
    y = model(x).argmax(1)
    y[4] = (y[4] + 1) % 6  # wrong from the start
    whole = attack.run(model, x, y, threat)
    for rows in ([2], [5, 1], [3, 0, 4]):
        alone = attack.run(model, x[rows], y[rows], threat)
        for part, other in zip(whole, alone, strict=True):
            torch.testing.assert_close(other.double(), part[rows].double(), rtol=0, atol=1e-5)


def test_the_result_is_what_the_contract_says(attack: Attack, model: nn.Module) -> None:
    x, threat = images(torch.float32), threat_of(attack)
    y = model(x).argmax(1)
    found = attack.run(model, x, y, threat)
    assert found.images.shape == x.shape
    assert found.images.dtype == x.dtype
    assert threat.contains(found.images, x).all()
    logits = model(found.images)
    assert torch.equal(found.robust, logits.argmax(1) == y)
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, y, reduction="none"), rtol=1e-4, atol=1e-5)
    assert torch.equal(found.adversarial, found.images)
    assert found.loss.mean() > F.cross_entropy(model(x), y)
    assert not found.images.requires_grad


def test_nothing_is_left_behind(attack: Attack, model: nn.Module) -> None:
    x, y = images(torch.float32), torch.arange(6) % 6
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    wanted = [p.requires_grad for p in model.parameters()]
    first = attack(model, x, y, threat_of(attack))
    with torch.inference_mode():
        again = attack(model, x, y, threat_of(attack))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["patch", "gma"])
def test_seeds_decide_where_there_is_chance(kind: str) -> None:
    attack, model, x = ATTACKS[kind], resnet(), images(torch.float32)
    y = model(x).argmax(1)
    results = [attack(model, x, y, threat_of(attack), generator=stream(seed, "attack")) for seed in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("kind", ["sparsefool", "stadv", "recoloradv"])
def test_the_others_draw_nothing(kind: str) -> None:
    attack, model, x = ATTACKS[kind], resnet(), images(torch.float32)
    y = model(x).argmax(1)
    results = [attack(model, x, y, threat_of(attack), generator=stream(seed, "attack")) for seed in (0, 1)]
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize("kind", [kind for kind, attack in ATTACKS.items() if isinstance(attack, FreeAttack)])
def test_balls_are_refused_by_attacks_with_a_bound_of_their_own(kind: str) -> None:
    x, y = images(), torch.arange(6)
    mixture = PerExample((AnyImage(label="any"), LpBall(norm="L2", eps=1)), torch.arange(6) % 2)
    for threat in (LpBall(norm="L2", eps=1), mixture):
        with pytest.raises(UserError, match=rf"{kind} bounds its perturbation itself.*AnyImage\(label='{kind}'\).*Lp"):
            ATTACKS[kind](resnet().double(), x, y, threat)


@pytest.mark.parametrize("bound", [0.999, 1.0])
def test_a_result_outside_of_the_own_bound_is_a_bug(bound: float) -> None:
    attack, size = StAdv(), torch.tensor([0.3, 1.0])
    if bound == 1.0:
        attack.check(size, bound)
        return
    with pytest.raises(AssertionError, match=r"stadv left its bound on 1 of 2 examples: a bug"):
        attack.check(size, bound)
    with pytest.raises(FloatingPointError, match=r"not finite"):
        attack.check(torch.tensor([0.3, torch.nan]), bound)


STEPPING: list[LastIterate] = [
    Fog(step_size=0.2), Snow(step_size=0.1), Gabor(step_size=0.2), Elastic(step_size=0.2), JPEG(step_size=0.05),
    Patch(size=3, step_size=0.05), StAdv(lr=0.02), ReColorAdv(lr=0.02),
]  # fmt: skip


@pytest.mark.parametrize("attack", rest_slow({f"{i}-{each.kind}": each for i, each in enumerate(STEPPING)}, 8))
def test_who_stops_has_the_first_wrong_image_and_the_others_the_last(attack: LastIterate, model: nn.Module) -> None:
    """The iterates are the results of fewer steps. Who is done costs no more passes."""
    model, x, threat, steps = model.double(), images(n=16), AnyImage(label="any"), 4
    logits = model(x)
    close = (logits.topk(2, dim=1).values @ torch.tensor([1.0, -1.0]).double()).argsort()
    x, y = x[close[:8]], logits.argmax(1)[close[:8]]
    y[3] = (y[3] + 1) % 6  # wrong from the start, as its transform changes little
    iterates = [attack.model_copy(update={"steps": n}).run(model, x, y, threat) for n in range(steps + 1)]
    wrong = torch.stack([~each.robust for each in iterates])
    first = torch.where(wrong.any(dim=0), wrong.int().argmax(dim=0), steps)
    with recorded(model) as calls:
        found = attack.model_copy(update={"steps": steps, "stop": True}).run(model, x, y, threat)
    assert torch.equal(found.robust, ~wrong.any(dim=0))
    expected = torch.stack([each.images for each in iterates])[first, torch.arange(8)]
    torch.testing.assert_close(found.images, expected, rtol=0, atol=1e-7)
    needed = [int((first >= n).sum()) for n in range(steps)]
    assert min(needed) < 8, "a test of nothing: nobody is done before the end"
    assert [len(batch) for batch in calls.forwards] == [*(n for n in needed if n), 8]


def test_settings_come_from_a_config_and_go_back(attack: Attack) -> None:
    threats = [threat_of(attack).dump()]
    settings = {"model": {"name": "x"}, "data": {"kind": "digits"}, "attack": attack.dump(), "threats": threats}
    config = Config.model_validate(settings)
    assert config.attack == attack
    assert type(attack).model_validate(attack.dump()) == attack


class Unseen(Suite):
    """Every free attack of this file under its own name."""

    kind = "test-unseen"

    def cases(self, threats: object, classes: int) -> list[Case]:
        free = {kind: attack for kind, attack in ATTACKS.items() if isinstance(attack, FreeAttack)}
        return [Case(name=kind, threat=AnyImage(label=kind), attacks=(attack,)) for kind, attack in free.items()]


class Exact(nn.Module):
    """A model of float32 images that computes in float64, so that no verdict hangs on a batch's rounding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x.double())


def test_an_evaluation_has_a_column_for_each(tmp_path: Path) -> None:
    model, x = Exact(resnet()).eval(), images(torch.float32, n=8)
    y = model(x).argmax(1)
    report = evaluate(model, x, y, threats=[AnyImage(label="l0")], suite=Unseen(), batch_size=3, out=tmp_path / "e")
    assert set(report.robust) == {kind for kind, attack in ATTACKS.items() if isinstance(attack, FreeAttack)}
    for kind, accuracy in report.robust.items():
        draws = torch.Generator().manual_seed(0)  # the evaluation's
        alone = ATTACKS[kind].run(model, x, y, AnyImage(label=kind), generator=draws).robust
        assert accuracy == alone.double().mean().item()
