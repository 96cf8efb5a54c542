"""Threats: which images are allowed."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from helpers.problems import case
from rome.attacks.lp.pgd import ascend, random_start
from rome.core.errors import UserError
from rome.evaluation.named import named_config
from rome.runs.config import parse
from rome.threats import CIFAR10, DIGITS, IMAGENET, NAMED_BUDGETS, AnyImage, LpBall, PerExample, Threat, budgets

ORD = {"L1": 1, "L2": 2, "Linf": float("inf")}
EPS = {"L1": 12.0, "L2": 0.5, "Linf": 8 / 255}


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Images with saturated pixels, and images far away from them, outside the box too."""
    g = torch.Generator().manual_seed(0)
    x = (1.4 * torch.rand(6, 3, 32, 32, generator=g) - 0.2).clamp(0, 1)
    return x, x + 0.5 * torch.randn(x.shape, generator=g)


def test_every_usual_way_to_write_a_norm() -> None:
    ways = {"L1": (1, "1", "l1"), "L2": (2, 2.0, "L2")}
    ways["Linf"] = ("inf", "Inf", "linf", "Linf", "infinity", float("inf"))
    for name, given in ((name, given) for name, those in ways.items() for given in those):
        with case(given):
            assert LpBall.model_validate({"norm": given, "eps": 1}).norm == name == LpBall(norm=name, eps=1).name


def test_other_norms_are_refused() -> None:
    for wrong in ["3", 0, "L0", "", None, True]:
        with case(wrong), pytest.raises(ValidationError, match="norm"):
            LpBall.model_validate({"norm": wrong, "eps": 1})


def test_other_radii_are_refused() -> None:
    for wrong in [-1, float("nan"), float("inf"), "x", "1/0", None]:
        with case(wrong), pytest.raises(ValidationError, match="eps"):
            LpBall.model_validate({"norm": 2, "eps": wrong})


def test_a_linf_radius_beyond_the_range_of_images_is_refused_with_what_was_meant() -> None:
    for eps in [8, "8", 1.5, 255]:
        with case(eps):
            hint = f"exceeds 1, .*: {float(eps):g}/255"
            with pytest.raises(UserError, match=hint):
                LpBall(norm="Linf", eps=eps)
            with pytest.raises(UserError, match=hint):
                parse({"data": "digits", "model": {"name": "resnet_18"}, "threats": [{"norm": "linf", "eps": eps}]})
            with pytest.raises(UserError, match=f"--budgets .*{hint}"):
                named_config({"model": "net.py:net", "data": "digits", "budgets": f"L2=0.5,Linf={eps}"})
            assert (LpBall(norm="Linf", eps=1).eps, LpBall(norm="L2", eps=eps).eps) == (1, float(eps))


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 1000.0])
def test_a_projected_image_is_allowed_and_stays_where_it_is(
    norm: str, scale: float, pair: tuple[Tensor, Tensor]
) -> None:
    x, far = pair
    threat = LpBall(norm=norm, eps=min(EPS[norm] * scale, 1 if norm == "Linf" else math.inf))
    p = threat.project(far, x)
    assert p.shape == x.shape
    assert p.dtype == x.dtype
    assert threat.contains(p, x).all()
    assert p.min() >= 0
    assert p.max() <= 1
    torch.testing.assert_close(threat.project(p, x), p, rtol=0, atol=2e-6)
    torch.testing.assert_close(threat.project(x, x), x, rtol=0, atol=0)


def test_size_is_the_norm_over_the_whole_image(norm: str, pair: tuple[Tensor, Tensor]) -> None:
    x, far = pair
    sizes = LpBall(norm=norm, eps=1).size(far, x)
    expected = torch.stack(
        [torch.linalg.vector_norm((b - a).double().flatten(), ORD[norm]) for a, b in zip(x, far, strict=True)]
    )
    torch.testing.assert_close(sizes, expected, check_dtype=False)


@pytest.mark.parametrize("kind", ["uniform", "bright", "saturated", "both"])
@pytest.mark.parametrize("eps", [1e-3, 0.01, 1.0, 255.0])
def test_many_small_changes_stay_in_the_ball_as_float32_adds_them(norm: str, eps: float, kind: str) -> None:
    """150,528 rounded sums x + delta keep the radius to 1e-5: projected, as a start of PGD, and as a step of it."""
    eps = min(eps, 1) if norm == "Linf" else eps  # more is refused
    g = torch.Generator().manual_seed(0)
    u, noise = (torch.rand(2, 3, 224, 224, generator=g) for _ in range(2))
    images = {"uniform": u, "bright": 0.9 + 0.1 * u, "saturated": u.round(), "both": (1.6 * u - 0.3).clamp(0, 1)}
    x, threat = images[kind], LpBall(norm=norm, eps=eps)
    length = {"L1": 3e-5, "L2": 1e-2, "Linf": 2.0}[norm] * eps  # of a coordinate, so that some rows are far outside
    far = x + length * torch.randn(x.shape, generator=g)
    step = ascend(threat, x, x, far - x, size=2 * eps, percentile=0)
    for found in (threat.project(far, x), random_start(threat, x, noise), step):
        assert threat.contains(found, x).all()
        sizes = threat.size(found, x)
        assert (sizes <= eps * (1 + 1e-5) + (1.2e-7 if norm == "Linf" else 0)).all()
        assert ((found >= 0) & (found <= 1)).all()


def test_no_coordinate_moves_further_than_its_delta_where_rounding_leaves_the_ball() -> None:
    """4e-8 at 0.9 rounds to the next float, 6e-8 further: ten thousand such leave the ball by half its radius."""
    x, delta = torch.full((1, 10_000), 0.9), torch.full((1, 10_000), 4e-8)
    threat = LpBall(norm="L1", eps=4e-4)
    assert (x + delta - x).double().sum() > 1.4 * threat.eps
    assert torch.equal(threat.shifted(x, delta), x)
    assert not threat.contains((x + delta).view(1, 1, 100, 100), x.view(1, 1, 100, 100)).item()
    nothing_to_round = torch.full_like(x, 2**-14)
    assert torch.equal(LpBall(norm="L1", eps=1).shifted(x, nothing_to_round), x + nothing_to_round)


def test_contains_draws_the_line_at_the_radius_and_at_the_box(norm: str) -> None:
    x = torch.full((1, 1, 4, 4), 0.5)
    threat = LpBall(norm=norm, eps=0.2)
    step = torch.zeros_like(x)
    step[0, 0, 0, 0] = 1
    assert threat.contains(x + 0.2 * step, x).item()
    assert not threat.contains(x + 0.2001 * step, x).item()
    edge = torch.ones_like(x)
    assert threat.contains(edge, edge).item()
    assert not threat.contains(edge + 1e-6 * step, edge).item()
    assert not threat.contains(x + float("nan") * step, x).item()


@pytest.mark.parametrize("d", [1, 3])
def test_linf_and_l1_go_to_the_nearest_point_of_ball_and_box(d: int) -> None:
    """Compared with a fine grid of allowed points in d dimensions."""
    g = torch.Generator().manual_seed(d)
    x, far = torch.rand(20, 1, 1, d, generator=g), torch.rand(20, 1, 1, d, generator=g) * 3 - 1
    axis = torch.linspace(0, 1, 41)
    grid = torch.cartesian_prod(*[axis] * d).view(1, -1, d)
    for norm in ["L1", "Linf"]:
        threat = LpBall(norm=norm, eps=0.4)
        ours = (threat.project(far, x) - far).flatten(1).norm(dim=1)
        allowed = torch.linalg.vector_norm(grid - x.view(20, 1, d), ORD[norm], dim=2) <= 0.4
        theirs = (grid - far.view(20, 1, d)).norm(dim=2).masked_fill(~allowed, torch.inf).amin(1)
        assert (ours <= theirs + 1e-6).all()


def test_budgets_of_the_paper_by_name_and_order() -> None:
    assert [(t.name, t.eps) for t in CIFAR10] == [("L1", 12), ("L2", 0.5), ("Linf", 8 / 255)]
    assert [(t.name, t.eps) for t in IMAGENET] == [("L1", 255), ("L2", 2), ("Linf", 4 / 255)]
    assert CIFAR10["Linf"] is CIFAR10[2]
    assert NAMED_BUDGETS == {"cifar10": CIFAR10, "imagenet": IMAGENET, "digits": DIGITS}
    with pytest.raises(KeyError, match="'L3'; there are L1, L2, Linf"):
        budgets(1, 2, 0.3)["L3"]


def test_a_threat_is_a_frozen_value() -> None:
    assert LpBall(norm=2, eps="1/2") == LpBall(norm="L2", eps=0.5)
    assert len({LpBall(norm=2, eps=0.5), LpBall(norm="l2", eps="1/2")}) == 1
    with pytest.raises(ValidationError, match="frozen"):
        CIFAR10[0].eps = 3.0
    assert Threat.model_validate(CIFAR10["Linf"].dump()) == CIFAR10["Linf"]


def test_per_example_groups_cover_the_batch_once() -> None:
    mixed = PerExample(tuple(CIFAR10), torch.tensor([2, 0, 2, 2, 0]))  # L2 is absent
    groups = [(threat.name, where.tolist()) for threat, where in mixed.groups()]
    assert groups == [("L1", [1, 4]), ("Linf", [0, 2, 3])]


def test_repeated_puts_every_example_under_every_threat() -> None:
    mixed = PerExample.repeated(CIFAR10, 2)
    assert mixed.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert mixed.threats == tuple(CIFAR10)


def test_any_image_allows_the_box_and_nothing_else() -> None:
    threat = AnyImage(label="fog")
    x = torch.full((3, 1, 2, 2), 0.5)
    moved = x.clone()
    moved[0], moved[1, 0, 0, 0], moved[2, 0, 0, 0] = 1.0, 1.1, torch.nan
    assert threat.name == "fog"
    assert threat.contains(moved, x).tolist() == [True, False, False]
    assert threat.contains(threat.project(moved[:2], x[:2]), x[:2]).all()
    assert threat.size(moved[:2], x[:2]).tolist() == pytest.approx([0.5, 0.6])
