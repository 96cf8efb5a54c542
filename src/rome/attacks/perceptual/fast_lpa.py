"""Fast Lagrangian Perceptual Attack, used in perceptual adversarial training (Laidlaw et al. 2021, A.3)."""

from __future__ import annotations

import math
from functools import partial
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
"""When graphs are replayed, the number of examples searched in each group is rounded up to a multiple of this, so that
few shapes occur; the results for the additional examples are discarded."""


class FastLPA(Attack):
    """Fast-LPA: raises the margin under a penalty on the perceptual distance, without projection (Laidlaw et al. 2021).

    The i-th of N steps (i from 0) descends -margin + lambda_i relu(d - bound), lambda_i = 10 * 0.1^(1 - i/N), along its
    gradient scaled to length 1, g. The rate at which d changes along g is the finite difference
    ``r = |phi(x') - phi(x' - h g)| / h``; the step is g s_i / (r + 1e-4) with s_i = bound * 0.1^(i/N), a distance of
    s_i in features. Images stay in the box but only approximately in the bound, as they are not projected.

    A step costs a forward and backward of the model over the batch and, for r, a forward over the examples of ``self``;
    the examples of another network cost two forwards and a backward of that network.
    """

    kind = "fast-lpa"
    accepts = (Perceptual, "searches inside perceptual threats")
    steps: int = Field(default=10, ge=1)
    """Number of steps N; the paper trains with 10."""
    only_correct: bool = False
    """Leave examples unchanged that are already misclassified (PAT); the others are attacked as one smaller batch."""
    penalty: Number = Field(default=10, ge=0)
    """Final value of lambda, which starts at a tenth of it."""
    h: Number = Field(default=0.1, gt=0)
    """Step length of the finite difference."""

    copies: ClassVar[int] = 1
    """Number of consecutive rows of the batch that belong to one example and contain the same image."""

    def gain(self, logits: Tensor, y: Tensor) -> Tensor:
        """The quantity that the steps raise, for each example."""
        return margin(logits, y)

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        if not self.only_correct:
            images = self._climb(model, groups, x, y, noise)
        else:
            images, graphs = x.clone(), graphs_of(model)
            correct = model(x[:: self.copies]).argmax(dim=1) == y[:: self.copies]
            correct = correct.repeat_interleave(self.copies)
            chosen = correct.cpu()  # waits for the device once
            if graphs is not None:
                chosen = rounded_up(chosen, groups, ROUND * self.copies)
            if chosen.any():
                rows, groups = chosen.nonzero().flatten().to(x.device), among(groups, chosen)
                climb = partial(self._climb, model, groups)
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

    def _climb(self, model: Model, groups: list[Group], x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        perception = Perception(model, groups, x.device)
        bound = perception.bounds(x)
        with perception.frozen():
            origin = perception.features(x)
            point = x + START * gaussian(noise)
            for i in range(self.steps):
                weight = self.penalty * 0.1 ** (1 - i / self.steps)
                phi, gradient = self._gradient(perception, point, y, origin, bound, weight)
                gradient = gradient / (length(gradient) + 1e-8)
                rate = distances(phi, perception.features(point - self.h * gradient)) / self.h
                step = bound * 0.1 ** (i / self.steps) / (rate + 1e-4)
                point = (point - step.view(-1, 1, 1, 1) * gradient).clamp_(0, 1)
        return point

    def _gradient(
        self, perception: Perception, point: Tensor, y: Tensor, origin: list[Tensor], bound: Tensor, weight: float
    ) -> tuple[list[Tensor], Tensor]:
        """Return features at ``point`` and the gradient of the penalised loss, summed to keep examples independent."""
        point = point.detach().requires_grad_()
        with torch.enable_grad():
            logits, phi = perception(point)
            excess = (distances(phi, origin) - bound).relu()
            (gradient,) = torch.autograd.grad(weight * excess.sum() - self.gain(logits, y).sum(), point)
        return [part.detach() for part in phi], gradient


class FastLPAWithPair(FastLPA):
    """Fast-LPA for three consecutive copies of each image: one raises the margin, two move apart in the logits.

    The second and third copy raise |f(x') - f(x'')|_2 instead of the margin, each with its own start, penalty and step:
    they are the pair that variation regularisation compares (Dai et al. 2022). One search serves all three.
    """

    copies = 3

    def gain(self, logits: Tensor, y: Tensor) -> Tensor:
        first, one, other = logits.view(-1, 3, logits.shape[1]).unbind(1)
        return margin(first, y[::3]) + torch.linalg.vector_norm(one - other, dim=1)


def gaussian(noise: Tensor) -> Tensor:
    """Convert U[0, 1) to N(0, 1), elementwise."""
    return math.sqrt(2) * torch.special.erfinv((2 * noise - 1).clamp(-1 + 1e-6, 1 - 1e-6))


def length(images: Tensor) -> Tensor:
    return torch.linalg.vector_norm(images.flatten(1), dim=1).view(-1, 1, 1, 1)


def rounded_up(chosen: Tensor, groups: list[Group], multiple: int) -> Tensor:
    """Choose additional rows of the batch (bool, CPU) until the number in every group is a multiple of ``multiple`` or
    the group is complete."""
    chosen = chosen.clone()
    for _, rows, _ in groups:
        others = (~chosen[rows]).nonzero().flatten()
        chosen[rows.start + others[: -int(chosen[rows].sum()) % multiple]] = True
    return chosen


def among(groups: list[Group], chosen: Tensor) -> list[Group]:
    """The groups of a batch reduced to its chosen rows (bool, CPU)."""
    found: list[Group] = []
    for group in groups:
        size = int(chosen[group.rows].sum())
        start = found[-1].rows.stop if found else 0
        if size:
            found.append(group._replace(rows=slice(start, start + size)))
    return found
