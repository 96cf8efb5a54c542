"""Cooperation of the processes that torchrun or srun starts: sums and means in training, teams in evaluation.

In a single process every call returns at once. Processes that evaluate share no random numbers and no gradients, only
verdicts in host memory, so they communicate through gloo, on GPUs too: it needs no device, waits as long as necessary,
and reports at once that a process is lost.
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
    """This process's share of ``count`` workers for its machine, divided evenly among the machine's processes; at least
    1, unless ``count`` is 0."""
    local = int(os.environ["LOCAL_WORLD_SIZE"]) if launched_together() > 1 else 1
    return max(count // local, min(count, 1))


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def total(value: Tensor) -> Tensor:
    """The sum over all processes; ``value`` itself is not changed."""
    if world_size() == 1:
        return value
    value = value.detach().clone()
    dist.all_reduce(value)
    return value


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, with one all-reduce. All processes must pass equal shapes."""
    if world_size() == 1 or not tensors:
        return
    flat = total(torch.cat([tensor.flatten() for tensor in tensors])) / world_size()
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def follow_first(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by that of the first process."""
    if world_size() == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def differentiable_sum(value: Tensor) -> Tensor:
    """The sum over all processes, whose gradient is the sum of the processes' gradients; in a single process ``value``.

    DistributedDataParallel averages parameter gradients over W processes. Each process has the same loss, so the
    summed gradient is W times the correct one and the average is exact.
    """
    summed: Tensor = _Sum.apply(value) if world_size() > 1 else value
    return summed


class _Sum(torch.autograd.Function):
    """A differentiable all-reduce. torch's own (``torch.distributed.nn.functional.all_reduce``) is deprecated and warns
    at every call."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return total(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return total(gradient.contiguous())


def group_means(values: Tensor, labels: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mean of the rows of each group over the global batch, differentiable, with one all-reduce.

    Args:
        values: (B, D).
        labels: (B,) int64 in 0..groups-1.

    Returns:
        means (groups, D), zero for a group without members, and the number of members (groups,).
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))  # bfloat16 cannot count beyond 256
    numbers = torch.arange(groups, device=values.device)
    member = (labels.to(values.device, non_blocking=True).unsqueeze(1) == numbers).to(values.dtype)
    sums = differentiable_sum(torch.cat([member.t() @ values, member.sum(dim=0).unsqueeze(1)], dim=1))
    counts = sums[:, -1:]
    return sums[:, :-1] / counts.clamp(min=1), counts.squeeze(1)


@contextmanager
def lost_process_as(message: str) -> Iterator[None]:
    """Raise :class:`Interrupted` with this message if communication shows that another process is gone.

    The exit code is 1, so that it does not hide that of the process that ended first: of several codes, a launcher
    (srun) returns the largest.
    """
    try:
        yield
    except RuntimeError as error:
        if world_size() == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise Interrupted(1, message) from error


PATIENCE = datetime.timedelta(days=30)
"""How long processes wait for each other: a batch of a large model may take hours. A lost process is noticed anyway."""


@dataclass(frozen=True)
class Team:
    """Processes that work together; this process has number ``rank``."""

    rank: int = 0
    world: int = 1
    group: Any = None
    """torch's process group; None: torch's default group, or a single process."""

    @property
    def is_main(self) -> bool:
        """Whether this process prints messages and writes the result."""
        return self.rank == 0

    def together(self, work: Callable[[], T]) -> list[T]:
        """Run ``work`` in every process and return all results, by rank.

        An exception in one process is raised in all of them: unchanged where it occurred, elsewhere as a UserError if
        it is one and as an :class:`ElsewhereError` otherwise, with the same text. So no process waits for one that
        failed.

        Raises:
            Interrupted: another process is gone.
        """
        if self.world == 1:
            return [work()]
        result, raised, sent = None, None, None
        try:
            result = work()
        except Exception as error:
            user_error = type(error) if isinstance(error, UserError) else None
            raised, sent = error, (user_error, str(error), type(error).__name__)
        everything: list[Any] = [None] * self.world
        with lost_process_as("another process ended; finished work is kept: run the same command again to continue"):
            dist.all_gather_object(everything, (result, sent), group=self.group)
        if raised is not None:
            raise raised
        for rank, (_, sent) in enumerate(everything):
            if sent is not None:
                user_error, text, kind = sent
                raise user_error(text) if user_error else ElsewhereError(rank, kind, text)
        return [result for result, _ in everything]

    def first(self, work: Callable[[], T]) -> T:
        """Run ``work`` in the first process only, and return its result in every process."""
        return self.together(lambda: work() if self.is_main else None)[0]  # type: ignore[return-value]

    def agreed(self, value: T, problem: str) -> T:
        """Return the value if it is the same in every process.

        Raises:
            UserError: the values differ; ``problem`` is the message.
        """
        if any(other != value for other in self.together(lambda: value)):
            raise UserError(problem)
        return value


ALONE = Team()


class ElsewhereError(RuntimeError):
    """An error that occurred in another process."""

    def __init__(self, rank: int, kind: str, text: str) -> None:
        super().__init__(f"{text} (in process {rank})")
        self.kind = kind


@contextmanager
def launched() -> Iterator[Team]:
    """The team of processes that torchrun or srun started, or this process alone."""
    world = launched_together()
    if world == 1:
        yield ALONE
        return
    initialized = dist.is_initialized()  # by a training in these processes
    if not initialized:
        dist.init_process_group("gloo")
    try:
        yield Team(dist.get_rank(), world, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        if not initialized:
            dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The device of this process. Of several processes on CUDA, each takes the GPU with its local rank, or the one that
    SLURM bound it to.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    if launched_together() == 1 or device.type != "cuda" or device.index is not None:
        return device
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus < int(os.environ["LOCAL_WORLD_SIZE"]) and _bound(gpus):
        local = 0  # each process sees only its own GPUs, counted from 0
    if local >= gpus:
        raise UserError(
            f"process {local} has no GPU of its own: this machine has {gpus}; start at most that many processes on it "
            "(torchrun --nproc-per-node, srun --ntasks-per-node)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def _bound(gpus: int) -> bool:
    """Whether SLURM bound this task to GPUs of its own (srun --gpus-per-task, --gpu-bind), apart from those of other
    tasks on this machine."""
    step = [number for number in os.environ.get("SLURM_STEP_GPUS", "").split(",") if number]
    return "SLURM_PROCID" in os.environ and (
        bool(os.environ.get("SLURM_GPUS_PER_TASK")) or len(step) >= int(os.environ["LOCAL_WORLD_SIZE"]) > gpus
    )
