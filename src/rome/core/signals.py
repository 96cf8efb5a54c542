"""The signals that ask a command to stop, and their exit codes.

SIGINT exits with 130, as in a shell: someone at a terminal wants to stop the work. SIGTERM, SIGUSR1 and SIGUSR2 come
from the scheduler, at the end of a job's time (``sbatch --signal=USR1@120``; submitit sends SIGUSR2), before it is
preempted or when a machine shuts down. They exit with :data:`rome.core.errors.REQUEUE`: another job can continue.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from rome.core.errors import REQUEUE

HANDLED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name))
"""Signals handled in addition to SIGINT, which Python handles itself. Windows lacks SIGUSR1 and SIGUSR2."""


def exit_code(number: int) -> int:
    """The exit code of a command that this signal stopped."""
    return REQUEUE if number in HANDLED else 128 + number


class Stopped(BaseException):
    """A signal ended the work at once. Like KeyboardInterrupt, it is not caught together with ordinary errors."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; finished work is kept")
        self.code = exit_code(number)

    @classmethod
    def at_once(cls, number: int, frame: object) -> NoReturn:
        """Signal handler for :func:`handled`."""
        raise cls(number)


@contextmanager
def handled(handler: Callable[[int, Any], object], numbers: tuple[int, ...] = HANDLED) -> Iterator[None]:
    """Install a signal handler, and restore the earlier ones afterwards. Does nothing outside the main thread."""
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
