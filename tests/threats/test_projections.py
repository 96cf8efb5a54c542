"""Projections are exact, feasible, and never wait for the device."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from helpers.problems import case
from rome.threats.projections import project_l1, project_l2, project_linf

EPS = [0.0, 1e-3, 1.0, 12.0, 1e9]


def bisection(y: Tensor, eps: float, room: Tensor) -> Tensor:
    """sign(y) min(max(|y| - t, 0), room), with t by bisection in float64: the definition, digit by digit."""
    size, room = y.double().abs(), room.double()
    low, high = torch.zeros(len(y), 1, dtype=torch.float64), size.amax(1, keepdim=True)
    kept = size.minimum(room)
    inside = kept.sum(1, keepdim=True) <= eps
    for _ in range(100):
        t = (low + high) / 2
        above = (size - t).clamp(min=0).minimum(room).sum(1, keepdim=True) > eps
        low, high = torch.where(above, t, low), torch.where(above, high, t)
    return torch.where(inside, kept, (size - high).clamp(min=0).minimum(room)) * y.double().sign()


def furthest(direction: Tensor, eps: float, lower: Tensor, upper: Tensor) -> Tensor:
    """max <direction, z> over ||z||_1 <= eps, lower <= z <= upper: spend eps on the largest entries first. (B,)"""
    order = direction.abs().argsort(dim=1, descending=True)
    room = torch.where(direction > 0, upper, -lower).gather(1, order)
    before = room.cumsum(1) - room
    return (direction.abs().gather(1, order) * (eps - before).clamp(min=0).minimum(room)).sum(1)


def problem(kind: str, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A point (B, d) to project and an image (B, d) in [0, 1], of an awkward kind."""
    g = torch.Generator().manual_seed(d)
    rows = 3 if d < 10_000 else 2
    y, x = torch.randn(rows, d, generator=g, dtype=dtype), torch.rand(rows, d, generator=g, dtype=dtype)
    if kind == "saturated":
        x = x.round()
    elif kind == "zeros":
        y = torch.zeros_like(y)
    elif kind == "ties":
        y, x = 0.3 * y.sign(), torch.full_like(x, 0.5)
    elif kind == "sparse":
        y = y * (torch.rand(y.shape, generator=g) < 0.02)
    elif kind == "tiny":
        y = y * 1e-6
    elif kind == "large":
        y = y * 1e3
    elif kind == "mixed":
        y = y * 10 ** (12 * torch.rand(y.shape, generator=g) - 9)
    return y, x


KINDS = ["random", "saturated", "zeros", "ties", "sparse", "tiny", "large", "mixed"]


@pytest.mark.parametrize("kind", KINDS)
def test_l1_in_a_box_is_the_bisection_and_feasible(kind: str) -> None:
    for d in [1, 5, 64, 3072, 150_528]:
        with case(d):
            y, x = problem(kind, d)
            for eps in EPS if d < 10_000 else [12.0, 255.0]:
                p = project_l1(y, eps, -x, 1 - x)
                expected = bisection(y, eps, torch.where(y > 0, 1 - x, x))
                scale = expected.abs().amax()
                assert ((p - expected).abs().amax() <= 1e-5 * scale).item(), f"eps={eps}"
                assert p.double().abs().sum(1).max() <= eps * (1 + 1e-6), f"eps={eps}"
                assert ((p >= -x) & (p <= 1 - x)).all()
                assert p.dtype == y.dtype


@pytest.mark.parametrize("kind", KINDS)
def test_l1_alone_is_the_bisection(kind: str) -> None:
    for d in [1, 5, 64, 3072]:
        with case(d):
            y, _ = problem(kind, d)
            for eps in EPS:
                p, expected = project_l1(y, eps), bisection(y, eps, y.abs())
                assert ((p - expected).abs().amax() <= 1e-5 * expected.abs().amax()).item(), f"eps={eps}"
                assert p.double().abs().sum(1).max() <= eps * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_l1_in_a_box_is_optimal(kind: str) -> None:
    """p is the projection of y exactly when <y - p, z - p> <= 0 for every feasible z; the worst z is known."""
    for d in [1, 5, 64, 3072]:
        with case(d):
            y, x = problem(kind, d, torch.float64)
            for eps in EPS:
                p = project_l1(y, eps, -x, 1 - x)
                worst = furthest(y - p, eps, -x, 1 - x) - ((y - p) * p).sum(1)
                assert (worst <= 1e-11 * (1 + (y * y).sum(1))).all(), f"eps={eps}"


def test_l1_agrees_with_autoattack() -> None:
    reference = pytest.importorskip("pyautoattack.autopgd_base").L1_projection
    for d, eps in [(64, 1.0), (64, 3.0), (3072, 12.0), (3072, 0.5)]:
        for kind in ["random", "saturated", "sparse"]:
            y, x = problem(kind, d)
            torch.testing.assert_close(project_l1(y, eps, -x, 1 - x), y + reference(x, y, eps), rtol=0, atol=3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_l2_and_linf_in_closed_form(kind: str) -> None:
    for eps in EPS:
        with case(eps):
            y, _ = problem(kind, 64)
            exact = y.double().numpy()
            length = np.linalg.norm(exact, axis=1, keepdims=True)
            shrunk = np.where(length > eps, exact * eps / np.maximum(length, 1e-300), exact)
            np.testing.assert_allclose(project_l2(y, eps), shrunk, rtol=1e-6, atol=1e-12)
            np.testing.assert_allclose(
                project_linf(y, eps), np.clip(y.numpy(), np.float32(-eps), np.float32(eps)), rtol=0
            )


numbers = st.floats(-1e3, 1e3, width=32)


@st.composite
def two_points(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, float]:
    """Two points, an image, and a radius, with the awkward values hypothesis likes."""
    d = draw(st.integers(1, 12))
    y, z = (torch.tensor([draw(st.lists(numbers, min_size=d, max_size=d))]) for _ in range(2))
    x = torch.tensor([draw(st.lists(st.floats(0, 1, width=32), min_size=d, max_size=d))])
    return y, z, x, draw(st.floats(0, 20, width=32))


PROJECTIONS: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "l1": lambda y, eps, x: project_l1(y, eps),
    "l1 in a box": lambda y, eps, x: project_l1(y, eps, -x, 1 - x),
    "l2": lambda y, eps, x: project_l2(y, eps),
    "linf": lambda y, eps, x: project_linf(y, eps),
}


@pytest.mark.parametrize("name", PROJECTIONS)
@settings(max_examples=80, deadline=None, derandomize=True)
@given(points=two_points())
def test_a_projection_is_idempotent_non_expansive_and_odd_in_its_input(
    name: str, points: tuple[Tensor, Tensor, Tensor, float]
) -> None:
    """Up to rounding: thresholds and lengths are sums of d numbers as large as the largest, and each sum of them rounds
    by d units at most; 1 - x rounds by one."""
    project, (y, z, x, eps) = PROJECTIONS[name], points
    p, q = project(y, eps, x), project(z, eps, x)
    unit, d = torch.finfo(torch.float32).eps, y.shape[1]
    rounding = 4 * d * unit * max(y.abs().amax().item(), z.abs().amax().item(), 1)
    torch.testing.assert_close(project(p, eps, x), p, rtol=0, atol=rounding)
    assert (p - q).norm() <= (y - z).norm() * (1 + d * unit) + 2 * math.sqrt(d) * rounding
    assert (p * y >= 0).all()
    assert (p.abs() <= y.abs() * (1 + unit)).all()  # towards zero, never across
    torch.testing.assert_close(project(-y, eps, 1 - x), -p, rtol=0, atol=2 * rounding + unit)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_rows_do_not_see_each_other(name: str) -> None:
    y, x = problem("random", 64)
    together = PROJECTIONS[name](y, 1.0, x)
    for i in range(len(y)):
        assert torch.equal(together[i : i + 1], PROJECTIONS[name](y[i : i + 1], 1.0, x[i : i + 1]))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_no_value_is_asked_of_the_device(name: str) -> None:
    """Fake tensors hold no values, so any .item(), nonzero or mask indexing would raise."""
    with FakeTensorMode():
        y, x = torch.randn(4, 48), torch.rand(4, 48)
        assert PROJECTIONS[name](y, 1.0, x).shape == y.shape
        with pytest.raises(DataDependentOutputException):
            bool((y > 0).any())
