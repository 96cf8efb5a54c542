"""Attacks that bound their perturbation by a measure of their own, and so search among all images."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rome.attacks.base import Attack, check_bound
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
                f"not {type(threat).__name__}; to train on it give threats: [{{kind: attack, attack: {self.kind}}}]"
            )
        return self.steps

    def check(self, size: Tensor, bound: float) -> None:
        """Refuse a result outside of the attack's own bound (:func:`rome.attacks.base.check_bound`).

        Args:
            size: (B,), how much of the bound each example used.
        """
        check_bound(self.kind, size <= bound * (1 + RTOL), size)


def changed_pixels(x_adv: Tensor, x: Tensor) -> Tensor:
    """How many pixels differ in any channel: int64 (B,)."""
    return (x_adv != x).any(dim=1).flatten(1).sum(dim=1)
