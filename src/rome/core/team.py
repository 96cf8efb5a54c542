"""Evaluation by several processes: who does what, and how they hear of it.

The processes share no random numbers and no gradients, only verdicts, which lie in the host's memory. So they talk
through gloo, on GPUs too: it needs no device, waits as long as it must, and says at once when a process is lost.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from rome.core.distributed import launched_together
from rome.core.errors import Interrupted, UserError

T = TypeVar("T")
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
    def leads(self) -> bool:
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
        result, own, told = None, None, None
        try:
            result = work()
        except Exception as error:
            of_user = type(error) if isinstance(error, UserError) else None
            own, told = error, (of_user, str(error), type(error).__name__)
        everything: list[Any] = [None] * self.world
        try:
            dist.all_gather_object(everything, (result, told), group=self.group)
        except RuntimeError as error:
            raise Interrupted(
                1,
                "another process of this evaluation ended; what is finished is kept: the same command goes on with it",
            ) from error
        if own is not None:
            raise own
        for rank, (_, told) in enumerate(everything):
            if told is not None:
                of_user, text, kind = told
                raise of_user(text) if of_user else ElsewhereError(rank, kind, text)
        return [result for result, _ in everything]

    def first(self, work: Callable[[], T]) -> T:
        """What ``work`` gives in the first process, which alone does it."""
        return self.together(lambda: work() if self.leads else None)[0]  # type: ignore[return-value]

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
    """The team that torchrun started, this process alone where it did not."""
    world = launched_together()
    if world == 1:
        yield ALONE
        return
    dist.init_process_group("gloo")
    try:
        yield Team(dist.get_rank(), world, dist.new_group(backend="gloo", timeout=PATIENCE))
    finally:
        dist.destroy_process_group()


def own_device(asked: torch.device) -> torch.device:
    """The device of this process: with several on CUDA, each takes the GPU of its local number.

    Raises:
        UserError: there are fewer GPUs than processes.
    """
    local = int(os.environ["LOCAL_RANK"]) if launched_together() > 1 else None
    if local is None or asked.type != "cuda" or asked.index is not None:
        return asked
    if local >= torch.cuda.device_count():
        raise UserError(
            f"process {local} has no GPU of its own: there are {torch.cuda.device_count()} here; "
            "start at most that many (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)
