"""The interface of loggers: settings (:class:`Logger`) that open a :class:`Writer`, and protection of a training or
evaluation from a logger that fails.

The destination of a tracker is determined by its own environment variables and login, never by a config, so that a
config from someone else cannot send data to strangers.
"""

from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
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
from rome.core.plain_data import read_plain

IDS = "loggers.json"
"""Name of the file in a run's folder with the run's id in each tracker."""
Status = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class Tracked:
    """The run to log."""

    folder: Path
    name: str
    config: dict[str, Any]
    after: int | None = None
    """Update that a resumed run restarts from; numbers logged for later updates are obsolete. None: none are."""
    id: str = ""
    """:attr:`Writer.id` from when the run was opened before; empty for a new run."""

    @property
    def unique_name(self) -> str:
        """A unique name, for trackers that identify a run by its name."""
        return f"{self.name}-{uuid4().hex[:6]}"


class Writer(ABC):
    """A run opened in a tracker. Exceptions from its methods end only the logging."""

    id: str = ""
    """The run's id in the tracker, to open it again; empty if the run's folder suffices."""

    @abstractmethod
    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log values by name (``epoch/accuracy/L1``) after ``step`` updates."""

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:  # noqa: B027
        """Log an image, uint8 (H, W, 3); trackers without images need not implement this."""

    @abstractmethod
    def close(self, status: Status) -> None:
        """Write the remaining values and close; the run may be opened again."""


class Logger(Component):
    """A destination for the numbers of a run."""

    package: ClassVar[str] = ""
    """The package it requires, which is also the name of the extra that installs it."""

    @abstractmethod
    def open(self, run: Tracked) -> Writer:
        """Start a run in the tracker, or reopen the one with :attr:`Tracked.id`."""

    def check(self) -> None:
        """Raise UserError if its package is not installed."""
        if self.package and find_spec(self.package) is None:
            raise UserError(
                f"loggers: {self.kind} needs the package {self.package}, which is not installed: "
                f"pip install 'rome-robust[{self.package}]', or remove {self.kind} from loggers"
            )


def _alone(value: Any) -> Any:
    return [value] if isinstance(value, (str, dict, Logger)) else value


Loggers = Annotated[tuple[Logger, ...], BeforeValidator(_alone, json_schema_input_type=Logger | tuple[Logger, ...])]
"""One or more loggers."""


class Tracking:
    """The open writers of a run. A writer that raises an exception is reported and then removed."""

    def __init__(self) -> None:
        self.writers: dict[str, Writer] = {}

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self._each(lambda writer: writer.log_scalars(values, step))

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        self._each(lambda writer: writer.log_image(name, image, step))

    def close(self, status: Status) -> None:
        self._each(lambda writer: writer.close(status))

    def _each(self, do: Callable[[Writer], object]) -> None:
        for kind, writer in list(self.writers.items()):
            with self.survived(kind):
                do(writer)

    @contextmanager
    def survived(self, kind: str) -> Iterator[None]:
        """Remove the logger if its library raises. Redirect its standard output, which is for results, to stderr."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except UserError:  # such as a damaged file, which is best mended before the work begins
            raise
        except Exception as error:
            self.writers.pop(kind, None)
            say(f"loggers: {kind} failed ({first_line(error)}); continuing without it")


@contextmanager
def tracking(
    loggers: Iterable[Logger], folder: Path, name: str, config: dict[str, Any], *, after: int | None = None
) -> Iterator[Tracking]:
    """Open the loggers of a run, or reopen those that were open before, and close them at the end.

    Args:
        folder: the run's folder, which holds the file :data:`IDS` and the output of local trackers.
        name: the run's name; if empty, the name of its folder.
        config: the run's config as plain data.
        after: see :attr:`Tracked.after`.

    Raises:
        UserError: a file of the loggers in the folder is damaged.
    """
    tracked, file = Tracking(), folder / IDS
    advice = "restore it, or remove it so that the trackers start new runs"
    ids: dict[str, str] = read_plain(file, dict[str, str], advice) if file.exists() else {}
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
