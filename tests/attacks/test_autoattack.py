"""AutoAttack's parts find what pyautoattack finds, know closed forms, and leave everything as it was."""

import contextlib
import logging
import sys

import numpy as np
import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.autopgd_base import L1_projection
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from helpers.problems import rest_slow
from rome.attacks.base import Attack
from rome.attacks.lp.autoattack import (
    APGDCE,
    APGDT,
    FABT,
    AttackWarning,
    AutoAttackPart,
    Square,
    l1_projection,
    standard_runs,
)
from rome.core.errors import UserError
from rome.threats import DIGITS, LpBall, PerExample


def small_net(classes: int = 10, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, classes)).eval()


def images(n: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def parts(**settings: int) -> list[Attack]:
    iterations = settings.get("iterations", 10)
    return [
        APGDCE(iterations=iterations),
        APGDT(iterations=iterations),
        FABT(iterations=iterations),
        Square(queries=settings.get("queries", 50)),
    ]


def test_parts_are_attacks_by_name() -> None:
    assert {"apgd-ce", "apgd-t", "fab-t", "square"} <= set(Attack.members())


@pytest.mark.parametrize("threat", DIGITS, ids=lambda threat: threat.name)
def test_target_numbers_are_those_of_the_standard_version(threat: LpBall) -> None:
    standard = AutoAttack(small_net(), norm=threat.norm, eps=threat.eps)
    assert standard_runs("apgd-t", threat) == standard.apgd_targeted.n_target_classes
    assert standard_runs("fab-t", threat) == standard.fab.n_target_classes
    assert standard_runs("apgd-ce", threat) == standard.apgd.n_restarts
    assert Square().queries == standard.square.n_queries


@pytest.mark.parametrize("threat", rest_slow({threat.name: threat for threat in DIGITS}, 1))
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_part_finds_the_images_of_pyautoattack(name: str, threat: LpBall) -> None:
    model, x = small_net(), images(5)
    y = model(x).argmax(1)
    reference = AutoAttack(model, norm=threat.norm, eps=threat.eps, seed=3)
    reference.attacks_to_run = [name]
    reference.square.n_queries = 60
    expected, _ = reference.run_standard_evaluation(x, y)
    part = Square(queries=60) if name == "square" else Attack.of_kind(name)()
    found = part.run(model, x, y, threat, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(found.images, expected, rtol=0, atol=1e-5)
    assert torch.equal(found.robust, model(expected).argmax(1) == y)


@pytest.mark.parametrize("attack", parts(), ids=lambda attack: attack.kind)
def test_logits_in_double_precision_are_taken_as_those_in_single(attack: Attack) -> None:
    model, x = small_net(), images()
    y, seed = model(x).argmax(1), torch.Generator().manual_seed(3)
    found = [attack.run(each, x, y, DIGITS["L2"], generator=seed) for each in (model, lambda z: model(z).double())]
    assert torch.equal(found[0].images, found[1].images)


@pytest.mark.parametrize(("norm", "dual"), [("L1", float("inf")), ("L2", 2.0), ("Linf", 1.0)])
def test_linear_model_is_fooled_exactly_where_the_dual_norm_says(norm: str, dual: float) -> None:
    """Two classes, logits (0, w.x + b): robust if and only if |w.x + b| > eps * dual norm of w."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(64, generator=generator)
    if norm == "L1":  # where one weight is the largest, their search ends at a few coordinates, short of it
        w = w.sign() * w.abs().clamp(max=w.abs().topk(20).values[-1])
    x = 0.4 + 0.2 * torch.rand(80, 1, 8, 8, generator=generator)  # so far inside that the box does not matter
    linear = nn.Linear(64, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.stack([torch.zeros(64), w]))
        linear.bias.copy_(torch.tensor([0.0, 0.01 - (x.flatten(1) @ w).median()]))
    model = nn.Sequential(nn.Flatten(), linear).eval()
    margin = model(x)[:, 1].detach()
    threat = LpBall(norm=norm, eps=(margin.abs().median() / torch.linalg.vector_norm(w, ord=dual)).item())
    ratio = margin.abs() / (threat.eps * torch.linalg.vector_norm(w, ord=dual))
    y = (margin > 0).long()
    for part, near in ((APGDCE(), 0.02), (FABT(), 0.06)):  # FAB oversteps the boundary by 5%
        clear = (ratio - 1).abs() > near
        assert clear.sum() >= 50
        found = part.run(model, x, y, threat)
        assert torch.equal(found.robust[clear], ratio[clear] > 1), part.kind


def test_a_mixed_batch_equals_the_threats_by_themselves() -> None:
    model, x = small_net(), images(6)
    y = model(x).argmax(1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    mixed = FABT(iterations=10)(model, x, y, PerExample(DIGITS, labels))
    for i, threat in enumerate(DIGITS):
        rows = labels == i
        assert torch.allclose(mixed[rows], FABT(iterations=10)(model, x[rows], y[rows], threat), atol=1e-6)


def test_few_classes_cut_the_targets() -> None:
    five, three, x = small_net(5), small_net(3), images()
    for part in (APGDT(iterations=10), FABT(iterations=10)):
        assert part(five, x, five(x).argmax(1), DIGITS["L2"]).shape == x.shape
    assert FABT(iterations=10)(three, x, three(x).argmax(1), DIGITS["Linf"]).shape == x.shape
    with pytest.raises(UserError, match=r"apgd-t needs at least 4 classes.*has 3.*fab-t"):
        APGDT(iterations=10)(three, x, three(x).argmax(1), DIGITS["Linf"])


@pytest.mark.parametrize("threat", DIGITS, ids=lambda threat: threat.name)
def test_non_contiguous_images_work(threat: LpBall) -> None:
    model = small_net()
    x = images().repeat(1, 2, 1, 1).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, :1]
    assert not x.is_contiguous()
    y = model(x).argmax(1)
    for part in parts():
        assert torch.equal(part(model, x, y, threat), part(model, x.contiguous(), y, threat))


def test_everything_is_as_it_was(caplog: pytest.LogCaptureFixture) -> None:
    def tracer(*_: object) -> None:
        return None

    model = small_net().train()
    model[1].weight.requires_grad_(False)
    x, y = images(4), torch.arange(4)
    torch_state, numpy_state, trace = torch.get_rng_state(), np.random.get_state()[1].copy(), sys.gettrace()
    sys.settrace(tracer)
    try:
        with caplog.at_level(logging.DEBUG):
            for part in parts():
                part(model, x, y, DIGITS["L1"])
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(trace)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    assert not caplog.records
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def test_zero_gradients_are_a_structured_warning() -> None:
    """Logits that saturate: their gradient underflows to exactly zero."""

    class Flat(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.flatten(1)[:, :10] * 0) + torch.arange(10.0)

    x, y = images(5), torch.full((5,), 9)
    with pytest.warns(AttackWarning) as caught:
        found = APGDT(iterations=10).run(Flat().eval(), x, y, DIGITS["Linf"])
    assert found.robust.all()
    assert (caught[0].message.check, caught[0].message.examples) == ("zero-gradients", 5)


@pytest.mark.parametrize("part", [APGDCE(iterations=10), APGDT(iterations=10), FABT(iterations=2, targets=2)])
def test_gradients_that_are_nan_are_a_structured_warning(part: AutoAttackPart) -> None:
    """A root at zero on three of five images: the value is right, the slope 0 * inf."""
    net = small_net()

    class Rooted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = x[:, 0, 0, :1]
            return net(x) + 0 * ((first > 0.5) * first).sqrt()

    x = images(5)
    x[:, :, 0, 0] = torch.tensor([0.9, 0.1, 0.9, 0.1, 0.1])[:, None]
    model = Rooted().eval()
    with pytest.warns(AttackWarning) as caught:
        part.run(model, x, model(x).argmax(1), LpBall(norm="Linf", eps=0.01))
    assert [(each.message.check, each.message.examples) for each in caught] == [("nan-gradients", 3)]


@pytest.mark.parametrize("eps", [1e-3, 0.7, 12.0, 1e4])
@pytest.mark.parametrize(("scale", "share"), [(0.05, 1.0), (0.6, 0.05), (2.0, 0.3), (0.0, 1.0)])
def test_the_projection_onto_an_l1_ball_is_pyautoattacks(eps: float, scale: float, share: float) -> None:
    source = torch.Generator().manual_seed(0)
    for shape in ((2, 1, 1, 2), (5, 3, 4, 6), (3, 1, 28, 28)):
        x = (1.4 * torch.rand(shape, generator=source) - 0.2).clamp(0, 1)
        y = scale * torch.randn(shape, generator=source) * (torch.rand(shape, generator=source) < share)
        step = l1_projection(x, y, eps)
        assert torch.equal(step, L1_projection(x, y, eps))
        before, after = (each.double().flatten(1).abs().sum(1).max() for each in (y, y + step))
        assert after <= eps + y[0].numel() * torch.finfo(torch.float32).eps * before  # sequential sums in float32
        assert (x + y + step).sub(0.5).abs().max() <= 0.5 + 1e-5


def test_square_builds_each_window_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[tuple[int, int]] = []
    rectangles = SquareAttack.eta_rectangles

    def counting(self: SquareAttack, *size: int) -> Tensor:
        sizes.append(size)
        return rectangles(self, *size)

    monkeypatch.setattr(SquareAttack, "eta_rectangles", counting)
    x, y = torch.rand(2, 3, 10, 10, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    never = torch.eye(3)[y]  # no query fools this model
    Square(queries=40).run(lambda x: never[: len(x)], x, y, LpBall(norm="L2", eps=0.1))
    assert len(sizes) == len(set(sizes)) > 2


def test_no_budget_no_change() -> None:
    model, x = small_net(), images()
    for part in parts():
        assert torch.equal(part(model, x, model(x).argmax(1), LpBall(norm="L2", eps=0)), x)


def test_float64_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"float32 images, not torch.float64.*x.float\(\)"):
        APGDCE()(small_net(), images().double(), torch.zeros(12, dtype=torch.int64), DIGITS["L2"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision_are_taken(dtype: torch.dtype) -> None:
    net, x = small_net(), images(6)
    y = net(x).to(dtype).argmax(dim=1)
    for part in parts(iterations=5, queries=20):
        found = part.run(lambda z: net(z).to(dtype), x, y, LpBall(norm="Linf", eps=0.1))
        assert bool(found.images.isfinite().all())


def test_no_gradient_reaches_the_parameters_of_a_model_that_cannot_be_frozen() -> None:
    net, x = small_net(), images(4)
    for part in parts(iterations=5, queries=20):
        part.run(lambda z: net(z), x, net(x).argmax(dim=1), LpBall(norm="L2", eps=0.5))
        assert all(parameter.grad is None for parameter in net.parameters()), part.kind


@pytest.mark.parametrize("size", range(4, 40))
def test_square_says_which_sizes_it_cannot_search(size: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 4))
    x, y = torch.rand(2, 3, size, size), torch.zeros(2, dtype=torch.int64)
    part = Square(queries=2)
    unfit = size in (4, 12, 14, 18, 19, 24)
    with pytest.raises(UserError, match=f"not fit into images of {size}x{size}") if unfit else contextlib.nullcontext():
        part.run(net, x, y, LpBall(norm="L2", eps=0.01))
    part.run(net, x, y, LpBall(norm="Linf", eps=0.01))
