"""The interface of launchers, which run jobs and report those that failed.

A :class:`Job` is a function with JSON arguments, called in its own process; called again, it continues where it was
stopped. Launchers decide where that process starts (:meth:`Launcher.start`); this module selects the jobs that are not
done yet, monitors them and prints their progress.

While it works, the process holds a lease beside the job's folder. So the same command may run on several machines that
share the folder: each takes different jobs, waits for those of the others, and takes over the jobs of a dead machine
(docs/decisions/locks.md).
"""

from __future__ import annotations

import json
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from filelock import SoftFileLease, Timeout
from pydantic import TypeAdapter, ValidationError

from rome.core.component import Component, mistakes
from rome.core.errors import REQUEUE, Interrupted, UserError
from rome.core.files import explain, make_folder
from rome.core.plain_data import Unreadable, parse_yaml, read_plain
from rome.core.signals import exit_code, handled

HELD = 76
"""Exit code if another process is working on the job."""
LEASE = 60.0
"""Seconds without a sign of life after which another machine may take over a job; must be equal on all machines."""
POLL = 0.05
"""Seconds between checks of the running jobs; jobs of other processes are checked 40 times less often."""


@dataclass(frozen=True)
class Job:
    """A function to call in its own process."""

    folder: Path
    """Identifies the job; its content is up to the function. ``FOLDER.log`` (standard error), ``FOLDER.lock`` and
    ``FOLDER.json`` (the function's result, unless None) are beside it."""
    call: str
    """The function, as ``package.module:function``. Called again, it must continue where it was stopped and repeat
    nothing that is finished, because machines that start at the same moment may call it one after the other. With
    several GPUs, it is called in as many processes, started by torchrun."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for the function, as JSON data."""
    name: str = ""
    """Name of the job in progress messages; if empty, its folder."""
    done: Callable[[], bool] = lambda: False
    """Returns whether nothing is left to do; raises UserError if the folder holds something else."""
    summary: Callable[[], str] = lambda: "done"
    """Returns the message for a job that has succeeded."""

    def beside(self, ending: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    def command(self, processes: int, patience: float = 0.5) -> list[str]:
        """Return the command line that runs the job with this many processes.

        Args:
            patience: seconds to wait if another process holds the lease, as it may only be checking whether it is free.
        """
        words = [str(self.folder), str(processes), str(patience), self.call, json.dumps(dict(self.arguments))]
        return [sys.executable, "-m", "rome.runs.launchers._job", *words]

    def lease(self, **options: Any) -> SoftFileLease:
        """Return the lease on the job, not yet acquired."""
        return SoftFileLease(self.beside("lock"), lease_duration=LEASE, **options)

    def result(self, schema: Any) -> Any:
        """Return the result of the function's last call, which is of type ``schema``; None if there is none.

        Raises:
            UserError: its file is damaged.
        """
        file = self.beside("json")
        return read_plain(file, schema, "remove it to run the job again") if file.exists() else None

    def reason(self) -> str:
        """Return the reason for a failure from the job's log: the last error message, or else the last line."""
        try:
            lines = self.beside("log").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        lines = [line.strip() for line in lines if any(letter.isalnum() for letter in line)]
        errors = [line for line in lines if line.startswith("error: ")]
        return (errors or lines or [""])[-1].removeprefix("error: ")


class Handle(ABC):
    """A job that was started."""

    gpus: Sequence[str] = ()
    """GPUs assigned to the job, named as in CUDA_VISIBLE_DEVICES."""
    reason: str = ""
    """Reason for a failure that the job's log does not contain."""

    @abstractmethod
    def poll(self) -> int | None:
        """Return the exit code; None while the job runs or waits in a queue."""

    @abstractmethod
    def stop(self, number: int | None) -> None:
        """Handle a signal that stops the command: shut the job down and wait for it, or leave it running.

        Args:
            number: of the signal; None if the terminal sent the signal to the job, too.
        """


class Launcher(Component):
    """The place where jobs run."""

    default_kind: ClassVar[str] = "local"
    stopped: ClassVar[str] = "stopped; run the same command again to continue"
    """Message when a signal stops the command."""

    @abstractmethod
    def start(
        self, jobs: Sequence[Job], running: Sequence[Handle], *, at_once: int | None, gpus: int | None
    ) -> list[Handle]:
        """Start jobs.

        Args:
            running: jobs that are already running.
            at_once: number of jobs that may run at the same time, over all calls.
            gpus: GPUs per job; None: one if there are any.
        """

    def check(self, *, at_once: int | None, gpus: int | None) -> int | None:
        """Raise UserError, before anything is started, if this launcher does not support these options.

        Returns:
            Maximum number of jobs started and not yet ended; None: unlimited, because an external queue limits them.
        """
        return at_once

    def found(self, job: Job) -> Handle | None:
        """Return the handle of a job that an earlier command started and that still runs or waits in a queue."""
        return None

    def waits(self) -> bool:
        """Whether the command waits until the jobs have ended."""
        return True

    def run(self, jobs: Sequence[Job], *, at_once: int | None = None, gpus: int | None = None) -> dict[Path, str]:
        """Run the jobs that are not done yet.

        Args:
            at_once: number of jobs at the same time; None: one, or as many as the launcher's queue allows.
            gpus: GPUs per job; None: one if there are any. With several, torchrun starts one process per GPU.

        Returns:
            Folder -> reason, for the jobs that failed.

        Raises:
            UserError: the launcher does not support the options, or a folder holds a different job.
            Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGUSR2.
        """
        at_once = at_once and min(at_once, max(1, len(jobs)))
        limit = self.check(at_once=at_once, gpus=gpus)
        if len({job.folder for job in jobs}) < len(jobs):
            raise UserError("two jobs have the same folder; name each once")
        for folder in {job.folder.parent for job in jobs}:
            make_folder(folder)
        left = {number: job for number, job in enumerate(jobs, 1) if not job.done()}
        if len(left) < len(jobs):
            print(f"{len(jobs) - len(left)} of {len(jobs)} already finished", file=sys.stderr)
        following = _Following(self, len(jobs), left)
        with handled(_stop):
            try:
                following.all(limit, at_once=at_once, gpus=gpus)
            except KeyboardInterrupt as stop:
                number = stop.args[0] if stop.args else None
                following.stop(number)
                raise Interrupted(exit_code(number or signal.SIGINT), self.stopped) from None
            except BaseException:
                following.stop(signal.SIGTERM)
                raise
        return following.failed


class _Following:
    """State of the jobs in one call, by number: waiting to be started, running, or claimed by another process."""

    def __init__(self, launcher: Launcher, total: int, jobs: dict[int, Job]) -> None:
        self.launcher, self.total, self.jobs = launcher, total, jobs
        self.waiting = list(jobs)
        self.running: dict[int, Handle] = {}
        self.elsewhere: dict[int, SoftFileLease] = {}
        self.failed: dict[Path, str] = {}
        self.began: dict[int, float] = {}

    def all(self, limit: int | None, **resources: int | None) -> None:
        for number in list(self.waiting):
            if handle := self.launcher.found(self.jobs[number]):
                self._begin(number, handle)
        if self.running and self.launcher.waits():
            print(f"{len(self.running)} already running or in the queue", file=sys.stderr, flush=True)
        looks = 0
        while self.waiting or self.running or self.elsewhere:
            room = len(self.waiting) if limit is None else limit - len(self.running)
            chosen: list[int] = []
            while self.waiting and len(chosen) < room:
                number = self.waiting.pop(0)
                if self._free(number):
                    chosen.append(number)
            if chosen:
                jobs, running = [self.jobs[number] for number in chosen], list(self.running.values())
                for job in jobs:
                    job.beside("json").unlink(missing_ok=True)
                handles = self.launcher.start(jobs, running, **resources)
                for number, handle in zip(chosen, handles, strict=True):
                    self._begin(number, handle)
            if not self.launcher.waits():
                there = f"{len(self.running)} running or in the queue"
                print(f"{there}; run the same command again to see their progress", file=sys.stderr)
                return
            time.sleep(POLL)
            for number, handle in list(self.running.items()):
                if (code := handle.poll()) is not None:
                    self._ended(number, handle, code)
            looks += 1
            if looks % 40 == 0:
                self._look_elsewhere()

    def stop(self, number: int | None) -> None:
        for handle in self.running.values():
            handle.stop(number)

    def _begin(self, number: int, handle: Handle) -> None:
        if number in self.waiting:
            self.waiting.remove(number)
        self.running[number] = handle
        self.began.setdefault(number, time.monotonic())

    def _free(self, number: int) -> bool:
        """Whether this command may start the job; if another process works on it, wait until that ends or dies."""
        job = self.jobs[number]
        lease = self.elsewhere.get(number) or job.lease()
        try:
            lease.acquire(blocking=False)
            lease.release()
            theirs = self.elsewhere.pop(number, None) is not None or number in self.began
            if theirs and job.done():
                self._say(number, f"{job.summary()} (by another process)")
                return False
        except Timeout:
            if number not in self.elsewhere:
                # Keep this lease object for the next try: it records since when there was no sign of life.
                self.elsewhere[number] = lease
                self._say(number, f"{owner(lease)} is working on it; waiting")
            return False
        except (OSError, UserError) as error:
            self.elsewhere.pop(number, None)
            self._fail(number, (explain(error) if isinstance(error, OSError) else None) or str(error))
            return False
        return True

    def _look_elsewhere(self) -> None:
        for number in list(self.elsewhere):
            if self._free(number):
                self.waiting.append(number)

    def _ended(self, number: int, handle: Handle, code: int) -> None:
        del self.running[number]
        job = self.jobs[number]
        if code == HELD:
            self.waiting.append(number)  # the next try finds that another process has it
        elif code == REQUEUE:
            self.waiting.append(number)
            self._say(number, "stopped and saved; it will be continued")
        elif code < 0:
            self._fail(number, f"killed by {signal.Signals(-code).name}; run the same command again to continue")
        elif code:
            self._fail(number, handle.reason or job.reason() or f"exit code {code}")
        else:
            self._say(number, f"{job.summary()} ({time.monotonic() - self.began[number]:.0f} s)")

    def _fail(self, number: int, reason: str) -> None:
        self.failed[self.jobs[number].folder] = reason
        self._say(number, reason)

    def _say(self, number: int, text: str) -> None:
        job = self.jobs[number]
        print(f"[{number}/{self.total}] {job.name or job.folder}: {text}", file=sys.stderr, flush=True)


def owner(lease: SoftFileLease) -> str:
    """Describe the process that holds a lease."""
    known = lease.owner
    return "another process" if known is None else f"process {known.pid} on {known.hostname.partition('?')[0]}"


def require_done(failed: Mapping[Any, str], jobs: int) -> None:
    """Raise UserError, with one line per failure, if any of the jobs failed.

    Args:
        failed: name -> reason.
        jobs: number of all jobs.
    """
    if failed:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {jobs} failed; run the same command again to retry\n{reasons}")


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def chosen_launcher(text: str | None) -> Launcher:
    """Parse a launcher from its name (``submitit``) or settings in YAML (``{kind: submitit, partition: gpu}``).

    Raises:
        UserError: there is no such launcher, or its settings are invalid.
    """
    try:
        return TypeAdapter(Launcher).validate_python({} if text is None else parse_yaml(text))
    except Unreadable as error:
        raise UserError(f"--launcher {text!r}: {error}") from None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, path))}: {message}" for path, message in mistakes(error).items()]
        raise UserError("; ".join(f"--launcher: {each.removeprefix(': ')}" for each in found)) from None
