"""Fast Lagrangian Perceptual Attack: what perceptual adversarial training trains on (Laidlaw et al. 2021, A.3)."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.base import NOT_EVALUATED, Attack, AttackResult, Group
from rome.attacks.engine import Model, graphs_of, margin
from rome.attacks.perceptual.features import Perception, distances
from rome.core.component import Number
from rome.threats import Perceptual

START = 0.01
"""Standard deviation of the random start."""
ROUND = 8
"""Where graphs are replayed, the examples that are searched are so many, or a multiple, in each group: the others that
make up the number are searched in vain, and few shapes occur."""


class FastLPA(Attack):
    """Fast-LPA: raises the margin with a penalty on the perceptual distance, without projection (Laidlaw et al. 2021).

    The i-th of N steps (i from 0) descends -margin + lambda_i relu(d - bound), lambda_i = 10 * 0.1^(1 - i/N), along the
    gradient scaled to length 1, g. How fast d changes along it is the finite difference
    ``r = |phi(x') - phi(x' - h g)| / h``; the step is g s_i / (r + 1e-4) with s_i = bound * 0.1^(i/N), a movement of
    s_i in features. Images stay in the box, and in the bound only nearly: nothing projects.

    A step costs a forward and backward of the model over the batch, and a forward over the examples of ``self`` for r;
    the examples of another network cost a forward, a backward and a forward of that one.
    """

    kind = "fast-lpa"
    searches = (Perceptual, "searches inside perceptual threats")
    steps: int = Field(default=10, ge=1)
    """N; the paper trains with 10."""
    only_correct: bool = False
    """Leave alone what is misclassified as it is (PAT). The others are attacked as one smaller batch."""
    penalty: Number = Field(default=10, ge=0)
    """Where lambda ends; it starts at a tenth."""
    h: Number = Field(default=0.1, gt=0)
    """Length of the finite difference."""

    copies: ClassVar[int] = 1
    """How many rows of the batch belong to one example; they stand together and start as the same image."""

    def gain(self, logits: Tensor, y: Tensor) -> Tensor:
        """What each example's steps raise."""
        return margin(logits, y)

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        images, graphs = x.clone(), graphs_of(model)
        if not self.only_correct:
            images = self._climb(model, x, y, groups, noise)
        else:
            correct = model(x[:: self.copies]).argmax(dim=1) == y[:: self.copies]
            correct = correct.repeat_interleave(self.copies)
            chosen = correct.cpu()  # waits for the device once
            if graphs is not None:
                chosen = rounded_up(chosen, groups, ROUND * self.copies)
            if chosen.any():
                rows, groups = chosen.nonzero().flatten().to(x.device), among(groups, chosen)

                def climb(x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
                    return self._climb(model, x, y, groups, noise)

                if graphs is None:
                    images[rows] = climb(x[rows], y[rows], noise[rows])
                else:
                    key = (repr(self), *((repr(group.threat), group.rows.stop) for group in groups))
                    found = graphs.call(key, climb, x[rows], y[rows], noise[rows])
                    images[rows] = torch.where(correct[rows].view(-1, 1, 1, 1), found, x[rows])
        return AttackResult(images, images, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)

    @property
    def replayable(self) -> bool:
        return not self.only_correct

    def _climb(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> Tensor:
        seen = Perception(model, groups, x.device)
        bound = seen.bounds(x)
        with seen.still():
            origin = seen.features(x)
            point = x + START * gaussian(noise)
            for i in range(self.steps):
                weight = self.penalty * 0.1 ** (1 - i / self.steps)
                phi, gradient = self._gradient(seen, point, y, origin, bound, weight)
                gradient = gradient / (length(gradient) + 1e-8)
                rate = distances(phi, seen.features(point - self.h * gradient)) / self.h
                step = bound * 0.1 ** (i / self.steps) / (rate + 1e-4)
                point = (point - step.view(-1, 1, 1, 1) * gradient).clamp_(0, 1)
        return point

    def _gradient(
        self, seen: Perception, point: Tensor, y: Tensor, origin: list[Tensor], bound: Tensor, weight: float
    ) -> tuple[list[Tensor], Tensor]:
        """Features at the point, and the gradient of the penalised loss; summed, so that examples do not interfere."""
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            logits, phi = seen(point)
            excess = (distances(phi, origin) - bound).relu()
            (gradient,) = torch.autograd.grad(weight * excess.sum() - self.gain(logits, y).sum(), point)
        return [part.detach() for part in phi], gradient


class FastLPAWithPair(FastLPA):
    """Fast-LPA on examples that stand three times in a row: one image of high margin, and two far apart in the logits.

    The second and third raise |f(x') - f(x'')|_2 instead of the margin, each with its own start, penalty and step: the
    pair that variation regularisation compares (Dai et al. 2022). One search serves all three.
    """

    copies = 3

    def gain(self, logits: Tensor, y: Tensor) -> Tensor:
        first, one, other = logits.view(-1, 3, logits.shape[1]).unbind(1)
        return margin(first, y[::3]) + torch.linalg.vector_norm(one - other, dim=1)


def gaussian(noise: Tensor) -> Tensor:
    """U[0, 1) to N(0, 1), elementwise."""
    return math.sqrt(2) * torch.special.erfinv((2 * noise - 1).clamp(-1 + 1e-6, 1 - 1e-6))


def length(images: Tensor) -> Tensor:
    return torch.linalg.vector_norm(images.flatten(1), dim=1).view(-1, 1, 1, 1)


def rounded_up(chosen: Tensor, groups: list[Group], multiple: int) -> Tensor:
    """The chosen rows of the batch (bool, CPU) and a few others, so that every group has a multiple of so many, or all
    of its own."""
    chosen = chosen.clone()
    for _, rows, _ in groups:
        others = (~chosen[rows]).nonzero().flatten()
        chosen[rows.start + others[: -int(chosen[rows].sum()) % multiple]] = True
    return chosen


def among(groups: list[Group], chosen: Tensor) -> list[Group]:
    """The groups among the chosen rows of the batch (bool, CPU) alone."""
    found: list[Group] = []
    for group in groups:
        size = int(chosen[group.rows].sum())
        start = found[-1].rows.stop if found else 0
        if size:
            found.append(group._replace(rows=slice(start, start + size)))
    return found
