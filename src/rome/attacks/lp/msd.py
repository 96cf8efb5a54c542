"""Multi steepest descent: one path through the union of several Lp balls (Maini et al., ICML 2020).

It is not an :class:`~rome.attacks.Attack`: an attack searches inside one threat for each example, whereas this searches
inside all of them at once and also returns which threat each image belongs to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rome.attacks.checks import check_batch
from rome.attacks.engine import Model, Plan, Search, log_odds, loss_and_gradient
from rome.attacks.lp.pgd import ascend
from rome.threats import LpBall


class InUnion(NamedTuple):
    """The images found in the union of several threats, one for each example of a batch."""

    images: Tensor
    """(B, C, H, W): the point of the path with the highest loss."""
    chosen: Tensor
    """(B,) int64: index of the threat whose step led there; the image is in that threat's ball."""
    loss: Tensor
    """(B,): cross-entropy at ``images``."""


def steepest_descent(
    model: Model,
    x: Tensor,
    y: Tensor,
    threats: Sequence[LpBall],
    sizes: Sequence[float],
    *,
    steps: int,
    percentile: float,
) -> Plan:
    """Plan to ascend the cross-entropy by steepest steps, for each example in the norm that raises it most; running the
    plan returns an :class:`InUnion`.

    The search starts at the image. Each iteration takes one gradient and, from the same point, makes one candidate for
    each threat: a steepest step in its norm (as in PGD), projected onto its ball and then the box. The candidate with
    the largest cross-entropy is the next point. The result is the best candidate of all iterations, never the image
    itself.

    An iteration costs a forward and a backward of the batch and one forward of all K candidates. The model is frozen
    and the results are checked as in every attack. Nothing is random.

    Args:
        model, x, y: as for :class:`rome.attacks.Attack`.
        threats: K Lp balls.
        sizes: length of each threat's step in its norm (L1: mass).
        steps: number of iterations, at least 1.
        percentile: L1: only coordinates whose gradient reaches this percentile of its absolute values move.

    Raises:
        UserError: a shape, dtype or range is invalid.
        FloatingPointError: the search reached images that are not finite.
    """
    check_batch(x, y, threats[0])
    x, members = x.detach(), list(zip(threats, sizes, strict=True))

    def search(x: Tensor, y: Tensor) -> tuple[InUnion, Tensor]:
        rows = torch.arange(len(x), device=x.device)
        best = InUnion(x, torch.zeros_like(y), torch.full_like(y, -torch.inf, dtype=torch.float32))
        point, labels = x, y.repeat(len(threats))
        for _ in range(steps):
            _, _, gradient = loss_and_gradient(model, point, y)
            steps_by_norm = [ascend(t, point, x, gradient, size=size, percentile=percentile) for t, size in members]
            candidates = torch.cat(steps_by_norm)
            losses = log_odds(model(candidates), labels).view(len(threats), -1)
            loss, chosen = losses.max(dim=0)
            point = candidates.view(len(threats), *x.shape)[chosen, rows]
            better = ~(loss <= best.loss)  # NaN counts as better, so that the check below finds it
            best = InUnion(
                torch.where(better.view(-1, 1, 1, 1), point, best.images),
                torch.where(better, chosen, best.chosen),
                torch.where(better, loss, best.loss),
            )
        inside = torch.stack([threat.contains(best.images, x) for threat in threats])
        best = best._replace(loss=F.softplus(best.loss).float())
        return best, inside[best.chosen, rows]

    return Plan(model, x, y, Search(("msd", repr(members), steps, percentile), search, (x, y)))
