"""Losses on the gates: threat-guided gating diversification (paper 4.4, Eq. 6-8)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from rome.component import Component, Number
from rome.experts.mixture import Recorded
from rome.processes import world_size


class Regularizer(Component):
    """A loss on the gates of the training forward, added to the cross-entropy with a weight (Eq. 9)."""

    default_kind = "diversification"

    weight: Number = Field(default=0.1, ge=0)
    """lambda."""

    @abstractmethod
    def loss(self, records: list[Recorded], labels: Tensor, threats: int) -> Tensor:
        """Unweighted loss, a scalar that is the same in every process.

        Args:
            records: the gates of every adapted layer for this process's B examples.
            labels: (B,) int64, the threat of each example, 0..threats-1.
            threats: number of threats.
        """


class Diversification(Regularizer):
    """Pushes the mean gates of different threats apart (Eq. 6-8).

    L_div = mean over adapted layers of -sum_{p != q} (1/T sum_i ||u_i^p - u_i^q||^2 + ||P v^p - P v^q||^2), with means
    u^p, v^p over the examples of threat p in the global batch and P the layer's projection K -> K'. A threat without
    examples drops its pairs. The local term is bounded, the global one only while P is frozen (spec F5).
    """

    kind = "diversification"
    pairs: Literal["ordered", "unordered"] = "ordered"
    """Literal reading of p != q, or each pair once (half the loss)."""

    def loss(self, records: list[Recorded], labels: Tensor, threats: int) -> Tensor:
        local = [record.gates.local.flatten(1) for record in records]
        whole = [record.gates.whole for record in records]
        columns = [*local, *whole]
        means, present = group_means(torch.cat(columns, dim=1), labels, threats)
        parts = torch.split(means, [part.shape[1] for part in columns], dim=1)
        pair = present.unsqueeze(0) * present.unsqueeze(1)
        total = means.new_zeros(())
        for record, u, v in zip(records, parts[: len(records)], parts[len(records) :], strict=True):
            if record.layer.projection is not None:
                v = torch.nn.functional.linear(v, record.layer.projection.weight)  # its bias cancels in a difference
            tokens = record.gates.local.shape[1]
            total = total + (pair * (squared_distances(u) / tokens + squared_distances(v))).sum()
        return -total / len(records) * (1.0 if self.pairs == "ordered" else 0.5)


def squared_distances(points: Tensor) -> Tensor:
    """(P, D) to (P, P): squared Euclidean distance of each pair of rows."""
    return (points.unsqueeze(0) - points.unsqueeze(1)).square().sum(dim=-1)


def group_means(values: Tensor, labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each group over the global batch, differentiable, with one message between processes.

    Args:
        values: (B, D).
        labels: (B,) int64 in 0..groups-1.

    Returns:
        means (groups, D), zero for a group without members, and present (groups,): 1.0 or 0.0.
    """
    member = torch.nn.functional.one_hot(labels.to(values.device, non_blocking=True), groups).to(values.dtype)
    sums = torch.cat([member.t() @ values, member.sum(dim=0).unsqueeze(1)], dim=1)
    if world_size() > 1:
        sums = _SumOverProcesses.apply(sums)
    counts = sums[:, -1:]
    return sums[:, :-1] / counts.clamp(min=1), (counts.squeeze(1) > 0).to(values.dtype)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is the sum of the processes' gradients.

    DistributedDataParallel averages parameter gradients over W processes. Each process holds the same loss, so the
    summed gradient is W times the wanted one and the average is exact.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total
