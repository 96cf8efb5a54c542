"""Lp balls, and the budgets of the paper (5.1)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from rome.core.component import Number
from rome.threats.base import Threat
from rome.threats.projections import inward, project_l1, project_l2, project_linf, signs, top_signs, unit

RTOL = 1e-5
"""Relative tolerance on a budget, for rounding in x + delta - x."""


def _norm(value: Any) -> Any:
    text = str(value).lower().lstrip("l")
    return {"1": "L1", "1.0": "L1", "2": "L2", "2.0": "L2", "inf": "Linf", "infinity": "Linf"}.get(text, value)


Spelling = Literal["L1", "L2", "Linf", "l1", "l2", "linf", 1, 2, "1", "2", "inf"]
Norm = Annotated[Literal["L1", "L2", "Linf"], BeforeValidator(_norm, json_schema_input_type=Spelling)]
Value = TypeVar("Value")


class LpBall(Threat):
    """All images in [0,1] within ``eps`` of the original in the L1, L2 or Linf norm over C*H*W."""

    kind = "lp"
    norm: Norm
    """``L1``, ``L2`` or ``Linf``."""
    eps: Number = Field(ge=0)
    """The radius, for images in [0, 1]: ``8/255``."""
    label: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._+-]*)?$")
    """The name of the threat's column; empty: the norm, followed by the radius if other balls have the same norm."""

    @model_validator(mode="after")
    def _smaller_than_the_box(self) -> Self:
        if self.norm == "Linf" and self.eps > 1:
            raise ValueError(
                f"the Linf radius {self.eps:g} exceeds 1, the whole range of images in [0, 1]; write a radius in "
                f"levels of 8-bit images as a fraction of 255: {self.eps:g}/255"
            )
        return self

    @property
    def name(self) -> str:
        return self.label or self.norm

    @property
    def radius(self) -> str:
        """The radius as text: ``8/255`` if a Linf radius below 1 is a whole number of grey levels, else the number."""
        levels = round(255 * self.eps)
        if self.norm == "Linf" and 0 < levels < 255 and math.isclose(levels / 255, self.eps, rel_tol=1e-6):
            return f"{levels}/255"
        return f"{self.eps:g}"

    def setting(self, value: Value | dict[Norm, Value] | None, default: Value) -> Value:
        """A setting's value for this ball: the single value for all norms, or that of its norm, or else the default."""
        if isinstance(value, dict):
            return value.get(self.norm, default)
        return default if value is None else value

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Project onto the ball and the box. L1 and Linf: exactly onto their intersection. L2: onto the ball, then onto
        the box, which gives a point of both, but not always the nearest one (as in AutoAttack)."""
        origin = x.flatten(1)
        delta = x_adv.flatten(1) - origin
        delta = project_l1(delta, self.eps, -origin, 1 - origin) if self.norm == "L1" else self.shortened(delta)
        return self.shifted(origin, delta).view_as(x)

    def shortened(self, delta: Tensor) -> Tensor:
        """The nearest perturbation in the ball, ignoring the box: (B, D) -> (B, D)."""
        return {"L1": project_l1, "L2": project_l2, "Linf": project_linf}[self.norm](delta, self.eps)

    def steepest(self, gradient: Tensor, point: Tensor, percentile: float) -> Tensor:
        """The direction (B, D) of unit length in this norm in which the loss rises fastest, given its gradient (B, D).

        In L1 and L2, coordinates that would leave the box at ``point`` (B, D) do not move; in L1, only those move whose
        gradient reaches the percentile (:func:`~rome.threats.projections.top_signs`).
        """
        if self.norm == "Linf":
            return signs(gradient)
        gradient = inward(gradient, point)
        return unit(gradient) if self.norm == "L2" else top_signs(gradient, percentile)

    def random(self, noise: Tensor) -> Tensor:
        """Random perturbations (B, D) made from U[0, 1) noise (B, D), as in Tramèr and Boneh: uniform in the Linf ball,
        a Gaussian direction of L2 length eps, a Laplace direction of L1 length eps."""
        u = (2 * noise - 1).clamp(-1 + 1e-6, 1 - 1e-6)
        if self.norm == "Linf":
            return self.eps * u
        if self.norm == "L2":
            delta = torch.special.erfinv(u)
            return delta * (self.eps / torch.linalg.vector_norm(delta, dim=1, keepdim=True))
        delta = -u.sign() * torch.log1p(-u.abs())
        return delta * (self.eps / delta.abs().sum(dim=1, keepdim=True))

    def shifted(self, x: Tensor, delta: Tensor) -> Tensor:
        """``x + delta``, clamped to the box, for a ``delta`` inside the ball: (B, ...), (B, ...) -> (B, ...).

        Each sum is rounded, in float32 by up to 3e-8: over 150,528 coordinates that is 0.0045 in L1. If the result
        would leave the ball, sums are rounded towards ``x`` instead, so that no coordinate moves beyond its delta.
        """
        moved = (x + delta).clamp_(0, 1)
        if self.norm == "Linf":
            return moved
        outside = self.size(moved, x) > self.eps * (1 + RTOL)
        further = (_wide(moved) - _wide(x)).abs() > _wide(delta).abs()
        outside = outside.view(-1, *[1] * (x.ndim - 1))
        return torch.where(outside & further, torch.nextafter(moved, x), moved)

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        delta = _wide(x_adv) - _wide(x)
        return torch.linalg.vector_norm(delta.flatten(1), ord={"L1": 1, "L2": 2, "Linf": math.inf}[self.norm], dim=1)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        # Linf: x + eps, below 1, is rounded by up to a unit in the last place of 1; such errors do not add up
        rounding = torch.finfo(x.dtype).eps if self.norm == "Linf" else 0.0
        return super().contains(x_adv, x) & (self.size(x_adv, x) <= self.eps * (1 + RTOL) + rounding)


def _wide(x: Tensor) -> Tensor:
    """The tensor in float64, if the device supports it."""
    return x if x.device.type == "mps" else x.double()


class Unperturbed(LpBall):
    """No perturbation: the ball of radius 0, named ``clean``."""

    kind = "none"
    norm: Norm = "Linf"
    eps: Number = Field(default=0, ge=0, le=0)

    @property
    def name(self) -> str:
        return "clean"


def labelled(threats: Iterable[Threat]) -> tuple[Threat, ...]:
    """The threats in their order; several balls of one norm without a label get labels with their radii:
    ``Linf-8_255``."""
    given = tuple(threats)
    bare = Counter(threat.norm for threat in given if isinstance(threat, LpBall) and threat.name == threat.norm)
    return tuple(
        threat.model_copy(update={"label": f"{threat.norm}-{threat.radius.replace('/', '_')}"})
        if isinstance(threat, LpBall) and threat.name == threat.norm and bare[threat.norm] > 1
        else threat
        for threat in given
    )


class Budgets(tuple[LpBall, ...]):
    """Several Lp balls in a fixed order; ``budgets["Linf"]`` finds one by name."""

    def __getitem__(self, key: str | int) -> LpBall:  # type: ignore[override]
        if not isinstance(key, str):
            return super().__getitem__(key)
        found = {threat.name: threat for threat in self}
        if key not in found:
            raise KeyError(f"no threat {key!r}; there are {', '.join(found)}")
        return found[key]


def budgets(l1: float, l2: float, linf: float) -> Budgets:
    """Three Lp balls with these radii, in the paper's order L1, L2, Linf."""
    return Budgets((LpBall(norm="L1", eps=l1), LpBall(norm="L2", eps=l2), LpBall(norm="Linf", eps=linf)))


CIFAR10 = budgets(12, 0.5, 8 / 255)
"""CIFAR-10's budgets (paper 5.1)."""
IMAGENET = budgets(255, 2, 4 / 255)
"""Budgets for ImageNet-100 and ImageNet-1K (paper 5.1)."""
DIGITS = budgets(1.0, 0.35, 0.1)
"""Budgets for the 8x8 digits: about as hard for a small model as CIFAR-10's are for a large one."""
NAMED_BUDGETS = {"cifar10": CIFAR10, "imagenet": IMAGENET, "digits": DIGITS}
