"""What jobs of tests call, in processes of their own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from rome.core.errors import REQUEUE, Interrupted, UserError


def note(place: str, **more: Any) -> dict[str, Any]:
    """Write into a file that it was called, and return what the process was given."""
    with open(place, "a") as file:
        file.write(f"{os.getpid()}\n")
    given = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "RANK", "WORLD_SIZE", "SLURM_NTASKS")
    return {name: os.environ[name] for name in given if name in os.environ} | more


def exclusively(place: str) -> None:
    """Fails where another process does the same at the same time; finished work is not repeated."""
    if not Path(place).exists():
        busy = Path(f"{place}.busy")
        busy.touch(exist_ok=False)
        time.sleep(0.1)
        note(place)
        busy.unlink()


def fail(text: str) -> None:
    raise UserError(text)


def interrupted_once(place: str) -> None:
    """Stopped by a signal the first time, as a training is."""
    note(place)
    if Path(place).read_text().count("\n") == 1:
        raise Interrupted(REQUEUE, "stopped by SIGUSR1")


def killed_once(place: str) -> None:
    note(place)
    if Path(place).read_text().count("\n") == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def wait_for_sigterm(place: str) -> None:
    """Works until it is stopped, the first time."""

    def stop(number: int, frame: object) -> None:
        raise Interrupted(REQUEUE, "stopped by SIGTERM")

    signal.signal(signal.SIGTERM, stop)
    note(place)
    while Path(place).read_text().count("\n") == 1:
        time.sleep(0.01)
