"""The signals that ask a command to stop, and the exit code that each ends in.

SIGINT ends in 130, as a shell has it: somebody at a terminal wants the work gone. SIGTERM, SIGUSR1 and SIGUSR2 come
from what runs the job, at the end of its time (``sbatch --signal=USR1@120``; submitit sends SIGUSR2), before it is
preempted or when a machine shuts down. They end in :data:`rome.core.errors.REQUEUE`: the work can go on in another job.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rome.core.errors import REQUEUE

HANDLED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Beside SIGINT, which Python handles by itself. Windows lacks SIGUSR1 and SIGUSR2."""


def exit_code(number: int) -> int:
    return REQUEUE if number in HANDLED else 128 + number


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
