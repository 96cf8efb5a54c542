"""MSD: train on the worst point of a path through the union of the threats."""

from __future__ import annotations

from typing import ClassVar, cast

from pydantic import Field
from torch import Tensor

from rome.attacks import Attack
from rome.attacks.base import StepSize
from rome.attacks.lp.msd import steepest_descent
from rome.core.component import Number
from rome.core.errors import UserError
from rome.methods.base import Examples, Planned, PlannedMethod, TrainContext
from rome.threats import LpBall, Threat
from rome.threats.lp import Norm

_PATH = {"L1": 5 / 3, "L2": 200 / 51, "Linf": 5 / 2}
"""Total length of all steps, in radii. For CIFAR-10's radii 12, 0.5, 8/255 and 20 steps, this gives the step sizes of
Madaan et al., 1.0, 25/255, 1/255; with other radii or numbers of steps, the path covers as much of the balls."""


class MSD(PlannedMethod):
    """MSD: the worst point of a path that in each step takes the worst of the steepest steps in all norms.

    Maini et al., "Adversarial robustness against the union of multiple perturbation models" (ICML 2020), with the
    settings of Madaan et al. 2021. For the regularizer, an example's threat is the one whose step led to it.
    """

    kind = "msd"
    papers = ("maini2020adversarial",)
    own_attack: ClassVar[str] = "multi steepest descent"
    steps: int = Field(default=20, ge=1)
    """Iterations; the paper's setting for ImageNet is 40."""
    step_size: StepSize | dict[Norm, StepSize] | None = None
    """Step size, in the units of the norm (L1: mass per step). None: all steps together cover 5/3, 200/51 and 5/2 radii
    in L1, L2 and Linf."""
    percentile: Number = Field(default=99, ge=0, lt=100)
    """In L1, a step moves only coordinates whose absolute gradient reaches this percentile."""

    def training_threats(self, threats: tuple[Threat, ...], attack: Attack) -> tuple[Threat, ...]:
        for threat in threats:
            if not isinstance(threat, LpBall):
                raise UserError(f"it takes steps in Lp norms, but {threat.name} is not an Lp ball; leave it out")
        return threats

    def step_size_for(self, threat: LpBall) -> float:
        """The step size for a threat, by default such that all steps together have the length in :data:`_PATH`."""
        return threat.setting(self.step_size, _PATH[threat.norm] * threat.eps / self.steps)

    def plan(self, context: TrainContext, x: Tensor, y: Tensor) -> Planned:
        threats = cast("tuple[LpBall, ...]", context.threats)
        sizes = [self.step_size_for(threat) for threat in threats]
        attack = steepest_descent(context.attacked, x, y, threats, sizes, steps=self.steps, percentile=self.percentile)
        return Planned(attack, (y,), lambda found, y: Examples(found.images, y, found.chosen))
