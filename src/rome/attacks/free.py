"""Attacks that bound their perturbation by a measure of their own, and so search among all images."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rome.attacks.base import Attack
from rome.attacks.pgd import Steps
from rome.errors import UserError
from rome.threats import RTOL, AnyImage, Threat


class FreeAttack(Attack):
    """Base of attacks that run under :class:`AnyImage` and check their own bound after the search."""

    steps: Steps
    draws_by_image: ClassVar[bool] = True

    def steps_for(self, threat: Threat) -> int:
        if not isinstance(threat, AnyImage):
            raise UserError(
                f"{self.kind} bounds its perturbation itself, so its threat is AnyImage(label={self.kind!r}), "
                f"not {type(threat).__name__}"
            )
        return self.steps

    def check(self, size: Tensor, bound: float) -> None:
        """Refuse a result outside of the attack's own bound.

        Args:
            size: (B,), how much of the bound each example used.

        Raises:
            FloatingPointError: a size is not finite.
            AssertionError: one is too large: a bug in the attack.
        """
        inside = size <= bound * (1 + RTOL)
        if bool(inside.all()):
            return
        if not bool(size.isfinite().all()):
            raise FloatingPointError(f"{self.kind} met gradients of the model that are not finite")
        raise AssertionError(f"{self.kind} left its bound on {int((~inside).sum())} of {len(size)} examples: a bug")


def changed_pixels(x_adv: Tensor, x: Tensor) -> Tensor:
    """How many pixels differ in any channel: int64 (B,)."""
    return (x_adv != x).any(dim=1).flatten(1).sum(dim=1)
