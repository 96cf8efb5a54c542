"""Functional attacks search for a smooth transformation of the image; this is the base of StAdv and ReColorAdv.

Xiao et al., "Spatially transformed adversarial examples" (ICLR 2018); Laidlaw and Feizi, "Functional adversarial
attacks" (NeurIPS 2019). The search is that of mister_ed (Jordan et al. 2019), configured as in Laidlaw et al. 2021
(github.com/cassidylaidlaw/perceptual-advex) and therefore as in the paper.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.base import Steps
from rome.attacks.engine import at_least_float32, margin
from rome.attacks.transforms.base import Transform, TransformAttack
from rome.core.component import Number


class FunctionalAttack(TransformAttack):
    """Maximises margin(f(T(x)), y) - tau * roughness(shift) with Adam; the shift moves T's parameters off the identity.

    The margin is max_{j != y} z_j - z_y without a cap. The shift starts at zero and is projected onto the l-inf ball of
    radius ``bound`` before every forward and after the last step; the last iterate is the result. Adam works
    elementwise on a sum over the examples, so that they are optimised independently.
    """

    starts_at_random: ClassVar[bool] = False
    steps: Steps = 20
    """Iterations of the search."""
    bound: Number = Field(ge=0)
    """Largest shift of a parameter, in the units of that parameter."""
    lr: Number = Field(gt=0)
    """Adam's learning rate."""
    tau: Number = Field(ge=0)
    """Weight of the roughness."""

    @abstractmethod
    def identity(self, x: Tensor) -> Tensor:
        """Parameters of the identity transformation: (1, nodes ..., n) or (B, nodes ..., n)."""

    @abstractmethod
    def valid(self, parameters: Tensor) -> Tensor:
        """Valid parameters near the given ones."""

    @abstractmethod
    def apply(self, x: Tensor, parameters: Tensor) -> Tensor:
        """The transformed images."""

    def prepare(self, x: Tensor, noise: Tensor) -> Transform:
        return _Shifted(self, x)

    def gain(self, logits: Tensor, y: Tensor, variables: Tensor) -> Tensor:
        return margin(at_least_float32(logits), y) - self.tau * roughness(variables)

    def stepper(self, transform: Transform) -> Callable[[Tensor, Tensor], Tensor]:
        shift = transform.start.clone()
        optimizer = torch.optim.Adam([shift], lr=self.lr, maximize=True)

        def step(variables: Tensor, gradient: Tensor) -> Tensor:
            shift.copy_(variables).grad = gradient
            optimizer.step()
            return transform.project(shift)

        return step


class _Shifted(Transform):
    def __init__(self, attack: FunctionalAttack, x: Tensor) -> None:
        self.attack, self.x, self.identity = attack, x, attack.identity(x)
        self.low, self.high = -attack.bound, attack.bound
        super().__init__(self.project(self.identity.new_zeros((len(x), *self.identity.shape[1:]))))

    def images(self, variables: Tensor) -> Tensor:
        return self.attack.apply(self.x, self.identity + variables)

    def project(self, variables: Tensor) -> Tensor:
        """Project onto valid parameters first, then onto the ball."""
        return super().project(self.attack.valid(self.identity + variables) - self.identity)


def roughness(shift: Tensor) -> Tensor:
    """Sum over the nodes of a grid and their neighbours along each axis of sqrt(||s - s'||^2 + 1e-10).

    (B, nodes ..., n) -> (B,). Every pair counts twice, once from each side. The published codes also count border nodes
    as their own neighbours, which only adds a constant and is left out.
    """
    total = shift.new_zeros(len(shift))
    for axis in range(1, shift.ndim - 1):
        step = shift.diff(dim=axis)
        total = total + 2 * (step.square().sum(dim=-1) + 1e-10).sqrt().flatten(1).sum(dim=1)
    return total
