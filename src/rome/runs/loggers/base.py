"""The interface of all loggers: settings (:class:`Logger`) that open a :class:`Writer`, and :class:`Tracking`, which
keeps a failing logger from ending the work.

A tracker's server is set by its own environment variables and login, never by a config, so that a config from somebody
else cannot send your results to strangers.
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
"""File in a run's folder with the run's id in each tracker."""
Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Tracked:
    """The run that is logged."""

    folder: Path
    name: str
    config: dict[str, Any]
    after: int | None = None
    """The update that a resumed run continues from: values logged for later updates are void, since that work is done
    again. None: nothing is void."""
    id: str = ""
    """:attr:`Writer.id` of the run when it was opened before; empty for a new run."""

    @property
    def unique_name(self) -> str:
        """Name with a random suffix, for trackers that identify runs by name only."""
        return f"{self.name}-{uuid4().hex[:6]}"


class Writer(ABC):
    """An open run of a tracker. Exceptions of its methods end the logging and nothing else."""

    id: str = ""
    """The run's id in the tracker; empty if the run's folder suffices to find it again."""

    @abstractmethod
    def numbers(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name (``epoch/accuracy/L1``) after ``step`` updates."""

    def picture(self, name: str, image: np.ndarray, step: int) -> None:  # noqa: B027
        """Log an image, uint8 (H, W, 3); does nothing unless overridden."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """Write remaining values and close; the run may be opened again."""


class Logger(Component):
    """A logger of a run's numbers and pictures, and its settings."""

    package: ClassVar[str] = ""
    """Package that must be installed; also the name of the extra of rome-robust that installs it."""

    @abstractmethod
    def open(self, run: Tracked) -> Writer:
        """Start a run, or continue the one with :attr:`Tracked.id`."""

    def check(self) -> None:
        """Raise UserError if the logger's package is not installed."""
        if self.package and find_spec(self.package) is None:
            raise UserError(
                f"loggers: {self.kind} needs the package {self.package}, which is not installed: "
                f"pip install 'rome-robust[{self.package}]', or take {self.kind} out of loggers"
            )


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict, Logger)) else value


Loggers = Annotated[tuple[Logger, ...], BeforeValidator(_as_list, json_schema_input_type=Logger | tuple[Logger, ...])]
"""Several loggers, or one."""


class Tracking:
    """The open writers; one that raises an exception is reported and not used any more."""

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
        """Drop the logger if the body raises an exception. What libraries print goes to standard error, since standard
        output is for results."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # libraries may raise anything
            self.writers.pop(kind, None)
            say(f"loggers: {kind} failed ({first_line(error)}); continuing without it")


@contextmanager
def tracking(
    loggers: Iterable[Logger], folder: Path, name: str, config: dict[str, Any], *, after: int | None = None
) -> Iterator[Tracking]:
    """Open a run's loggers, continuing those that were open before, and close them at the end.

    Args:
        loggers: to open.
        folder: the run's folder, in which :data:`IDS` is read and written and local trackers write their files.
        name: the run's name; if empty, that of its folder.
        config: the run's config, as plain data.
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
