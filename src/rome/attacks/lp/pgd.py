"""Projected gradient descent under L1, L2 and Linf (paper 5.1; Madry et al. 2018; Tramèr and Boneh 2019)."""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.base import NOT_EVALUATED, Attack, AttackResult, Group, Steps, StepSize
from rome.attacks.engine import Model, loss_and_gradient, signs, unit
from rome.core.component import Number
from rome.core.errors import UserError
from rome.threats import LpBall, Threat
from rome.threats.lp import Norm
from rome.threats.projections import project_l1, project_l2, project_linf

_STEPS = {
    "tramer": {"L1": 20, "L2": 20, "Linf": 10},
    "madaan": {"L1": 20, "L2": 10, "Linf": 10},
}
_MADAAN_STEP_SIZE = {"L1": 1.0, "L2": 30 / 255, "Linf": 1 / 255}


class PGD(Attack):
    """PGD on the cross-entropy, returning the last iterate; L1 by sparse steps (SLIDE).

    Presets give steps and step sizes for L1, L2, Linf: ``tramer`` takes the paper's 20, 20, 10 steps of 2.5 eps/steps
    (Tramèr and Boneh); ``madaan`` takes 20, 10, 10 steps of 1.0, 30/255, 1/255 (Madaan et al., for CIFAR-10).
    """

    kind = "pgd"
    preset: Literal["tramer", "madaan"] = "tramer"
    steps: Steps | dict[Norm, Steps] | None = None
    """One number for all norms or one for each; None takes the preset's."""
    step_size: StepSize | dict[Norm, StepSize] | None = None
    """In the units of the norm (L1: mass per step); None takes the preset's."""
    percentile: Number = Field(default=99, ge=0, lt=100)
    """L1: only coordinates whose gradient reaches this percentile of its absolute values move."""
    l1_projection: Literal["ball", "ball-and-box"] = "ball"
    """L1: onto the ball, then clip to the box, as published; or exactly onto their intersection, which spends the
    whole budget and is stronger where many coordinates meet the box."""
    random_start: bool = True

    @property
    def uses_noise(self) -> bool:
        return self.random_start

    def steps_for(self, threat: Threat) -> int:
        if not isinstance(threat, LpBall):
            raise UserError(f"{self.kind} searches inside Lp balls, not {type(threat).__name__}")
        return by_norm(self.steps, threat.norm, _STEPS[self.preset])

    def step_size_for(self, threat: LpBall) -> float:
        default: dict[str, float] = {threat.norm: 2.5 * threat.eps / max(self.steps_for(threat), 1)}
        if self.preset == "madaan":
            default = _MADAAN_STEP_SIZE
        return by_norm(self.step_size, threat.norm, default)

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        x_adv = x.clone()
        if self.random_start:
            for group in groups:
                x_adv[group.rows] = random_start(group.threat, x[group.rows], noise[group.rows])
        for step in range(groups[0].steps):
            alive = [group for group in groups if group.steps > step]
            end = alive[-1].rows.stop
            _, _, gradient = loss_and_gradient(model, x_adv[:end], y[:end])
            for group in alive:
                rows = group.rows
                x_adv[rows] = self._step(group.threat, x_adv[rows], x[rows], gradient[rows])
        return AttackResult(x_adv, x_adv, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)

    def _step(self, threat: Threat, x_adv: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
        assert isinstance(threat, LpBall)
        size, exact = self.step_size_for(threat), self.l1_projection == "ball-and-box"
        return ascend(threat, x_adv, x, gradient, size=size, percentile=self.percentile, exact=exact)


def ascend(
    threat: LpBall, x_adv: Tensor, x: Tensor, gradient: Tensor, *, size: float, percentile: float, exact: bool = False
) -> Tensor:
    """One step of steepest ascent in the threat's norm, projected onto its ball, then clipped to the box.

    Args:
        threat: the ball around ``x``.
        x_adv, x, gradient: where to step from, the originals, and the loss's gradient there, all (B, C, H, W).
        size: length of the step in the norm.
        percentile: L1: only coordinates whose gradient reaches it move (:func:`top_signs`).
        exact: L1: project onto the intersection of ball and box instead.
    """
    origin, point, g = x.flatten(1), x_adv.flatten(1), gradient.flatten(1)
    if threat.norm == "Linf":
        delta = project_linf(point + size * signs(g) - origin, threat.eps)
    elif threat.norm == "L2":
        delta = project_l2(point + size * unit(inward(g, point)) - origin, threat.eps)
    else:
        moved = point + size * top_signs(inward(g, point), percentile)
        if exact:
            return threat.project(moved.view_as(x), x)
        delta = project_l1(moved - origin, threat.eps)
    return threat.shifted(origin, delta).view_as(x)


def random_start(threat: Threat, x: Tensor, noise: Tensor) -> Tensor:
    """A start inside threat and box (Tramèr and Boneh): uniform in the Linf ball, a Gaussian direction of L2 length
    eps, a Laplace direction of L1 length eps.

    Args:
        x: images (B, C, H, W).
        noise: U[0, 1) of the same shape; each distribution is a function of it.
    """
    assert isinstance(threat, LpBall)
    u = (2 * noise.flatten(1) - 1).clamp(-1 + 1e-6, 1 - 1e-6)
    if threat.norm == "Linf":
        delta = threat.eps * u
    elif threat.norm == "L2":
        delta = torch.special.erfinv(u)
        delta = delta * (threat.eps / torch.linalg.vector_norm(delta, dim=1, keepdim=True))
    else:
        delta = -u.sign() * torch.log1p(-u.abs())
        delta = delta * (threat.eps / delta.abs().sum(dim=1, keepdim=True))
    return threat.shifted(x, delta.view_as(x))


def inward(gradient: Tensor, point: Tensor) -> Tensor:
    """The gradient (B, D) without the coordinates where ``point`` is at a bound of the box and would leave it."""
    leaves = ((point <= 0) & (gradient < 0)) | ((point >= 1) & (gradient > 0))
    return gradient.masked_fill(leaves, 0)


def top_signs(gradient: Tensor, percentile: float) -> Tensor:
    """Signs of the coordinates at or above a percentile of |gradient|, scaled to L1 length 1; (B, D) -> (B, D).

    The percentile is numpy's (linear interpolation), so 99 keeps 31 of 3,072 coordinates. A zero gradient gives zero,
    one with NaN only NaN.
    """
    size = gradient.abs()
    dimensions = size.shape[1]
    keep = dimensions - math.ceil((dimensions - 1) * percentile / 100)
    threshold = size.topk(keep, dim=1).values[:, -1:]
    direction = signs(gradient) * (size >= threshold)
    return direction / direction.abs().sum(dim=1, keepdim=True).clamp(min=1)


Value = TypeVar("Value", int, float)


def by_norm(value: Value | dict[Norm, Value] | None, norm: Norm, default: dict[str, Value]) -> Value:
    """A setting that is one value for all norms, one for each, or the default's."""
    if value is None:
        return default[norm]
    if isinstance(value, dict):
        return value[norm] if norm in value else default[norm]
    return value
