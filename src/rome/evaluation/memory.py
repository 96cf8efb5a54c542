"""Batches that do not fit in memory: how to tell, and how to go on with their halves."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from rome.core.device import out_of_memory

T = TypeVar("T")


def free(error: BaseException) -> None:
    """Let go of the tensors that filled the memory: the frames of the traceback hold them."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()


class Halving:
    """Runs work on batches; with ``allowed``, one that does not fit in memory is run as two halves, and so on.

    What did not fit once is not tried again: later batches are halved until they are no larger than what did. The
    pieces depend on a batch's size and the memory alone.
    """

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.largest: dict[str, int] = {}
        """Work -> largest batch not known to be too large."""

    def run(self, name: str, part: np.ndarray, work: Callable[[np.ndarray], T]) -> list[tuple[np.ndarray, T]]:
        """The pieces of ``part`` (b,) with what ``work`` made of each, in order.

        Raises:
            Exception: whatever ``work`` raises, unless it is for want of memory and halving is allowed; for want of
                memory on a single example too.
        """
        if len(part) <= self.largest.get(name, len(part)):
            try:
                return [(part, work(part))]
            except Exception as error:
                if not self.allowed or not out_of_memory(error) or len(part) == 1:
                    raise
                free(error)
            self.largest[name] = len(part) - 1
        middle = -(-len(part) // 2)
        return self.run(name, part[:middle], work) + self.run(name, part[middle:], work)
