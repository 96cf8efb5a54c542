"""Asynchronous checkpoints: the state is copied to host memory at once and written to disk by a background thread.

Only one write runs at a time. The copy is a snapshot: changes that training makes afterwards do not reach the file.
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
    """Background writer for a run's checkpoints.

    Args:
        minutes: minimum time between two checkpoints (:meth:`due`); None: none is ever due.
        clock: returns the time in seconds.
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
        """Whether to save a checkpoint now: the last one was saved ``minutes`` ago and no write is in progress."""
        return self.minutes is not None and not self.busy and self.clock() - self.latest >= 60 * self.minutes

    def save(self, state: dict[str, Any], *, constant: dict[str, Any] | None = None, log: int | None = None) -> None:
        """Start writing a checkpoint, after waiting for the previous one.

        Args:
            state: numbers, text, containers and tensors on any device.
            constant: further entries of the state that never change again, so that no copy is needed.
            log: descriptor of a file that must be on disk before the checkpoint.

        Raises:
            UserError: the previous checkpoint could not be written.
        """
        self.wait()
        copied, arrived = _on_host(state)
        copied |= constant or {}

        def write() -> None:
            if log is not None:
                with suppress(OSError):  # not a file on disk
                    os.fsync(log)
            arrived()
            self.run.save_checkpoint(copied)

        self._writing = self._pool.submit(write)
        self.latest = self.clock()

    def check(self) -> None:
        """Raise UserError if the last checkpoint could not be written, without waiting for a write in progress."""
        if not self.busy:
            self.wait()

    def wait(self) -> None:
        """Wait for the write in progress; raise UserError if it failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for the write in progress, ignoring its errors, and stop the thread."""
        with suppress(UserError):
            self.wait()
        self._pool.shutdown()


def _on_host(state: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
    """Copy the state to host memory; return the copy and a function that waits until it is complete.

    A GPU copies asynchronously, so that training need not wait.
    """
    tensors = [leaf for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    memo = {id(each): each.detach().to("cpu", non_blocking=True, copy=True) for each in tensors}
    copied = copy.deepcopy(state, memo)  # keeps attributes of containers, such as a state dict's metadata
    if not cuda_in_use():
        return copied, lambda: None
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record()
    return copied, done.synchronize
