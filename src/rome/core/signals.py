"""The signals that ask a command to stop, and the exit code that each ends in.

SIGINT and SIGTERM end in 128 + their number, as a shell has it: whoever sent them wants the work gone. SIGUSR1 and
SIGUSR2 announce the end of a job's time (``sbatch --signal=USR1@120``; submitit sends the latter) and end in
:data:`rome.core.errors.REQUEUE`: the work is to go on in another job.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rome.core.errors import REQUEUE

ANNOUNCED = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Windows has none of them."""
HANDLED = (signal.SIGTERM, *ANNOUNCED)
"""Beside SIGINT, which Python handles by itself."""


def exit_code(number: int) -> int:
    return REQUEUE if number in ANNOUNCED else 128 + number


class Stopped(BaseException):
    """A signal ended the work at once. Nothing on the way takes it for an error of the work, as with Ctrl-C."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; what is finished is kept")
        self.code = exit_code(number)

    @classmethod
    def at_once(cls, number: int, frame: object) -> NoReturn:
        """For :func:`handled`."""
        raise cls(number)


@contextmanager
def handled(handler: Callable[[int, Any], object], numbers: tuple[int, ...] = HANDLED) -> Iterator[None]:
    """Signals call this inside, and what they called before afterwards. In other threads than the main one nothing
    changes."""
    before: dict[int, Any] = {}
    try:
        for number in numbers:
            before[number] = signal.signal(number, handler)
    except ValueError:  # not the main thread
        pass
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
