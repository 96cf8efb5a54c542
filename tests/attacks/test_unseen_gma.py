"""The gating misrouting attack: its objective by the letter, every kind of gate, plain PGD without gates."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.problems import Digits, Problem, rest_slow
from helpers.small_models import tiny_swin, tiny_vit
from rome.attacks import GMA, PGD
from rome.attacks.lp.gma import answer, misrouting
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.experts import (
    Adapters,
    DualScale,
    Experts,
    FeedForward,
    Gate,
    Global,
    Local,
    LowRank,
    Uniform,
    add_experts,
    expert_layers,
    record_gates,
)
from rome.experts.more import Networks
from rome.models import Classifier
from rome.threats import AnyImage, LpBall, PerExample

LINF = LpBall(norm="Linf", eps=8 / 255)


def disturbed(model: nn.Module) -> nn.Module:
    """Experts and gates as after some training, float64: outputs differ from the plain model's, gates have opinions."""
    g = torch.Generator().manual_seed(0)
    for layer in expert_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name not in ("weight", "bias") and not name.startswith("projection"):
                noise = torch.randn(parameter.shape, generator=g)
                parameter.data = parameter.data + (1.0 if name.startswith("gate") else 0.2) * noise
    return model.double().eval()


def vit(kind: type[Experts] = LowRank, gate: Gate | None = None) -> nn.Module:
    torch.manual_seed(0)
    settings = {} if kind is FeedForward else {"rank": 2}
    kind = kind(experts=3, gate=gate or DualScale(), regularizer=None, **settings)
    return disturbed(kind.inject(tiny_vit(img_size=16)))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 9, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(576, 10),
    )  # fmt: skip
    return disturbed(add_experts(model, layers="3", experts=3, rank=2))


def swin() -> nn.Module:
    """Windows of 3 on 8x8 and 4x4 tokens: padded, so that not every position is a token."""
    torch.manual_seed(0)
    return disturbed(add_experts(tiny_swin(window=3), experts=3, rank=2))


def more() -> nn.Module:
    """Whole networks under one gate an image."""
    torch.manual_seed(0)
    return disturbed(Networks(experts=3).inject(Classifier(tiny_vit(img_size=16), (0.5,) * 3, (0.5,) * 3)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "low-rank": vit,
    "local": lambda: vit(gate=Local()),
    "image-level": lambda: vit(gate=Global()),
    "uniform": lambda: vit(gate=Uniform()),
    "adapters": lambda: vit(Adapters),
    "feed-forward": lambda: vit(FeedForward),
    "convolutions": cnn,
    "windows": swin,
    "networks": more,
}


@pytest.fixture(params=MODELS)
def gated(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A model with gates of some kind, frozen, and three images."""
    return MODELS[request.param]().requires_grad_(False), images(side=32 if request.param == "windows" else 16)


def images(n: int = 3, side: int = 16) -> Tensor:
    """Random images in float64."""
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def literal_gain(model: nn.Module, x: Tensor, y: int, rarest: dict[str, Tensor]) -> Tensor:
    """The objective for one image (1, C, H, W), gate by gate."""
    with record_gates(model) as recorder:
        logits = model(x)
    total = torch.zeros((), dtype=x.dtype)
    for name, gates in recorder.gates.items():
        tokens = gates.weights[0]
        total = total + sum(-tokens[i, k].log() for i, k in enumerate(rarest[name])) / len(tokens)
    return F.cross_entropy(logits, torch.tensor([y])) - total / len(recorder.gates)


def literal_gma(model: nn.Module, x: Tensor, y: int, start: Tensor, steps: int) -> Tensor:
    with torch.no_grad(), record_gates(model) as recorder:
        model(x)
    rarest = {name: gates.weights[0].argmin(dim=1) for name, gates in recorder.gates.items()}
    x_adv = start
    for _ in range(steps):
        x_adv = x_adv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(literal_gain(model, x_adv, y, rarest), x_adv)
        x_adv = x_adv.detach() + 2 / 255 * gradient.sign()
        x_adv = torch.minimum(torch.maximum(x_adv, x - 8 / 255), x + 8 / 255).clamp(0, 1)
    return x_adv.detach()


def test_a_batch_is_attacked_as_its_images_one_by_one_by_the_letter(gated: tuple[nn.Module, Tensor]) -> None:
    model, x = gated
    y = model(x).argmax(1)
    found = GMA(steps=4)(model, x, y, LINF)
    u = stream(0, "attack").by_image(x, x.shape[1:]).double()
    start = (x + 8 / 255 * (2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6)).clamp(0, 1)
    for i in range(len(x)):
        expected = literal_gma(model, x[i : i + 1], int(y[i]), start[i : i + 1], 4)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=0, atol=1e-9)


def test_the_gradient_of_the_gate_term_is_that_of_finite_differences(gated: tuple[nn.Module, Tensor]) -> None:
    model, x = gated
    with torch.no_grad():
        targets = [gates.weights.argmin(-1, keepdim=True) for gates in answer(model, x)[1]]

    def term(at: Tensor) -> Tensor:
        logits, gates = answer(model, at)
        return misrouting(gates, targets, logits) + 0 * logits.sum(1)  # of uniform gates nothing depends on the image

    at = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(term(at).sum(), at)
    g = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = torch.randn(x.shape, generator=g, dtype=torch.float64)
        step = 1e-6 * direction
        with torch.no_grad():
            slope = (term(x + step) - term(x - step)) / 2e-6
        torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slope, rtol=1e-4, atol=1e-7)


def rare_share(model: nn.Module, x: Tensor, x_adv: Tensor) -> float:
    """Mean gate weight, on ``x_adv``, of the experts that ``x`` uses least."""
    clean, moved = (answer(model, part)[1] for part in (x, x_adv))
    shares = [
        after.weights.gather(-1, before.weights.argmin(-1, keepdim=True)).mean()
        for before, after in zip(clean, moved, strict=True)
    ]
    return torch.stack(shares).mean().item()


def test_it_routes_tokens_to_the_experts_the_clean_image_avoids() -> None:
    model, x = vit().requires_grad_(False), images(8)
    y = model(x).argmax(1)
    plain, ours = (rare_share(model, x, GMA(weight=weight)(model, x, y, LINF)) for weight in (0.0, 1.0))
    assert ours > 1.2 * plain


def test_it_raises_the_loss_and_its_objective_with_steps_and_radius() -> None:
    model, x = vit().requires_grad_(False), images(8)
    y = model(x).argmax(1)
    with torch.no_grad():
        targets = [gates.weights.argmin(-1, keepdim=True) for gates in answer(model, x)[1]]

    def gain(attack: GMA, eps: float) -> float:
        logits, gates = answer(model, attack(model, x, y, LpBall(norm="Linf", eps=eps)))
        return (F.cross_entropy(logits, y) - misrouting(gates, targets, logits).mean()).item()

    by_steps = [gain(GMA(steps=steps), 8 / 255) for steps in (0, 2, 5, 20)]
    by_radius = [gain(GMA(), eps) for eps in (0, 2 / 255, 8 / 255, 24 / 255)]
    assert all(b > a for a, b in itertools.pairwise(by_steps))
    assert all(b > a for a, b in itertools.pairwise(by_radius))
    assert torch.equal(GMA()(model, x, y, LpBall(norm="Linf", eps=0)), x)


def test_without_gates_or_weight_it_is_pgd_on_the_cross_entropy(problem: Problem) -> None:
    plain, x, y = problem(8)
    pgd = PGD(steps=20, step_size=2 / 255, random_start=False)
    assert torch.equal(GMA(random_start=False)(plain, x, y, LINF), pgd(plain, x, y, LINF))
    assert torch.equal(GMA(random_start=False)(lambda x: plain(x), x, y, LINF), pgd(plain, x, y, LINF))
    gated, x = vit().requires_grad_(False), images()
    y = gated(x).argmax(1)
    assert torch.equal(GMA(random_start=False, weight=0)(gated, x, y, LINF), pgd(gated, x, y, LINF))


def test_a_mean_over_blocks_weighs_the_gates_of_a_vit_twice() -> None:
    """Two gated layers in each block add up (the paper's 1/L read with L blocks); one in each makes no difference."""
    gated, x = vit().requires_grad_(False), images()
    y = gated(x).argmax(1)
    blocks, twice = GMA(mean_over="blocks", steps=3), GMA(weight=2, steps=3)
    assert torch.equal(blocks(gated, x, y, LINF), twice(gated, x, y, LINF))
    assert not torch.equal(blocks(gated, x, y, LINF), GMA(steps=3)(gated, x, y, LINF))
    lone = MODELS["convolutions"]().requires_grad_(False)
    y = lone(x).argmax(1)
    assert torch.equal(blocks(lone, x, y, LINF), GMA(steps=3)(lone, x, y, LINF))


def test_gradients_that_are_not_finite_are_no_robustness() -> None:
    """Torch's sign of NaN is 0: the start would come back as if nothing could be found."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x).flatten(1).sum(1, keepdim=True).sqrt() + torch.tensor([1.0, 0.0])

    with pytest.raises(FloatingPointError, match="non-finite images for 2 of 2 examples"):
        GMA(steps=1)(Broken(), torch.rand(2, 3, 8, 8), torch.tensor([0, 0]), LINF)


def test_its_start_is_uniform_and_in_the_ball(digits: Digits, digits_model: nn.Module) -> None:
    x, y = (part[:50] for part in digits.test)
    x = 0.2 + 0.6 * x
    delta = GMA(steps=0)(digits_model, x, y, LINF) - x
    assert delta.abs().max() <= 8 / 255 * (1 + 1e-5)
    assert delta.std().item() == pytest.approx(8 / 255 / 3**0.5, rel=0.03)


def test_examples_may_have_radii_of_their_own() -> None:
    model, x = vit().requires_grad_(False), images(4)
    y = model(x).argmax(1)
    radii = (LpBall(norm="Linf", eps=2 / 255), LpBall(norm="Linf", eps=8 / 255))
    found = GMA(steps=3)(model, x, y, PerExample(radii, torch.tensor([0, 1, 1, 0])))
    for threat, rows in zip(radii, ([0, 3], [1, 2]), strict=True):
        alone = GMA(steps=3)(model, x[rows], y[rows], threat)
        torch.testing.assert_close(found[rows], alone, rtol=0, atol=1e-9)


def test_a_model_that_is_being_recorded_is_refused_and_left_as_it_was() -> None:
    model, x = vit().train(), images()
    y = torch.tensor([0, 1, 2])
    with record_gates(model) as recorder:
        with pytest.raises(UserError, match=r"being recorded already: leave the other record_gates first"):
            GMA(steps=1)(model, x, y, LINF)
        assert model.training
        assert all(p.requires_grad for name, p in model.named_parameters() if "projection" not in name)
        model(x)
        assert len(recorder.complete()) == len(expert_layers(model))
    assert all(layer.sink is None for layer in expert_layers(model).values())
    GMA(steps=1)(model, x, y, LINF)
    assert all(layer.sink is None for layer in expert_layers(model).values())


@pytest.mark.slow
@pytest.mark.parametrize("wrap", rest_slow([True, False], 1))
def test_a_compiled_model_is_attacked_like_the_plain_one(wrap: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(2), nn.Linear(16, 8), nn.GELU(), nn.Flatten(), nn.Linear(24, 4))
    plain = disturbed(add_experts(plain, layers="1", experts=3, rank=2))
    compiled = torch.compile(copy.deepcopy(plain), backend="aot_eager") if wrap else copy.deepcopy(plain)
    if not wrap:
        compiled.compile(backend="aot_eager")
    x = images(4, side=4)
    y = plain(x).argmax(1)
    expected = GMA(steps=3)(plain, x, y, LINF)
    torch.testing.assert_close(GMA(steps=3)(compiled, x, y, LINF), expected, rtol=0, atol=1e-12)
    assert (expected - GMA(steps=3, weight=0)(plain, x, y, LINF)).abs().max() > 1e-3


def test_other_threats_are_refused() -> None:
    model, x = vit(), images()
    y = torch.tensor([0, 1, 2])
    for threat, given in ((LpBall(norm="L2", eps=1), "L2"), (AnyImage(label="x"), "AnyImage")):
        with pytest.raises(UserError, match=rf"gma searches inside Linf balls such as .*, not {given}$"):
            GMA()(model, x, y, threat)


def test_defaults_are_the_papers() -> None:
    attack = GMA()
    assert (attack.steps, attack.step_size, attack.weight) == (20, 2 / 255, 1)
    assert isinstance(vit().blocks[0].attn.qkv.gate, type(vit(gate=DualScale()).blocks[0].attn.qkv.gate))
