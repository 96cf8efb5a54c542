"""Sums and means over the global batch, differentiable across processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rome.core.distributed import world_size


def sum_over_processes(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, differentiable; itself in a single process."""
    if world_size() > 1:
        return _SumOverProcesses.apply(value)
    return value


def group_means(values: Tensor, labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each group over the global batch, differentiable, with one message between processes.

    Args:
        values: (B, D).
        labels: (B,) int64 in 0..groups-1.

    Returns:
        means (groups, D), zero for a group without members, and the number of members (groups,).
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # bfloat16 counts no further than 256
    member = torch.nn.functional.one_hot(labels.to(values.device, non_blocking=True), groups).to(values.dtype)
    sums = sum_over_processes(torch.cat([member.t() @ values, member.sum(dim=0).unsqueeze(1)], dim=1))
    counts = sums[:, -1:]
    return sums[:, :-1] / counts.clamp(min=1), counts.squeeze(1)


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
