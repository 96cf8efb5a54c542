"""Attacks that bound their perturbation by a measure of their own, and so search among all images."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rome.attacks.base import NOT_EVALUATED, Attack, AttackResult, Group, Steps
from rome.attacks.checks import check_bound
from rome.attacks.engine import Model
from rome.threats import AnyImage
from rome.threats.lp import RTOL

Form = Literal["corrected", "published"]
"""``published``: what the released code computes, its defects included, to compare with numbers that came from it;
docs/decisions/unseen-transforms.md and perceptual.md list them."""


class FreeAttack(Attack):
    """Base of attacks that run under :class:`AnyImage` and check their own bound after the search."""

    searches = (
        AnyImage,
        "bounds its perturbation itself (to train on it give threats: [{{kind: attack, attack: {kind}}}]), "
        "so its threat is AnyImage(label='{kind}')",
    )
    steps: Steps
    """Iterations of the search."""
    draws_by_image: ClassVar[bool] = True

    def check(self, size: Tensor, bound: float) -> None:
        """Refuse a result outside of the attack's own bound (:func:`rome.attacks.checks.check_bound`).

        Args:
            size: (B,), how much of the bound each example used.
        """
        check_bound(self.kind, size <= bound * (1 + RTOL), size)


class LastIterate(FreeAttack):
    """Base of the free attacks that return their last iterate, as published, or with ``stop`` the first wrong one."""

    stop: bool = False
    """An example is done with its first image that is misclassified, and costs no passes of the model any more. At
    least as strong as the last image, which may be classified correctly again; not the published protocol."""

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        if not self.stop:
            images = self.last(model, x, y, noise)
        else:
            leaving = _Leaving(model, x, y)
            try:
                images = self.last(leaving, x, y, noise)
            except _NobodyLeftError:
                images = x
            images = torch.where(leaving.gone.view(-1, 1, 1, 1), leaving.images.clamp(0, 1), images)
        return AttackResult(images, images, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)

    @abstractmethod
    def last(self, model: Model, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """The last iterate (B, C, H, W) of a search whose every forward is at images that are allowed.

        Nobody's steps may depend on the logits of others: of examples that are done these are zero, with no gradient.
        """


class _Leaving:
    """A model that computes only the examples not misclassified before, and records the others' first wrong images.

    Waits for the device at every forward.
    """

    def __init__(self, model: Model, x: Tensor, y: Tensor) -> None:
        self.model, self.y = model, y
        self.images, self.gone = x.clone(), torch.zeros_like(y, dtype=torch.bool)

    def __call__(self, x: Tensor) -> Tensor:
        rows = (~self.gone).nonzero().flatten()
        if not len(rows):
            raise _NobodyLeftError
        logits = self.model(x[rows])
        wrong = rows[logits.detach().argmax(dim=1) != self.y[rows]]
        self.images[wrong] = x.detach()[wrong]
        self.gone[wrong] = True
        return logits.new_zeros(len(x), logits.shape[1]).index_copy(0, rows, logits)


class _NobodyLeftError(Exception):
    """Every example is done."""


def changed_pixels(x_adv: Tensor, x: Tensor) -> Tensor:
    """How many pixels differ in any channel: int64 (B,)."""
    return (x_adv != x).any(dim=1).flatten(1).sum(dim=1)
