"""Threat-guided gating diversification (paper 4.4, Eq. 6-8), and the base of all losses on the gates."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rome.core.component import Component, Number
from rome.core.distributed import group_means
from rome.core.errors import UserError
from rome.experts.gated import MeanOver, Recorded, count_layers


class Regularizer(Component):
    """A loss on the gates of the training forward pass, added to the cross-entropy with a weight (Eq. 9)."""

    default_kind = "diversification"

    weight: Number = Field(default=0.1, ge=0)
    """lambda, the weight of this loss."""
    gradient: Literal["backbone", "gates"] = "backbone"
    """Whether the loss trains everything before the gates too (as the paper writes it), or the gates alone."""

    @property
    def projects(self) -> bool:
        """Whether the loss uses the projections of the layers, so that they can be trained."""
        return False

    def check(self, experts: int, threats: int) -> None:
        """Raise UserError if the loss does not work with these numbers of experts and threats."""

    @abstractmethod
    def loss(self, records: list[Recorded], labels: Tensor, threats: int) -> Tensor:
        """Return the unweighted loss, a scalar; its gradient, averaged over processes, is that of the global batch.

        Args:
            records: the gates of every adapted layer for this process's B examples.
            labels: (B,) int64, the threat of each example, 0..threats-1.
            threats: number of threats.
        """


class Diversification(Regularizer):
    """A loss that pushes the mean gates of different threats apart (Eq. 6-8).

    L_div = mean over l of -sum_{p != q} (1/T sum_i d(u_i^p, u_i^q) + d(P v^p, P v^q)), with means u^p, v^p over the
    examples of threat p in the global batch, P the layer's projection K -> K' and d the squared Euclidean distance.
    Pairs with a threat without examples are dropped, as is a part that the gate lacks. The local term is bounded, the
    global one only while P is frozen (docs/decisions/frozen-projection.md).
    """

    kind = "diversification"
    pairs: Literal["ordered", "unordered"] = "ordered"
    """The literal reading of p != q, or each pair only once (half the loss)."""
    distance: Literal["l2", "cosine", "kl", "wasserstein", "wasserstein-unsorted"] = "l2"
    """Distances of Table A5: squared Euclidean; minus the cosine; symmetric KL divergence; L1 between the cumulative
    sums of the sorted or the unsorted gates. The last three compare the unprojected v, which is a distribution."""
    mean_over: MeanOver = "layers"
    """What the mean over l averages: adapted layers, or blocks (literal), in which the losses of ``qkv`` and ``proj``
    are summed: twice the loss, as with twice the weight."""
    projected: Literal["sum", "mean"] = "sum"
    """Whether the squared distance of projected gates is the sum (literal) or the mean over the K' dimensions."""
    tokens: Literal["all", "patches"] = "all"
    """The tokens i: all T, or all but class and register tokens."""
    estimate: Literal["plain", "unbiased"] = "plain"
    """The squared distance of two means over few examples is biased upwards by their sampling variances. If each threat
    has its own images (RANDOM), the plain loss therefore mostly rewards gates that differ between images. ``unbiased``
    subtracts an estimate of this bias from the batch; it is not for methods that give all threats the same images."""

    @model_validator(mode="after")
    def _check_distance(self) -> Self:
        if self.distance != "l2" and (self.estimate != "plain" or self.projected != "sum"):
            raise ValueError("estimate: unbiased and projected: mean are for distance: l2; leave them out")
        return self

    @property
    def projects(self) -> bool:
        return self.distance in ("l2", "cosine")

    def loss(self, records: list[Recorded], labels: Tensor, threats: int) -> Tensor:
        terms = [term for record in records for term in self._terms(record)]
        if not terms:
            raise UserError("no gate has a local or a global part to diversify; use regularizer: null")
        columns = [column for points in terms for column in (points.flatten(1), _length(points))]
        means, counts = group_means(torch.cat(columns, dim=1), labels, threats)
        parts = torch.split(means, [column.shape[1] for column in columns], dim=1)
        present = (counts > 0).to(means.dtype)
        total = means.new_zeros(())
        for points, mean, squares in zip(terms, parts[::2], parts[1::2], strict=True):
            apart = pairwise(mean.view(threats, *points.shape[1:]), self.distance)
            if self.estimate == "unbiased":
                excess = (squares.squeeze(1) - mean.square().sum(dim=1)) / (counts - 1).clamp(min=1)
                apart = apart - (excess.unsqueeze(0) + excess.unsqueeze(1)) * off_diagonal(excess)
            total = total + (present.unsqueeze(0) * present.unsqueeze(1) * apart).sum()
        pairs = 1.0 if self.pairs == "ordered" else 0.5
        return -total / count_layers([record.layer for record in records], self.mean_over) * pairs

    def _terms(self, record: Recorded) -> list[Tensor]:
        """Return the points that are compared in one layer: local gates (B, T, K) and the global gate (B, 1, K').

        They are scaled so that the summed squared distance of two points is the term of Eq. 6 or 7.
        """
        terms = []
        if record.gates.local is not None:
            first = record.layer.layout.prefix if self.tokens == "patches" else 0
            local = record.gates.local[:, first:]
            terms.append(local / local.shape[1] ** 0.5 if self.distance == "l2" else local)
        if record.gates.global_ is not None:
            v, projection = record.gates.global_, record.layer.projection
            if projection is not None and self.projects:
                v = torch.nn.functional.linear(v, projection.weight)  # its bias cancels in a difference
                v = v / v.shape[1] ** 0.5 if self.projected == "mean" else v
            terms.append(v.unsqueeze(1))
        return terms


def _length(points: Tensor) -> Tensor:
    """Return the squared length of each example's points: (B, T, K) to (B, 1)."""
    return points.flatten(1).square().sum(dim=1, keepdim=True)


def pairwise(points: Tensor, distance: str) -> Tensor:
    """Return the distances between P points, (P, T, K) to (P, P), by one of :class:`Diversification`'s distances.

    ``l2`` sums the squares over T and K, the others average over T; the diagonal is 0.
    """
    a, b = points.unsqueeze(0), points.unsqueeze(1)
    if distance == "l2":
        return (a - b).square().sum(dim=(-2, -1))
    if distance == "cosine":
        away = -torch.nn.functional.cosine_similarity(a, b, dim=-1)
    elif distance == "kl":
        away = ((a - b) * (a.clamp(min=1e-12).log() - b.clamp(min=1e-12).log())).sum(dim=-1)
    else:
        if distance == "wasserstein":
            a, b = a.sort(dim=-1).values, b.sort(dim=-1).values
        away = (a.cumsum(dim=-1) - b.cumsum(dim=-1)).abs().sum(dim=-1)
    return away.mean(dim=-1) * off_diagonal(points)


def off_diagonal(like: Tensor) -> Tensor:
    """Return a (P, P) matrix with 0 on the diagonal and 1 elsewhere, for P = len(like)."""
    return 1 - torch.eye(len(like), dtype=like.dtype, device=like.device)
