"""What the processes of a run tell each other, without gradients; in a single process every call is free."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from rome.core.errors import UserError

LAUNCHED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun says to each process beside their number."""


def launched_together() -> int:
    """How many processes torchrun started; 1 where it did not.

    Raises:
        UserError: the environment says that there are several, and not how they find each other.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in LAUNCHED if name not in os.environ]
    if not world.isdecimal() or int(world) < 1 or (int(world) > 1 and missing):
        lacks = f" without {', '.join(missing)}" if missing else ""
        raise UserError(
            f"the environment says WORLD_SIZE={world}{lacks}: start several processes with torchrun, or unset it"
        )
    return int(world)


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """The sum over all processes; ``value`` stays as it is."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in one message. Every process gives the same shapes."""
    if world_size() == 1 or not tensors:
        return
    flat = total(torch.cat([tensor.flatten() for tensor in tensors])) / world_size()
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def follow_first(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by the first process's."""
    if world_size() == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor, src=0)
