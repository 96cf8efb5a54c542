"""The contract of every logger: settings (:class:`Logger`) that open into a :class:`Writer`, and what keeps one that
fails from ending the work that it follows.

Where a tracker sends to is said by its own environment variables and login and never by a config, so that a config
from elsewhere sends nothing to strangers.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from uuid import uuid4

import numpy as np
from pydantic import BeforeValidator

from rome.core.component import Component
from rome.core.console import say
from rome.core.errors import Interrupted, UserError, first_line
from rome.core.files import replace_file
from rome.core.plain_data import parse_json

IDS = "loggers.json"
"""The file in a run's folder that says by which id each tracker knows the run."""
Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Tracked:
    """The run that is followed."""

    folder: Path
    name: str
    config: dict[str, Any]
    after: int | None = None
    """Numbers of later updates are of work that was lost and is done again; None: none was."""
    id: str = ""
    """What :attr:`Writer.id` was when the run was opened before; empty: it is new."""

    @property
    def unique_name(self) -> str:
        """For trackers that know a run by its name alone."""
        return f"{self.name}-{uuid4().hex[:6]}"


class Writer(ABC):
    """An open run of a tracker. Whatever its methods raise ends the logging and nothing else."""

    id: str = ""
    """By which the tracker finds the run again; empty where the run's folder is all it takes."""

    @abstractmethod
    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name (``epoch/accuracy/L1``) after ``step`` updates."""

    def picture(self, name: str, image: np.ndarray, step: int) -> None:  # noqa: B027
        """Log an image, uint8 (H, W, 3); a tracker that shows none leaves this out."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """Write what is left; the run may be opened again."""


class Logger(Component):
    """Where the numbers of a run are followed."""

    package: ClassVar[str] = ""
    """What must be installed, which is also the name of the extra that brings it."""

    @abstractmethod
    def open(self, run: Tracked) -> Writer:
        """Start a run, or go on with the one of :attr:`Tracked.id`."""

    def check(self) -> None:
        """Raise UserError if its package is not installed."""
        if self.package and find_spec(self.package) is None:
            raise UserError(
                f"loggers: {self.kind} needs the package {self.package}, which is not installed: "
                f"pip install 'rome-robust[{self.package}]', or take {self.kind} out of loggers"
            )


def _alone(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict, Logger)) else value


Loggers = Annotated[tuple[Logger, ...], BeforeValidator(_alone, json_schema_input_type=Logger | tuple[Logger, ...])]
"""Several loggers, or one."""


class Tracking:
    """The writers that are open; one that raises an error is named in a line and left out from then on."""

    def __init__(self) -> None:
        self.writers: dict[str, Writer] = {}

    def numbers(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda writer: writer.numbers(values, step))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        self._each(lambda writer: writer.picture(name, image, step))

    def close(self, status: Status) -> None:
        self._each(lambda writer: writer.close(status))

    def _each(self, do: Callable[[Writer], object]) -> None:
        for kind, writer in list(self.writers.items()):
            with self.survived(kind):
                do(writer)

    @contextmanager
    def survived(self, kind: str) -> Iterator[None]:
        """Errors inside take the logger out. Standard output is for results: what a library prints goes beside it."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # whatever a library raises
            self.writers.pop(kind, None)
            say(f"loggers: {kind} failed ({first_line(error)}); the work goes on without it")


@contextmanager
def tracking(
    loggers: Iterable[Logger], folder: Path, name: str, config: dict[str, Any], *, after: int | None = None
) -> Iterator[Tracking]:
    """Open the loggers of a run, each where it was if it was open before, and close them at the end.

    Args:
        name: of the run; that of its folder where it is empty.
        folder: of the run; the file :data:`IDS` there is read and written, and local trackers write beside it.
        after: see :attr:`Tracked.after`.
    """
    tracked, file = Tracking(), folder / IDS
    ids: dict[str, str] = {}
    with suppress(OSError, ValueError):
        ids = dict(parse_json(file.read_text(encoding="utf-8")))
    for logger in loggers:
        with tracked.survived(logger.kind):
            writer = logger.open(Tracked(folder, name or folder.name, config, after, ids.get(logger.kind, "")))
            tracked.writers[logger.kind] = writer
            if writer.id and writer.id != ids.get(logger.kind):
                ids[logger.kind] = writer.id
                replace_file(file, json.dumps(ids, indent=2).encode())
    status: Status = "failed"
    try:
        yield tracked
        status = "finished"
    except (Interrupted, KeyboardInterrupt):
        status = "stopped"
        raise
    finally:
        tracked.close(status)
