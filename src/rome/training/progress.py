"""Progress of a training run: a bar on a terminal, elsewhere one line per epoch."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

from rome.runs.config import Config
from rome.threats import Unperturbed
from rome.training.log import Update
from rome.training.loop import Progress


@contextmanager
def show_training(config: Config, total: int, done: int) -> Iterator[Progress]:
    """Show loss, accuracy under each threat, images per second and time left on standard error.

    Args:
        total: updates of the whole run.
        done: updates finished before, in a run that is resumed.
    """
    console = Console(stderr=True)
    if own := config.method.own_attack:
        note = f"{config.method.kind} attacks with {own}; attack: {config.attack.kind} has no effect"
        print(f"{config.name}: {note}", file=sys.stderr, flush=True)
    if not console.is_terminal:
        yield _Lines(config, total, done)
        return
    unbroken = Column(no_wrap=True)
    columns = (
        TextColumn("{task.description}", "bold", markup=False, table_column=Column(no_wrap=True, max_width=24)),
        BarColumn(bar_width=20),
        TextColumn("{task.completed}/{task.total} updates", table_column=unbroken),
        TimeRemainingColumn(table_column=unbroken),
        TextColumn("left", table_column=unbroken),
    )
    with _TwoLines(*columns, console=console) as bar:
        yield _Bar(bar, config, total, done)


class _TwoLines(Bar):
    """A progress bar on one line and the measurements on the next, so that both fit on a narrow terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(task.fields["facts"], no_wrap=True, overflow="ellipsis")


class _Bar:
    """Progress on a terminal: a bar with moving averages, and a line for each validation."""

    def __init__(self, bar: Bar, config: Config, total: int, done: int) -> None:
        self.bar, self.config = bar, config
        self.task = bar.add_task(config.name, total=total, completed=done, facts="")
        self.seen: dict[str, float] = {}

    def update(self, update: Update) -> None:
        if Unperturbed().name not in update.accuracy:  # the natural epochs are over
            self.seen.pop(Unperturbed().name, None)
        for name, value in {"loss": update.loss, **update.accuracy}.items():
            self.seen[name] = 0.9 * self.seen.get(name, value) + 0.1 * value
        accuracy = accuracies({name: value for name, value in self.seen.items() if name != "loss"})
        facts = (
            f"epoch {math.ceil(update.epoch)}/{self.config.epochs} · loss {self.seen['loss']:.3f} · {accuracy} · "
            f"{update.images_per_second:.0f} img/s"
        )
        self.bar.update(self.task, completed=update.number, facts=facts)

    def epoch(self, summary: dict[str, Any]) -> None:
        pass

    def validation(self, found: dict[str, Any]) -> None:
        self.bar.console.print(validated(self.config, found), markup=False, highlight=False, soft_wrap=True)


class _Lines:
    """Progress without a terminal: a line for each epoch and each validation."""

    def __init__(self, config: Config, total: int, done: int) -> None:
        self.config, self.total, self.first, self.started = config, total, done, time.monotonic()

    def update(self, update: Update) -> None:
        pass

    def epoch(self, summary: dict[str, Any]) -> None:
        passed, left = summary["update"] - self.first, self.total - summary["update"]
        seconds = (time.monotonic() - self.started) * left / max(passed, 1)
        print(
            f"{self.config.name}: epoch {summary['epoch']}/{self.config.epochs}  loss {summary['loss']:.3f}  "
            f"{accuracies(summary['accuracy'])}  {summary['images_per_second']:.0f} img/s  {seconds:.0f} s left",
            file=sys.stderr,
            flush=True,
        )

    def validation(self, found: dict[str, Any]) -> None:
        print(validated(self.config, found), file=sys.stderr, flush=True)


def validated(config: Config, found: dict[str, Any]) -> str:
    """The result of a validation on one line."""
    values = {"clean": found["clean"], **found["robust"], "union": found["union"]}
    best = ", the best so far" if found["best"] else ""
    return f"{config.name}: held out after {found['epoch']}/{config.epochs}  {accuracies(values)}{best}"


def accuracies(values: dict[str, float]) -> str:
    """Format accuracies as ``L1 52.1% L2 68.8%``."""
    return " ".join(f"{name} {value:.1%}" for name, value in values.items())
