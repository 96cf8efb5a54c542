"""Attacks that bound their perturbation by a measure of their own and so run under a threat that allows any image."""

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
"""``published`` computes what the released code computes, including its defects, for comparison with published numbers;
docs/decisions/unseen-transforms.md and perceptual.md list the defects."""


class FreeAttack(Attack):
    """Base of the attacks that run under :class:`AnyImage` and enforce a bound of their own."""

    accepts = (
        AnyImage,
        "bounds its perturbation itself (to train on it give threats: [{{kind: attack, attack: {kind}}}]), "
        "so its threat is AnyImage(label='{kind}')",
    )
    steps: Steps
    """Iterations of the search."""
    draws_by_image: ClassVar[bool] = True

    def check(self, size: Tensor, bound: float) -> None:
        """Refuse a result outside the attack's own bound (:func:`rome.attacks.checks.check_bound`).

        Args:
            size: (B,), size of each perturbation, in the units of ``bound``.
        """
        check_bound(self.kind, size <= bound * (1 + RTOL), size)


class LastIterate(FreeAttack):
    """Base of the free attacks that return their last iterate, as published, or the first misclassified (``stop``)."""

    stop: bool = False
    """Stop searching for an example at its first misclassified image, which saves the remaining forward and backward
    passes. At least as strong as returning the last image, which may be classified correctly again, but not the
    published protocol."""

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        if not self.stop:
            images = self.last(model, x, y, noise)
        else:
            stopping = _StoppingModel(model, x, y)
            try:
                images = self.last(stopping, x, y, noise)
            except _AllDoneError:
                images = x
            images = torch.where(stopping.done.view(-1, 1, 1, 1), stopping.images.clamp(0, 1), images)
        return AttackResult(images, images, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)

    @abstractmethod
    def last(self, model: Model, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        """Return the last iterate (B, C, H, W) of a search that evaluates the model only at allowed images.

        The steps of an example must not depend on the logits of other examples: once an example is done, its logits are
        zero and have no gradient.
        """


class _StoppingModel:
    """A model that evaluates only examples not misclassified so far and records the first misclassified image of each.

    Waits for the device at every forward.
    """

    def __init__(self, model: Model, x: Tensor, y: Tensor) -> None:
        self.model, self.y = model, y
        self.images, self.done = x.clone(), torch.zeros_like(y, dtype=torch.bool)

    def __call__(self, x: Tensor) -> Tensor:
        rows = (~self.done).nonzero().flatten()
        if not len(rows):
            raise _AllDoneError
        logits = self.model(x[rows])
        wrong = rows[logits.detach().argmax(dim=1) != self.y[rows]]
        self.images[wrong] = x.detach()[wrong]
        self.done[wrong] = True
        return logits.new_zeros(len(x), logits.shape[1]).index_copy(0, rows, logits)


class _AllDoneError(Exception):
    """Every example is done."""


def changed_pixels(x_adv: Tensor, x: Tensor) -> Tensor:
    """Number of pixels that differ in any channel: int64 (B,)."""
    return (x_adv != x).any(dim=1).flatten(1).sum(dim=1)
