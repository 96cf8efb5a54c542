"""MSD: train on the worst point of one path through the union of the threats."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field
from torch import Tensor

from rome.attacks import Attack
from rome.attacks.base import StepSize
from rome.attacks.lp.msd import steepest_descent
from rome.core.component import Number
from rome.core.errors import UserError
from rome.methods.base import Examples, MinMaxMethod, TrainContext
from rome.threats import LpBall, Threat
from rome.threats.lp import Norm

_PATH = {"L1": 5 / 3, "L2": 200 / 51, "Linf": 5 / 2}
"""Length of all steps together, in radii. 20 steps under CIFAR-10's 12, 0.5, 8/255 are Madaan et al.'s steps of 1.0,
25/255, 1/255; other radii and numbers of steps cover as much of their balls."""


class MSD(MinMaxMethod):
    """MSD: the worst point of a path that takes, step by step, the worst of all norms' steepest steps.

    Maini et al., "Adversarial robustness against the union of multiple perturbation models" (ICML 2020), with the
    settings of Madaan et al. 2021. For the regularizer an example counts to the threat whose step led to it.
    """

    kind = "msd"
    papers = ("maini2020adversarial",)
    own_attack: ClassVar[str] = "multi steepest descent"
    steps: int = Field(default=20, ge=1)
    """Iterations; the paper's setting for ImageNet is 40."""
    step_size: StepSize | dict[Norm, StepSize] | None = None
    """In the units of the norm (L1: mass per step); None takes 5/3, 200/51 and 5/2 radii over all steps for L1, L2 and
    Linf."""
    percentile: Number = Field(default=99, ge=0, lt=100)
    """L1: only coordinates whose gradient reaches this percentile of its absolute values move."""

    def trained(self, threats: tuple[Threat, ...], attack: Attack) -> tuple[Threat, ...]:
        for threat in threats:
            if not isinstance(threat, LpBall):
                raise UserError(f"it steps along Lp norms, and {threat.name} is no Lp ball; leave it out of threats")
        return threats

    def step_size_for(self, threat: LpBall) -> float:
        return threat.setting(self.step_size, _PATH[threat.norm] * threat.eps / self.steps)

    def perturb(self, context: TrainContext, x: Tensor, y: Tensor) -> Examples:
        threats = cast("tuple[LpBall, ...]", context.threats)
        sizes = [self.step_size_for(threat) for threat in threats]
        found = steepest_descent(context.attacked, x, y, threats, sizes, steps=self.steps, percentile=self.percentile)
        return Examples(found.images, y, found.chosen)
