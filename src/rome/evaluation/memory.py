"""Halving of batches that do not fit in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from rome.core.device import out_of_memory

T = TypeVar("T")


def free(error: BaseException) -> None:
    """Free the tensors that filled the memory, which the error's traceback keeps alive."""
    error.__traceback__ = error.__cause__ = error.__context__ = None
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()


class Halving:
    """Runs work on batches; if ``allowed``, a batch that does not fit in memory is run as two halves, recursively.

    A size that did not fit is not tried again: later batches are halved until they are smaller. How a batch is divided
    depends only on its size and on the memory.
    """

    def __init__(self, allowed: bool) -> None:
        self.allowed = allowed
        self.largest: dict[str, int] = {}
        """Name of the work -> largest batch size not known to be too large."""

    def run(self, name: str, part: np.ndarray, work: Callable[[np.ndarray], T]) -> list[tuple[np.ndarray, T]]:
        """Run ``work`` on the examples ``part`` (b,); return its pieces in order, each with the result for it.

        Args:
            name: identifies the work, whose memory use :attr:`largest` remembers.

        Raises:
            Exception: whatever ``work`` raises, except out-of-memory errors that halving avoids.
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
