"""Progress of an evaluation: a bar, lines, or a callback."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

ProgressCallback = Callable[[str, int, int, float], None]
"""Called after every batch with the case, its batches done, its estimated number of batches (which shrinks as attacks
succeed, and equals the batches done in the case's last call), and its accuracy so far."""


SHOWN_BARS = 12
"""Most cases shown on a terminal at a time."""


@contextmanager
def watching(progress: ProgressCallback | bool) -> Iterator[ProgressCallback]:
    """Yield the function to call after every batch: the caller's own; for True, a bar on a terminal or else one line
    per case; for False, one that does nothing."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bars() as watcher:
            yield watcher
    else:
        yield _lines()


def _lines() -> ProgressCallback:
    start = time.monotonic()

    def watch(case: str, done: int, total: int, robust: float) -> None:
        if done == total:
            took = timedelta(seconds=round(time.monotonic() - start))
            print(f"{case}: {100 * robust:.1f}% robust after {took}", file=sys.stderr)

    return watch


@contextmanager
def _bars() -> Iterator[ProgressCallback]:
    columns = (
        TextColumn("{task.description:>8}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} batches"),
        TextColumn("{task.fields[robust]:.1f}% robust so far"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def watch(case: str, done: int, total: int, robust: float) -> None:
            if case not in tasks:
                tasks[case] = bars.add_task(case, total=total, robust=100 * robust)
            bars.update(tasks[case], completed=done, total=total, robust=100 * robust)
            for name in list(tasks)[: max(len(tasks) - SHOWN_BARS, 0)]:
                bars.update(tasks[name], visible=False)

        yield watch
