"""Run batches that do not fit in memory as smaller pieces."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from rome.core.device import out_of_memory

T = TypeVar("T")


def free(error: BaseException) -> None:
    """Release the tensors that filled the memory, which the frames of the error's traceback still refer to."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()


class Halving:
    """Runs work on batches; if ``allowed``, halves a batch that does not fit in memory, repeatedly if needed.

    A size that did not fit is not tried again: later batches are halved until they are smaller. The pieces depend only
    on the batch's size and the memory.
    """

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.largest: dict[str, int] = {}
        """Name of the work -> largest batch size not known to be too large."""

    def run(self, name: str, part: np.ndarray, work: Callable[[np.ndarray], T]) -> list[tuple[np.ndarray, T]]:
        """Run ``work`` on the examples ``part`` (b,), and return its pieces in order, each with its result.

        Raises:
            Exception: whatever ``work`` raises, except that a lack of memory is raised only if halving is not allowed
                or the piece is a single example.
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
