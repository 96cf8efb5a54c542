"""How the processes that torchrun or srun starts work together: sums and means while they train, teams that evaluate.

In a single process every call is free. Processes that evaluate share no random numbers and no gradients, only verdicts
in the host's memory, so they talk through gloo, on GPUs too: it needs no device, waits as long as it must, and says at
once when a process is lost.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rome.core.errors import Interrupted, UserError
from rome.core.launched import launched_together

T = TypeVar("T")


def local_share(count: int) -> int:
    """This process's part of so many that its machine has, shared out among its processes: of any at least 1."""
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if launched_together() > 1 else 1
    return max(count // local, min(count, 1))


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


def differentiable_sum(value: Tensor) -> Tensor:
    """The sum over all processes, whose gradient is the sum of the processes' gradients; itself in a single process.

    DistributedDataParallel averages parameter gradients over W processes. Each process holds the same loss, so the
    summed gradient is W times the wanted one and the average is exact.
    """
    summed: Tensor = _Sum.apply(value) if world_size() > 1 else value
    return summed


class _Sum(torch.autograd.Function):
    """torch's own (``torch.distributed.nn.functional.all_reduce``) is deprecated, and says so at every call."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return total(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient.contiguous())


def group_means(values: Tensor, labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each group over the global batch, differentiable, with one message between processes.

    Args:
        values: (B, D).
        labels: (B,) int64 in 0..groups-1.

    Returns:
        means (groups, D), zero for a group without members, and the number of members (groups,).
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # bfloat16 counts no further than 256
    every = torch.arange(groups, device=values.device)
    member = (labels.to(values.device, non_blocking=True).unsqueeze(1) == every).to(values.dtype)
    sums = differentiable_sum(torch.cat([member.t() @ values, member.sum(dim=0).unsqueeze(1)], dim=1))
    counts = sums[:, -1:]
    return sums[:, :-1] / counts.clamp(min=1), counts.squeeze(1)


@contextmanager
def noticing(message: str) -> Iterator[None]:
    """A process that is gone is noticed by the others when they talk to each other; they end with this message.

    The exit code is 1, less than any of the process that ended first: of several codes a launcher (srun) gives on the
    largest.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise Interrupted(1, message) from error


PATIENCE = datetime.timedelta(days=30)
"""How long one process waits for another; the slowest unit of a large model may take hours. Lost ones are noticed."""


@dataclass(frozen=True)
class Team:
    """The processes that evaluate together, of which this is number ``rank``."""

    rank: int = 0
    world: int = 1
    group: Any = None
    """torch's process group, None where there is one process."""

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes the result."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """What ``work`` gives in every process, by rank.

        An exception in one process is raised in all of them: as it is where it happened, as the same kind of error
        with the same text elsewhere. So no process waits for one that gave up.

        Raises:
            Interrupted: a process is gone.
        """
        if self.world == 1:
            return [work()]
        result, own, sent = None, None, None
        try:
            result = work()
        except Exception as error:
            of_user = type(error) if isinstance(error, UserError) else None
            own, sent = error, (of_user, str(error), type(error).__name__)
        everything: list[Any] = [None] * self.world
        with noticing("another process ended; what is finished is kept: the same command goes on with it"):
            dist.all_gather_object(everything, (result, sent), group=self.group)
        if own is not None:
            raise own
        for rank, (_, sent) in enumerate(everything):
            if sent is not None:
                of_user, text, kind = sent
                raise of_user(text) if of_user else ElsewhereError(rank, kind, text)
        return [result for result, _ in everything]

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the first process, which alone does it."""
        return self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def agreed(self, value: T, problem: str) -> T:
        """The value, if every process has the same.

        Raises:
            UserError: they have not; ``problem`` says of what.
        """
        if any(other != value for other in self.together(lambda: value)):
            raise UserError(problem)
        return value


ALONE = Team()


class ElsewhereError(RuntimeError):
    """An error of another process."""

    def __init__(self, rank: int, kind: str, text: str) -> None:
        super().__init__(f"{text} (in process {rank})")
        self.kind = kind


@contextmanager
def launched() -> Iterator[Team]:
    """The team that torchrun or srun started, this process alone where they did not."""
    world = launched_together()
    if world == 1:
        yield ALONE
        return
    trained = dist.is_initialized()  # together, in these processes
    if not trained:
        dist.init_process_group("gloo")
    try:
        yield Team(dist.get_rank(), world, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        if not trained:
            dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The device of this process: with several on CUDA, each takes the GPU of its local number, or the one that SLURM
    bound it to.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    if launched_together() == 1 or device.type != "cuda" or device.index is not None:
        return device
    local, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if there < int(os.environ["LOCAL_WORLD_SIZE"]) and _bound(there):
        local = 0  # it sees its own only, and each counts them from 0
    if local >= there:
        raise UserError(
            f"process {local} has no GPU of its own: there are {there} here; start at most that many "
            "(torchrun --nproc-per-node, srun --ntasks-per-node)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _bound(there: int) -> bool:
    """Whether SLURM gave this task GPUs of its own (srun --gpus-per-task, --gpu-bind) beside other tasks here."""
    step = [number for number in os.environ.get("SLURM_STEP_GPUS", "").split(",") if number]
    return "SLURM_PROCID" in os.environ and (
        bool(os.environ.get("SLURM_GPUS_PER_TASK")) or len(step) >= int(os.environ["LOCAL_WORLD_SIZE"]) > there
    )
