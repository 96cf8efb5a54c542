"""Projected gradient descent under L1, L2 and Linf (paper 5.1; Madry et al. 2018; Tramèr and Boneh 2019)."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.base import NOT_EVALUATED, Attack, AttackResult, Group, Steps, StepSize
from rome.attacks.engine import Model, loss_and_gradient
from rome.core.component import Number
from rome.threats import LpBall, Threat
from rome.threats.lp import Norm

_STEPS = {"tramer": {"L1": 20, "L2": 20, "Linf": 10}, "madaan": {"L1": 20, "L2": 10, "Linf": 10}}
_MADAAN_STEP_SIZE = {"L1": 1.0, "L2": 30 / 255, "Linf": 1 / 255}


class PGD(Attack):
    """PGD on the cross-entropy; returns the last iterate and takes sparse steps in L1 (SLIDE).

    A preset gives the steps and step sizes for L1, L2, Linf: ``tramer`` is the paper's choice of 20, 20, 10 steps of
    2.5 eps/steps (Tramèr and Boneh); ``madaan`` is 20, 10, 10 steps of 1.0, 30/255, 1/255 (Madaan et al., for
    CIFAR-10).
    """

    kind = "pgd"
    preset: Literal["tramer", "madaan"] = "tramer"
    """Source of the steps and step sizes that are not set: Tramèr and Boneh, or Madaan et al."""
    steps: Steps | dict[Norm, Steps] | None = None
    """Iterations: one number for all norms, or one for each norm; None: the preset's."""
    step_size: StepSize | dict[Norm, StepSize] | None = None
    """Length of a step in the norm (L1: total change per step); None: the preset's."""
    percentile: Number = Field(default=99, ge=0, lt=100)
    """L1: only coordinates whose gradient reaches this percentile of its absolute values move."""
    l1_projection: Literal["ball", "ball-and-box"] = "ball"
    """L1: project onto the ball, then clip to the box, as published; or project exactly onto their intersection, which
    uses the whole budget and is stronger if many coordinates are at the border of the box."""
    random_start: bool = True
    """Start at a random point of the ball instead of the image."""

    def steps_for(self, threat: Threat) -> int:
        ball = self.accepted(threat)
        return ball.setting(self.steps, _STEPS[self.preset][ball.norm])

    def step_size_for(self, threat: LpBall) -> float:
        tramer = 2.5 * threat.eps / max(self.steps_for(threat), 1)
        return threat.setting(self.step_size, tramer if self.preset == "tramer" else _MADAAN_STEP_SIZE[threat.norm])

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        x_adv = x.clone()
        if self.random_start:
            for threat, rows, _ in groups:
                x_adv[rows] = random_start(threat, x[rows], noise[rows])
        move = partial(ascend, percentile=self.percentile, exact=self.l1_projection == "ball-and-box")
        for step in range(groups[0].steps):
            alive = [group for group in groups if group.steps > step]
            end = alive[-1].rows.stop
            _, _, gradient = loss_and_gradient(model, x_adv[:end], y[:end])
            for ball, rows, _ in alive:
                x_adv[rows] = move(ball, x_adv[rows], x[rows], gradient[rows], size=self.step_size_for(ball))
        return AttackResult(x_adv, x_adv, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)


def ascend(
    threat: LpBall, x_adv: Tensor, x: Tensor, gradient: Tensor, *, size: float, percentile: float, exact: bool = False
) -> Tensor:
    """Take one step of steepest ascent in the threat's norm, project onto its ball, then clip to the box.

    Args:
        threat: the ball around ``x``.
        x_adv, x, gradient: the current images, the originals, and the loss's gradient at ``x_adv``, all (B, C, H, W).
        size: length of the step in the norm.
        percentile: L1: only coordinates whose gradient reaches this percentile of its absolute values move.
        exact: L1: project exactly onto the intersection of ball and box instead.
    """
    origin, point = x.flatten(1), x_adv.flatten(1)
    moved = point + size * threat.steepest(gradient.flatten(1), point, percentile)
    if exact and threat.norm == "L1":
        return threat.project(moved.view_as(x), x)
    return threat.shifted(origin, threat.shortened(moved - origin)).view_as(x)


def random_start(threat: LpBall, x: Tensor, noise: Tensor) -> Tensor:
    """Random start (B, C, H, W) inside threat and box (:meth:`LpBall.random`), from U[0, 1) of the same shape."""
    return threat.shifted(x, threat.random(noise.flatten(1)).view_as(x))
