"""Checkpoints written while training goes on: copied to the host's memory at once, and to the disk by a thread.

There is one write at a time. What is copied is what the training held at that update: nothing that it changes later
reaches the file.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from rome.core.errors import UserError
from rome.core.randomness import cuda_in_use
from rome.runs.folder import Run


class Saver:
    """Writes a run's checkpoints in the background.

    Args:
        minutes: from the end of one checkpoint to the beginning of the next (:meth:`due`); None: none is ever due.
    """

    def __init__(self, run: Run, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.minutes, self.clock = run, minutes, clock
        self.latest = clock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    @property
    def busy(self) -> bool:
        return self._writing is not None and not self._writing.done()

    def due(self) -> bool:
        """Whether a checkpoint is to be made now, because the last one is so long ago and none is being written."""
        return self.minutes is not None and not self.busy and self.clock() - self.latest >= 60 * self.minutes

    def save(self, state: dict[str, Any], *, constant: dict[str, Any] | None = None, log: int | None = None) -> None:
        """Begin to write a checkpoint, once the one before is written.

        Args:
            state: numbers, text, containers and tensors on any device.
            constant: more of it, which nobody changes any more.
            log: descriptor of a file that must be on the disk before the checkpoint is.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        copied, arrived = _on_host(state)
        copied |= constant or {}

        def write() -> None:
            if log is not None:
                with suppress(OSError):  # no file of a disk
                    os.fsync(log)
            arrived()
            self.run.save_checkpoint(copied)

        self._writing = self._pool.submit(write)
        self.latest = self.clock()

    def check(self) -> None:
        """Raise UserError if a checkpoint could not be written."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """The same, once it is written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Finish the write under way; an error of it is of no interest any more."""
        with suppress(UserError):
            self.wait()
        self._pool.shutdown()


def _on_host(state: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """A copy in the host's memory, and what waits until it is complete: a GPU copies into pinned memory between two
    updates, and nothing waits for it here."""
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    memo = {id(each): each.detach().to("cpu", non_blocking=True, copy=True) for each in tensors}
    copied = copy.deepcopy(state, memo)  # containers keep what they say beside their tensors, such as versions
    if not cuda_in_use():
        return copied, lambda: None
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    return copied, done.synchronize
