"""Attacks: closed forms on linear models, the published formulas step by step, an engine that leaves no trace."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import random
from typing import Any, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.literal_apgd import checkpoints, literal_apgd
from helpers.problems import RADII, Digits, FixedNoise, Problem, case, recorded, rest_slow
from rome.attacks import APGD, PGD, Attack, Square
from rome.attacks.base import Group
from rome.attacks.engine import loss_and_gradient
from rome.attacks.lp.pgd import random_start
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.threats import CIFAR10, DIGITS, IMAGENET, LpBall, PerExample, Threat, budgets
from rome.threats.projections import top_signs

ATTACKS: dict[str, Attack] = {
    "pgd": PGD(steps={"L1": 6, "L2": 5, "Linf": 3}, percentile=90),
    "apgd": APGD(steps={"L1": 6, "L2": 5, "Linf": 3}),
}
MIXED = budgets(RADII["L1"], RADII["L2"], RADII["Linf"])


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> Attack:
    return ATTACKS[request.param]


class Linear(nn.Module):
    """Logits (0, <w, x> + b): with label 0 the cross-entropy rises with <w, x>, everywhere in the same direction."""

    def __init__(self, w: Tensor, b: float = 0.0) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(w), b

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.w + self.b
        return torch.stack([torch.zeros_like(score), score], dim=1)


def linear(d: int = 64, seed: int = 0) -> tuple[Linear, Tensor, Tensor]:
    """A linear model and four images away from the box's walls: (4, 1, 8, d/8), labels 0."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, generator=g)
    return (
        Linear(w / w.norm()),
        0.35 + 0.3 * torch.rand(4, 1, 8, d // 8, generator=g),
        torch.zeros(4, dtype=torch.int64),
    )


def optimum(w: Tensor, x: Tensor, threat: LpBall) -> Tensor:
    """The highest <w, x'> that the threat allows, box included for L1 and Linf: (B,)."""
    flat, eps = x.flatten(1), threat.eps
    room = torch.where(w > 0, 1 - flat, flat)
    if threat.norm == "L2":
        return flat @ w + eps * w.norm()
    if threat.norm == "Linf":
        return flat @ w + (room.clamp(max=eps) * w.abs()).sum(1)
    order = w.abs().argsort(descending=True)
    room = room[:, order]
    return flat @ w + ((eps - room.cumsum(1) + room).clamp(min=0).minimum(room) * w.abs()[order]).sum(1)


# -- PGD ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [False, True])
def test_pgd_reaches_the_optimum_of_a_linear_model(norm: str, start: bool) -> None:
    model, x, y = linear()
    threat = LpBall(norm=norm, eps={"L1": 0.3, "L2": 0.3, "Linf": 0.1}[norm])
    found = PGD(steps=60, random_start=start)(model, x, y, threat)
    gain = found.flatten(1) @ model.w - x.flatten(1) @ model.w
    best = optimum(model.w, x, threat) - x.flatten(1) @ model.w
    # in L2 a start across the gradient is turned towards it only as far as 2.5 eps of steps can
    torch.testing.assert_close(gain, best, rtol=0.03 if norm == "L2" else 2e-3, atol=0)


@pytest.mark.parametrize("steps", [20, 50])
@pytest.mark.parametrize("name", ["L2", "Linf"])
def test_apgd_reaches_the_optimum_of_a_linear_model(name: str, steps: int) -> None:
    model, x, y = linear()
    threat = LpBall(norm=name, eps={"L2": 0.3, "Linf": 0.1}[name])
    found = APGD(steps=steps)(model, x, y, threat)
    gain = found.flatten(1) @ model.w - x.flatten(1) @ model.w
    best = optimum(model.w, x, threat) - x.flatten(1) @ model.w
    torch.testing.assert_close(gain, best, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, None), (torch.float64, 0.2), (torch.float64, None)])
@pytest.mark.parametrize("pixels", ["inside", "saturated"])
@pytest.mark.parametrize(("d", "seeds", "steps"), rest_slow([(64, 40, 20), (64, 40, 100), (3072, 6, 20)], 1))
@pytest.mark.parametrize("eps", [0.01, 0.3, 4.0])
def test_apgd_in_l1_reaches_the_optimum_of_every_linear_model(
    eps: float, d: int, seeds: int, steps: int, pixels: str, share: float | None, dtype: torch.dtype
) -> None:
    """The steps' coordinates nest: the n largest weights of those that the box lets move. As long as each may move by
    eps / n, the gain is eps times their mean weight, which rises as n falls, so every check finds a sparser best point
    and n goes down by a third, in the end to 1. Where the box lets a pixel move by 1, n = eps is the optimum of
    saturated images, and 4 is among these n from every start here; inside, where it is less, only a bound is known.
    """
    g = torch.Generator().manual_seed(0)
    w, u = (torch.rand(seeds, d, generator=g, dtype=torch.float64) for _ in range(2))
    w = torch.special.ndtri(w.clamp(1e-6, 1 - 1e-6))
    w = w / w.norm(dim=1, keepdim=True)
    x = ((0.35 + 0.3 * u) if pixels == "inside" else u.round()).view(-1, 1, 8, d // 8).to(dtype)
    threat, y = LpBall(norm="L1", eps=eps), torch.zeros(seeds, dtype=torch.int64)

    def models(images: Tensor) -> Tensor:
        """A linear model of its own for every image, logits (0, <w_i, x_i>)."""
        return F.pad((images.flatten(1) * w.to(dtype)).sum(1, keepdim=True), (1, 0))

    found = APGD(steps=steps, l1_share=share)(models, x, y, threat)
    gain = ((found.double() - x.double()).flatten(1) * w).sum(1)
    best = torch.stack([optimum(row, image, threat) for row, image in zip(w, x.double(), strict=True)]).flatten()
    best = best - (x.double().flatten(1) * w).sum(1)
    assert (gain <= best * (1 + 1e-5)).all()
    if pixels == "inside" and eps > 0.35:
        reached = 13 if d == 64 else 14  # an n of every start here, or above one, with eps / n < 0.35
        best = eps * w.abs().topk(reached).values.mean(1)
        assert (gain >= best * (1 - 1e-4)).all()
    else:
        torch.testing.assert_close(gain, best, rtol=1e-4, atol=0)


def test_steps_and_step_sizes_of_the_presets() -> None:
    table = {
        ("tramer", CIFAR10): [(20, 1.5), (20, 0.0625), (10, 2 / 255)],
        ("madaan", CIFAR10): [(20, 1.0), (10, 30 / 255), (10, 1 / 255)],
    }
    for (preset, threats), expected in table.items():
        attack = PGD(preset=preset)
        assert [(attack.steps_for(t), pytest.approx(attack.step_size_for(t))) for t in threats] == expected
    imagenet = PGD(steps={"L1": 40, "L2": 20, "Linf": 10})
    assert [imagenet.step_size_for(t) for t in IMAGENET] == pytest.approx([15.9375, 0.25, 1 / 255])
    assert PGD(steps=7, step_size={"2": "1/4"}).step_size_for(CIFAR10["L2"]) == 0.25
    assert APGD().steps_for(CIFAR10["L1"]) == 15


@pytest.mark.parametrize("preset", ["tramer", "madaan"])
def test_the_first_step_of_pgd_by_hand(norm: str, preset: str) -> None:
    g = torch.Generator().manual_seed(1)
    w = torch.randn(3072, generator=g)
    x = 0.4 + 0.2 * torch.rand(3, 3, 32, 32, generator=g)
    sizes = {
        "tramer": {"L1": 1.5, "L2": 0.0625, "Linf": 2 / 255},
        "madaan": {"L1": 1.0, "L2": 30 / 255, "Linf": 1 / 255},
    }
    size, direction = sizes[preset][norm], w.double().numpy()
    if norm == "Linf":
        step = size * np.sign(direction)
    elif norm == "L2":
        step = size * direction / np.linalg.norm(direction)
    else:
        top = np.argsort(-np.abs(direction))[:31]  # the top percent of 3 x 32 x 32
        step = np.zeros_like(direction)
        step[top] = size * np.sign(direction[top]) / 31
    model = Linear(w / 50)
    with recorded(model) as calls:
        PGD(preset=preset, random_start=False)(model, x, torch.zeros(3, dtype=torch.int64), CIFAR10[norm])
    assert torch.equal(calls.forwards[0], x)
    moved = (calls.forwards[1].double() - x.double()).flatten(1).numpy()
    np.testing.assert_allclose(moved, np.broadcast_to(step, moved.shape), atol=1e-7)


def test_pgd_in_l1_and_l2_leaves_saturated_coordinates_that_would_leave_the_box() -> None:
    """They get no share of the step: the coordinates that can move take it all."""
    w = torch.tensor([9.0, -8.0, 4.0, 3.0] + [0.01] * 60)
    x = torch.full((1, 1, 8, 8), 0.5)
    x.view(-1)[:2] = torch.tensor([1.0, 0.0])
    model, y = Linear(w / 10), torch.zeros(1, dtype=torch.int64)
    l1 = PGD(steps=1, step_size=0.1, random_start=False)(model, x, y, LpBall(norm=1, eps=1)) - x
    torch.testing.assert_close(l1.flatten()[:4], torch.tensor([0, 0, 0.1, 0]))
    l2 = PGD(steps=1, step_size=0.1, random_start=False)(model, x, y, LpBall(norm=2, eps=1)) - x
    torch.testing.assert_close(l2.flatten()[:4], torch.tensor([0, 0, 0.08, 0.06]), rtol=1e-3, atol=1e-7)


def test_top_signs_are_at_or_above_numpys_percentile() -> None:
    for percentile in [0, 25, 50, 80, 99]:
        for d in [1, 5, 64, 101, 3072]:
            with case(percentile, d):
                g = torch.randn(3, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
                size = g.abs().numpy()
                keep = size >= np.percentile(size, percentile, axis=1, keepdims=True)
                expected = np.sign(g.numpy()) * keep / keep.sum(axis=1, keepdims=True)
                np.testing.assert_allclose(top_signs(g, percentile), expected, rtol=1e-12)


def test_random_starts_are_uniform_gaussian_and_laplace_with_the_radius_of_the_ball(norm: str) -> None:
    """Mean |z| over the standard deviation tells the three apart: sqrt(3)/2, sqrt(2/pi), sqrt(1/2)."""
    eps, x = 0.1, torch.full((50, 3, 32, 32), 0.5)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    z = (random_start(LpBall(norm=norm, eps=eps), x, noise) - x).flatten(1).double()
    shape = {"Linf": math.sqrt(3) / 2, "L2": math.sqrt(2 / math.pi), "L1": math.sqrt(1 / 2)}[norm]
    # in L1 a coordinate is near 0.1 / 3072: adding it to 0.5 rounds it by up to 6e-8 / 2, about one part in a thousand
    assert (z.abs().mean() / z.std()).item() == pytest.approx(shape, rel=5e-3)
    assert abs(z.mean() / z.std()) < 0.01
    if norm == "Linf":
        assert z.abs().amax(1).min() > 0.99 * eps
        assert z.abs().max() <= eps * (1 + 1e-6)
    else:
        length = torch.linalg.vector_norm(z, ord=int(norm[1]), dim=1)
        torch.testing.assert_close(length, torch.full_like(length, eps), rtol=2e-3, atol=0)


def test_a_start_depends_on_its_own_noise_and_stays_in_the_box(norm: str, problem: Problem) -> None:
    threat, (_, x, _) = LpBall(norm=norm, eps=5 * RADII[norm]), problem(6)
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    start = random_start(threat, x, noise)
    assert threat.contains(start, x).all()
    for i in range(6):
        assert torch.equal(start[i : i + 1], random_start(threat, x[i : i + 1], noise[i : i + 1]))
    assert not torch.equal(start, random_start(threat, x, noise.flip(0)))


def test_pgd_raises_the_loss_and_more_steps_do_not_weaken_it(
    norm: str, digits: Digits, digits_model: nn.Module
) -> None:
    x, y = (t[:200] for t in digits.test)
    losses = [
        F.cross_entropy(digits_model(PGD(steps=steps)(digits_model, x, y, DIGITS[norm])), y).item()
        for steps in (0, 1, 5, 20, 60)
    ]
    clean = F.cross_entropy(digits_model(x), y).item()
    assert losses[0] < clean * 1.5  # a random start alone does little
    assert losses[3] > 1.5 * clean
    assert all(b > a * 0.99 for a, b in itertools.pairwise(losses))


# -- APGD --------------------------------------------------------------------------------------------------------------


def test_the_checkpoints_are_those_of_the_paper() -> None:
    assert checkpoints(5) == [1, 2, 3, 4, 5]
    assert checkpoints(10) == [2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert checkpoints(15) == [3, 5, *range(6, 16)]
    assert checkpoints(100)[:4] == [22, 41, 57, 70]  # Croce and Hein 2020: 0.22, 0.41, 0.57, 0.70


@pytest.mark.parametrize("steps", [1, 5, 10, 15, 20, 60])
def test_apgd_is_the_published_algorithm(norm: str, steps: int, problem: Problem) -> None:
    model, x, y = problem(12)
    threat = LpBall(norm=norm, eps=RADII[norm])
    found = APGD(steps=steps, l1_share=0.05).run(model, x, y, threat)
    compared = 0
    for i in range(len(x)):
        best, loss, robust, adversarial, clear = literal_apgd(model, x[i].numpy(), int(y[i]), norm, threat.eps, steps)
        if not clear:  # rounding decides, which is another one in a batch
            continue
        compared += 1
        np.testing.assert_allclose(found.images[i], best, atol=1e-7, err_msg=f"example {i}")
        assert found.loss[i].item() == pytest.approx(loss, rel=1e-5)
        assert found.robust[i].item() == robust
        np.testing.assert_allclose(found.adversarial[i], adversarial, atol=1e-7, err_msg=f"example {i}")
    assert compared, steps


def test_apgd_reports_the_loss_of_what_it_returns(norm: str, digits: Digits, digits_model: nn.Module) -> None:
    x, y = (t[:120] for t in digits.test)
    found = APGD(steps=10).run(digits_model, x, y, DIGITS[norm])
    clean = F.cross_entropy(digits_model(x), y, reduction="none")
    logits = digits_model(found.images)
    torch.testing.assert_close(found.loss, F.cross_entropy(logits, y, reduction="none"), rtol=1e-4, atol=1e-6)
    assert (found.loss >= clean * (1 - 1e-4) - 1e-6).all()
    wrong = digits_model(found.adversarial).argmax(1) != y
    assert torch.equal(wrong, ~found.robust)
    assert torch.equal(found.adversarial[found.robust], found.images[found.robust])
    assert 0.1 < found.robust.float().mean() < 0.9


def test_apgd_l1_share_is_the_share_of_coordinates_that_move_first() -> None:
    model, x, y = linear(d=200)
    for share, moved in [(0.05, 10), (0.2, 40), (1.0, 200)]:
        with recorded(model) as calls:
            APGD(steps=2, l1_share=share)(model, x, y, LpBall(norm=1, eps=0.1))
        assert ((calls.forwards[1] != x).flatten(1).sum(1) == moved).all()


def test_apgd_l1_moves_a_twentieth_first_but_at_least_twelve() -> None:
    for d, moved in [(48, 12), (200, 12), (1000, 50)]:
        model, x, y = linear(d=d)
        with recorded(model) as calls:
            APGD(steps=2)(model, x, y, LpBall(norm=1, eps=0.1))
        assert ((calls.forwards[1] != x).flatten(1).sum(1) == moved).all()


def test_casting_frozen_weights_once_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast the engine casts the weights of products once for an attack, and gives them back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    model(x)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attack, mixture = PGD(steps=3), PerExample(tuple(CIFAR10), torch.arange(6) % 3)
    dtypes: list[torch.dtype] = []
    hook = model[0].register_forward_hook(lambda layer, given, out: dtypes.append(layer.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        once = attack(model, x, y, mixture)
        assert set(dtypes) == {torch.bfloat16}
        monkeypatch.setattr("rome.attacks.engine._weights_to_copy", lambda model: iter(()))
        every_time = attack(model, x, y, mixture)
    hook.remove()
    assert torch.equal(once, every_time)
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_on_a_cpu_an_attack_convolves_channels_last_and_leaves_the_model_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 5)).eval()
    x, y = torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    formats: list[bool] = []

    def see(layer: nn.Module, given: object, out: object) -> None:
        formats.append(layer.weight.is_contiguous(memory_format=torch.channels_last))  # type: ignore[operator,union-attr]

    model[0].register_forward_hook(see)
    found = PGD(steps=3)(model, x, y, CIFAR10[1])
    assert formats == [True] * 3
    assert model[0].weight.is_contiguous()
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert torch.equal(PGD(steps=3)(last, x, y, CIFAR10[1]), found)


class Merging(nn.Linear):
    """As LoRA's official layer: in evaluation mode its update is part of the weight."""

    def __init__(self) -> None:
        super().__init__(48, 5)
        self.update, self.merged = nn.Parameter(torch.ones(5, 48)), False

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.update.data if mode else self.update.data
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.merged else super().forward(x) + F.linear(x, self.update)


def test_layers_that_merge_their_update_to_evaluate_train_it_after_an_attack() -> None:
    model = nn.Sequential(nn.Flatten(), Merging()).train()
    before, x = model[1].weight.detach().clone(), torch.rand(4, 3, 4, 4)
    PGD(steps=1)(model, x, torch.arange(4), CIFAR10["Linf"])
    assert not model[1].merged
    torch.testing.assert_close(model[1].weight, before, rtol=0, atol=1e-6)
    model(x).sum().backward()
    assert model[1].update.grad is not None


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight / self.weight.std(), self.bias)


def test_under_autocast_parameters_stay_the_objects_they_were_and_foreign_layers_their_own() -> None:
    """DistributedDataParallel's hooks hang on them, and a layer that changes its weight first rounds it afterwards."""
    normed = torch.nn.utils.weight_norm(nn.Conv2d(4, 4, 1))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Standardised(4, 4, 3), normed, nn.Flatten(), nn.Linear(64, 5))
    x, y = torch.rand(2, 3, 8, 8), torch.arange(2)
    before = dict(model.named_parameters())
    hooked: list[str] = []
    for name, parameter in before.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: hooked.append(name))
    accumulators = [p.expand_as(p).grad_fn.next_functions[0][0] for p in before.values()]
    dtypes: list[torch.dtype] = []
    for layer in model[:2]:
        layer.register_forward_hook(lambda layer, given, out: dtypes.append(layer.weight.dtype))
    normed.register_forward_hook(lambda layer, given, out: dtypes.append(layer.weight_v.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        PGD(steps=1, random_start=False)(model, x, y, CIFAR10["L2"])
        assert dtypes[:3] == [torch.bfloat16, torch.float32, torch.float32]
        model(x).sum().backward()
    assert dict(model.named_parameters()) == before
    assert [p.expand_as(p).grad_fn.next_functions[0][0] for p in before.values()] == accumulators
    assert sorted(hooked) == sorted(before)


def test_l1_projected_onto_ball_and_box_spends_more_of_the_budget(digits: Digits, digits_model: nn.Module) -> None:
    x, y = digits.test
    threat = LpBall(norm=1, eps=2.0)
    sizes, robust = [], []
    for projection in ("ball", "ball-and-box"):
        found = PGD(steps=10, random_start=False, l1_projection=projection).run(digits_model, x, y, threat)
        sizes.append(threat.size(found.images, x).mean().item())
        robust.append(found.robust.double().mean().item())
    assert sizes[1] > 1.05 * sizes[0]
    assert robust[1] < robust[0]


# -- what an attack costs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_calls_of_the_model(norm: str, steps: int, problem: Problem) -> None:
    model, x, y = problem(4)
    with recorded(model) as calls:
        PGD(steps=steps)(model, x, y, LpBall(norm=norm, eps=1))
    assert (len(calls.forwards), len(calls.backwards)) == (steps, steps)
    with recorded(model) as calls:
        APGD(steps=steps)(model, x, y, LpBall(norm=norm, eps=1))
    assert (len(calls.forwards), len(calls.backwards)) == (steps + 1, steps)


def test_a_mixed_batch_costs_its_longest_search_and_shrinks_as_threats_finish(problem: Problem) -> None:
    model, x, y = problem(9)
    mixed = PerExample(tuple(MIXED), torch.tensor([0, 1, 2, 2, 2, 2, 1, 0, 2]))
    steps: dict[Any, int] = {"L1": 20, "L2": 20, "Linf": 10}
    with recorded(model) as calls:
        PGD(steps=steps)(model, x, y, mixed)
    assert [len(batch) for batch in calls.forwards] == [9] * 10 + [4] * 10 == calls.backwards
    with recorded(model) as calls:
        APGD(steps=steps)(model, x, y, mixed)
    assert [len(batch) for batch in calls.forwards] == [9] * 11 + [4] * 10
    assert calls.backwards == [9] * 11 + [4] * 9 or calls.backwards == [9] * 10 + [4] * 10


@pytest.mark.parametrize("threat", rest_slow(["mixed", *MIXED], 1))
def test_a_search_asks_nothing_of_the_device(attack: Attack, threat: Any) -> None:
    """On fake tensors, which hold no values, any data-dependent host decision would raise."""
    with FakeTensorMode():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5))
        x, y, noise = torch.rand(9, 3, 4, 4), torch.randint(0, 5, (9,)), torch.rand(9, 3, 4, 4)
        groups = [Group(threat, slice(0, 9), 20)]
        if threat == "mixed":
            groups = [
                Group(t, slice(3 * i, 3 * i + 3), n) for i, (t, n) in enumerate(zip(MIXED, (20, 20, 10), strict=True))
            ]
        with torch.no_grad():
            found = attack.search(model, x, y, groups, noise)
    assert found.images.shape == x.shape


# -- the engine --------------------------------------------------------------------------------------------------------


def noise_for(x: Tensor) -> Tensor:
    return torch.rand(x.shape, generator=torch.Generator().manual_seed(7))


def test_a_mixed_batch_is_the_separate_runs_interleaved(attack: Attack, problem: Problem) -> None:
    model, x, y = problem(24)
    labels = torch.randint(0, 3, (24,), generator=torch.Generator().manual_seed(3))
    noise = noise_for(x)
    mixed = attack.run(model, x, y, PerExample(tuple(MIXED), labels), generator=FixedNoise(noise))
    for i, threat in enumerate(MIXED):
        rows = labels == i
        alone = attack.run(model, x[rows], y[rows], threat, generator=FixedNoise(noise[rows]))
        for name, whole, part in zip(mixed._fields, mixed, alone, strict=True):
            torch.testing.assert_close(
                whole[rows], part, rtol=0, atol=1e-6, equal_nan=True, msg=lambda m, n=name: n + m
            )


def test_batch_mates_and_their_order_do_not_matter(attack: Attack, problem: Problem) -> None:
    model, x, y = problem(24)
    labels, noise = torch.arange(24) % 3, noise_for(x)
    whole = attack(model, x, y, PerExample(tuple(MIXED), labels), generator=FixedNoise(noise))
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(5))
    for part in [shuffled, torch.arange(5), torch.tensor([11])]:
        again = attack(
            model, x[part], y[part], PerExample(tuple(MIXED), labels[part]), generator=FixedNoise(noise[part])
        )
        torch.testing.assert_close(again, whole[part], rtol=0, atol=1e-6)


def test_a_gradient_is_that_of_its_own_example(problem: Problem) -> None:
    """The sum of the losses is differentiated, not their mean: tiny gradients do not shrink with the batch."""
    model, x, y = problem(8)
    whole = loss_and_gradient(model, x, y)
    for i in range(8):
        for part, alone in zip(whole, loss_and_gradient(model, x[i : i + 1], y[i : i + 1]), strict=True):
            torch.testing.assert_close(part[i : i + 1], alone)


class Stateful(nn.Module):
    """BatchNorm, dropout, a frozen layer and mixed train flags: everything an attack could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)
        self.conv.requires_grad_(False)
        self.train()
        self.norm.eval()
        self.head.weight.grad = torch.ones_like(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


def everything(model: nn.Module) -> list[Any]:
    """All state of a model and of the global generators, comparable with ==."""
    return [
        {k: v.tolist() for k, v in model.state_dict().items()},
        [(m.training, len(m._forward_hooks)) for m in model.modules()],
        [(p.requires_grad, None if p.grad is None else p.grad.tolist()) for p in model.parameters()],
        (torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()),
        torch.is_grad_enabled(),
    ]


@pytest.mark.parametrize(
    "threat", [*MIXED, PerExample(tuple(MIXED), torch.arange(6) % 3)], ids=lambda t: type(t).__name__
)
def test_an_attack_leaves_no_trace(attack: Attack, threat: Any) -> None:
    model, x, y = Stateful(), torch.rand(6, 3, 8, 8), torch.arange(6) % 5
    before, image, label = everything(model), x.clone(), y.clone()
    found = attack.run(model, x, y, threat)
    assert everything(model) == before
    assert torch.equal(x, image)
    assert torch.equal(y, label)
    assert not any(part.requires_grad for part in found)
    assert found.images.data_ptr() != x.data_ptr()


def test_an_attack_that_fails_leaves_no_trace_either(attack: Attack) -> None:
    model = Stateful()
    before = everything(model)
    with pytest.raises(UserError, match=r"does not take 2 images of 4x8x8: .*expected input"):
        attack(model, torch.rand(6, 4, 8, 8), torch.arange(6) % 5, MIXED["Linf"])
    after = everything(model)
    assert after[:3] == before[:3]


def test_the_model_is_attacked_in_evaluation_mode(attack: Attack) -> None:
    model, modes = Stateful(), set()
    model.drop.register_forward_hook(lambda module, *_: modes.add(module.training))
    attack(model, torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), MIXED["L2"])
    assert modes == {False}


def test_the_same_call_finds_the_same_images(attack: Attack, ball: LpBall, problem: Problem) -> None:
    model, x, y = problem(6)
    assert torch.equal(attack(model, x, y, ball), attack(model, x, y, ball))


def test_a_generator_moves_on_and_a_stream_is_only_drawn_from_when_needed(problem: Problem) -> None:
    model, x, y = problem(6)
    g = torch.Generator().manual_seed(1)
    first, second = (PGD(steps=2)(model, x, y, MIXED["Linf"], generator=g) for _ in range(2))
    assert not torch.equal(first, second)
    again = PGD(steps=2)(model, x, y, MIXED["Linf"], generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, again)
    state = g.get_state()
    for quiet in (PGD(steps=2, random_start=False), APGD(steps=2)):
        quiet(model, x, y, MIXED["Linf"], generator=g)
    assert torch.equal(g.get_state(), state)


def test_processes_together_draw_what_one_process_draws() -> None:
    one = stream(3, "attack").uniform((6, 2, 4))
    two = torch.cat([stream(3, "attack", rank=rank, world=2).uniform((3, 2, 4)) for rank in range(2)])
    three = torch.cat([stream(3, "attack", rank=rank, world=3).uniform((2, 2, 4)) for rank in range(3)])
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert torch.equal(stream(3, "order", rank=1, world=2).permutation(9), stream(3, "order").permutation(9))
    assert not torch.equal(one, stream(3, "other").uniform((6, 2, 4)))
    assert not torch.equal(one, stream(4, "attack").uniform((6, 2, 4)))


@pytest.mark.parametrize("how", ["no_grad", "autocast", "non_contiguous", "expanded", "channels_last", "lambda"])
def test_circumstances_do_not_matter(how: str, attack: Attack, ball: LpBall, problem: Problem) -> None:
    model, x, y = problem(6)
    expected = attack(model, x, y, ball)
    if how == "no_grad":
        with torch.no_grad():
            found = attack(model, x, y, ball)
    elif how == "autocast":
        model32 = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
        with torch.autocast("cpu", torch.bfloat16):
            found = attack(model32, x.float(), y, ball)
        assert found.dtype == torch.float32
        assert ball.contains(found, x.float()).all()
        return
    elif how == "expanded":
        found = attack(model, x[:1].expand(6, -1, -1, -1), y[:1].expand(6), ball, generator=FixedNoise(noise_for(x)))
        expected = attack(model, x[:1].repeat(6, 1, 1, 1), y[:1].repeat(6), ball, generator=FixedNoise(noise_for(x)))
    elif how == "lambda":
        found = attack(lambda images: model(images), x, y, ball)
    else:
        layout = torch.channels_last if how == "channels_last" else torch.contiguous_format
        images = x.to(memory_format=layout) if how == "channels_last" else x.permute(0, 1, 3, 2).contiguous().mT
        assert not images.is_contiguous()
        found = attack(model, images, y, ball)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert found.dtype == x.dtype


def test_an_empty_batch_is_an_empty_answer(attack: Attack, ball: LpBall, problem: Problem) -> None:
    model, x, y = problem(0)
    for threat in (ball, PerExample(tuple(MIXED), torch.zeros(0, dtype=torch.int64))):
        found = attack.run(model, x, y, threat)
        assert [tuple(part.shape) for part in found] == [(0, 3, 4, 4), (0, 3, 4, 4), (0,), (0,)]


def test_no_room_no_change(attack: Attack, norm: str, problem: Problem) -> None:
    model, x, y = problem(6)
    assert torch.equal(attack(model, x, y, LpBall(norm=norm, eps=0)), x)


def test_no_gradient_no_step(norm: str) -> None:
    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :3]

    x, y = torch.rand(4, 1, 4, 4), torch.zeros(4, dtype=torch.int64)
    for attack in (PGD(steps=5, random_start=False), APGD(steps=10)):
        assert torch.equal(attack(Constant(), x, y, LpBall(norm=norm, eps=1)), x)


@pytest.mark.parametrize("attack", [PGD(random_start=False), APGD(steps=10)], ids=str)
@pytest.mark.parametrize("power", [-80, -30, 6, 12, 20])
def test_how_confident_a_model_is_does_not_matter(attack: Attack, norm: str, power: int) -> None:
    """Of two classes' logits, 2^power (0, w.x), the gradient points the same way however large they are, although their
    cross-entropy or the square of its gradient is zero in float32."""
    torch.manual_seed(0)
    w, x = torch.randn(48), 0.3 + 0.4 * torch.rand(8, 3, 4, 4)
    threat = LpBall(norm=norm, eps=RADII[norm])

    def images(scale: float) -> Tensor:
        def model(z: Tensor) -> Tensor:
            product = z.flatten(1) @ w * scale
            return torch.stack([torch.zeros_like(product), product], dim=1)

        return attack(model, x, model(x).argmax(1), threat)

    torch.testing.assert_close(images(2.0**power), images(1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [0.1, 1, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_found_is_allowed(attack: Attack, norm: str, scale: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = (1.4 * torch.rand(8, 3, 32, 32, generator=g) - 0.2).clamp(0, 1).to(dtype)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)).to(dtype)
    threat = LpBall(norm=norm, eps=CIFAR10[norm].eps * scale)
    found = attack.run(model, x, torch.arange(8) % 5, threat)
    for images in (found.images, found.adversarial):
        assert images.dtype == dtype
        assert images.isfinite().all()
        assert ((images >= 0) & (images <= 1)).all()
        assert (threat.size(images, x) <= threat.eps * (1 + 1e-5) + 1e-6).all()


class Perceptual(Threat):
    """A threat that no attack here knows."""

    kind = "test_only"

    @property
    def name(self) -> str:
        return "other"

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return x_adv

    size = contains = project


GOOD = (torch.rand(4, 3, 4, 4), torch.zeros(4, dtype=torch.int64), MIXED["Linf"])


@pytest.mark.parametrize(
    ("x", "y", "threat", "message"),
    [
        (3 * GOOD[0], GOOD[1], GOOD[2], r"images must be in \[0, 1\]"),
        (GOOD[0] - 0.5, GOOD[1], GOOD[2], "put the normalisation inside the model"),
        (GOOD[0].mul(255).byte(), GOOD[1], GOOD[2], "float32"),
        (GOOD[0][0], GOOD[1], GOOD[2], r"\(B, C, H, W\)"),
        (GOOD[0], GOOD[1][:3], GOOD[2], "labels"),
        (GOOD[0], GOOD[1].float(), GOOD[2], "int64"),
        (GOOD[0], GOOD[1][:, None], GOOD[2], "labels"),
        (GOOD[0], GOOD[1], "Linf", "must be a Threat"),
        (GOOD[0], GOOD[1], MIXED, "must be a Threat"),
        (GOOD[0], GOOD[1], Perceptual(), "searches inside Lp balls, not Perceptual"),
        (GOOD[0], GOOD[1], PerExample(tuple(MIXED), torch.zeros(3, dtype=torch.int64)), "4 threat labels"),
        (GOOD[0], GOOD[1], PerExample(tuple(MIXED), torch.tensor([0, 1, 3, -1])), r"not \[-1, 3\]"),
    ],
    ids=["range", "negative", "bytes", "3d", "short", "float", "2d", "name", "tuple", "unknown", "count", "label"],
)
def test_what_cannot_be_right_is_refused(attack: Attack, x: Tensor, y: Tensor, threat: Any, message: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    with pytest.raises(UserError, match=message):
        attack(model, x, y, threat)


class NoGradient(nn.Module):
    """Fine answers, always class 0; the gradient of dark images is infinity times zero in one coordinate or in all."""

    def __init__(self, coordinates: int) -> None:
        super().__init__()
        self.coordinates = coordinates

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        part = flat[:, : self.coordinates]
        dark = (flat.mean(1) < 0.5).unsqueeze(1)
        nothing = torch.where(dark, part - part, 1 + 0 * part).sqrt().sum(1) * 0
        return torch.stack([flat.sum(1) + nothing, flat.sum(1) - 9], dim=1)


@pytest.mark.parametrize("attack", [PGD(), PGD(l1_projection="ball-and-box"), APGD(), APGD(steps=1)], ids=str)
@pytest.mark.parametrize("threat", CIFAR10, ids=lambda threat: threat.name)
@pytest.mark.parametrize("coordinates", [1, 48])
def test_a_gradient_that_is_nan_does_not_pass_for_robustness(attack: Attack, threat: LpBall, coordinates: int) -> None:
    """Torch's sign of NaN is 0: the start would come back as if nothing could be found."""
    model, y = NoGradient(coordinates), torch.zeros(5, dtype=torch.int64)
    x = torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) / 2 + 0.5
    assert attack.run(model, x, y, threat).robust.all()
    x[[1, 4]] -= 0.5
    with pytest.raises(FloatingPointError, match="non-finite images for 2 of 5 examples"):
        attack.run(model, x, y, threat)
    with pytest.raises(FloatingPointError, match="non-finite images for 2 of 5 examples"):
        attack(model, x, y, PerExample((threat, CIFAR10["L2"]), torch.tensor([0, 0, 1, 1, 0])))


def test_a_model_that_gives_nan_is_named_as_such() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    model[1].weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="non-finite"):
        PGD(steps=2)(model, *GOOD[:2], MIXED["L2"])


@pytest.mark.parametrize(
    "wrong", [{"steps": -1}, {"percentile": 100}, {"preset": "madry"}, {"norm": 2}, {"steps": {"L3": 1}}]
)
def test_settings_that_cannot_be_right_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        PGD.model_validate(wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x.numpy(), y), "images must be a torch tensor, not ndarray"),
        (lambda x, y: (x, y.tolist()), "labels must be a torch tensor, not list"),
        (lambda x, y: (x, y + 50), r"largest label is \d+ but the model has 5 classes"),
        (lambda x, y: (x, y - 1), "the smallest is -1"),
        (lambda x, y: (x, y - 100), "the smallest is -100"),  # torch ignores that label: no loss, no gradient
        (lambda x, y: (x, y.to("meta")), "images are on cpu and labels on meta"),
        (lambda x, y: (x * float("nan"), y), "contain NaN"),
        (lambda x, y: (x * 0 + 1 + 1e-7, y), r"are in \[1.00000012, 1.00000012\].*clamp"),
    ],
)
def test_batches_that_cannot_be_right_are_refused_in_a_line(attack: Attack, change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        attack(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), *change(*GOOD[:2]), MIXED["Linf"])


def test_a_model_that_changes_its_images_is_noticed_where_no_gradient_tells() -> None:
    class Centres(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(0.1).clamp_(0, 1).flatten(1))

    with pytest.raises(UserError, match="changes its input images"):
        Square(queries=3)(Centres(48, 5), GOOD[0].clone(), GOOD[1], MIXED["Linf"])


# -- known gaps: these tests pass when they are closed -----------------------------------------------------------------


def test_an_image_slightly_outside_the_box_is_refused(attack: Attack) -> None:
    x = GOOD[0].clone()
    x[0, 0, 0, 0] = 1.02
    with pytest.raises(UserError, match="images must be in"):
        attack(nn.Sequential(nn.Flatten(), nn.Linear(48, 5)), x, GOOD[1], MIXED["Linf"])


@pytest.mark.parametrize("threat", [LpBall(norm=1, eps=1e-4), LpBall(norm=2, eps=1e-3)], ids=str)
def test_a_small_budget_is_not_mistaken_for_a_bug(threat: LpBall) -> None:
    g = torch.Generator().manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), torch.rand(8, 3, 32, 32, generator=g)
    APGD()(model, x, torch.arange(8) % 4, threat)


def test_bfloat16_images_are_attacked_or_refused() -> None:
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)).bfloat16()
    with contextlib.suppress(UserError):
        APGD()(model, torch.rand(8, 3, 32, 32, generator=g).bfloat16(), torch.arange(8) % 4, CIFAR10["L2"])


def test_pgd_keeps_its_promise_about_adversarial(digits: Digits, digits_model: nn.Module) -> None:
    x, y = digits.test
    found = PGD(steps=6, step_size=3.0).run(digits_model, x, y, MIXED["L1"])
    wrong = digits_model(found.adversarial).argmax(1) != y
    assert wrong[~found.robust].all()


def test_an_attack_works_inside_inference_mode(attack: Attack, problem: Problem) -> None:
    model, x, y = problem(4)
    with torch.inference_mode():
        attack(model, x, y, MIXED["Linf"])
        assert torch.equal(attack(model, x.clone(), y.clone(), MIXED["Linf"]), attack(model, x, y, MIXED["Linf"]))
