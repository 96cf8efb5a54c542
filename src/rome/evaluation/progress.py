"""How an evaluation says how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from rome.attacks.base import Attack
from rome.attacks.suites.base import Case
from rome.threats import Threat

Watcher = Callable[[str, int, int, float, float | None], None]
"""Called after every batch with: case, batches done in it, batches in it as far as known (it shrinks while attacks
succeed, and equals those done in the last call of a case), accuracy so far, seconds left for all cases (None while
nothing has been timed)."""


SHOWN_BARS = 12
"""Cases on a terminal at a time."""


class Clock:
    """Seconds left, from the seconds that a unit of cost took so far. Cost: examples x forward passes.

    Args:
        cases: those to run.
        starts: how many examples each of them starts with.
        world: processes that share the work.
    """

    def __init__(self, cases: Sequence[Case], starts: Sequence[int], batch_size: int, world: int = 1) -> None:
        self.cases, self.starts, self.batch_size, self.world = cases, starts, batch_size, world
        self.cost, self.seconds = 0, 0.0

    def spent(self, case: Case, attack: Attack, examples: int, seconds: float) -> None:
        self.cost += examples * cost(attack, case.threat)
        self.seconds += seconds

    def left(self, now: int, stage: int, waiting: int, robust: int) -> float | None:
        """With case number ``now`` in its attack number ``stage``, for which ``waiting`` examples are left, and
        ``robust`` examples for the attacks after it."""
        if not self.cost:
            return None
        case = self.cases[now]
        todo = waiting * cost(case.attacks[stage], case.threat)
        todo += robust * sum(cost(attack, case.threat) for attack in case.attacks[stage + 1 :])
        for later, start in zip(self.cases[now + 1 :], self.starts[now + 1 :], strict=True):
            todo += start * sum(cost(attack, later.threat) for attack in later.attacks)
        return todo * self.seconds / self.cost / self.world

    def batches(self, examples: int) -> int:
        return -(-examples // self.batch_size)


def cost(attack: Attack, threat: Threat) -> int:
    """Forward passes an example needs, a backward counted as two."""
    searcher, inside = threat.searched_by(attack)
    return max(3 * searcher.steps_for(inside), 1)


@contextmanager
def watching(progress: Watcher | bool) -> Iterator[Watcher]:
    """The function to call after every batch: the caller's, a bar on a terminal, one line a case elsewhere, nothing."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda *_: None
    elif sys.stderr.isatty():
        with _bars() as watcher:
            yield watcher
    else:
        yield _lines()


def _lines() -> Watcher:
    start = time.monotonic()

    def watch(case: str, done: int, total: int, robust: float, left: float | None) -> None:
        if done == total:
            print(f"{case}: {100 * robust:.1f}% robust after {_duration(time.monotonic() - start)}", file=sys.stderr)

    return watch


@contextmanager
def _bars() -> Iterator[Watcher]:
    columns = (
        TextColumn("{task.description:>8}", markup=False),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} batches"),
        TextColumn("{task.fields[robust]:.1f}% robust so far"),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def watch(case: str, done: int, total: int, robust: float, left: float | None) -> None:
            if case not in tasks:
                tasks[case] = bars.add_task(case, total=total, robust=100 * robust, left="")
            text = "" if left is None or done == total else f"{_duration(left)} left"
            bars.update(tasks[case], completed=done, total=total, robust=100 * robust, left=text)
            for name in list(tasks)[: max(len(tasks) - SHOWN_BARS, 0)]:
                bars.update(tasks[name], visible=False)

        yield watch


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
