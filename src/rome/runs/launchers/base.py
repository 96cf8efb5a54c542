"""The interface of all launchers: they run jobs and report which ones failed, and why.

A :class:`Job` is a function with JSON arguments, called in a process of its own, which continues where an earlier one
stopped. Launchers differ in where that process runs (:meth:`Launcher.start`); this module decides which jobs are left
to do, follows them and prints a line for each.

The process holds a lease beside the job's folder while it works, so the same command may run on several machines that
share the folder: each takes different jobs, waits for those of the others, and takes over the jobs of a machine that
died (docs/decisions/locks.md).
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
from rome.core.plain_data import Unreadable, parse_yaml
from rome.core.signals import exit_code, handled

HELD = 76
"""Exit code of a job that another process is working on."""
LEASE = 60.0
"""Seconds without a sign of life after which another machine may take over a job. Must be equal on all machines."""
POLL = 0.05
"""Seconds between checks of running jobs; jobs of other processes are checked every 40 times that."""


@dataclass(frozen=True)
class Job:
    """A function to call in a process of its own."""

    folder: Path
    """The folder that the function writes to, which identifies the job. Beside it are ``FOLDER.log`` (standard error),
    ``FOLDER.lock`` and ``FOLDER.json`` (the function's return value, unless None)."""
    call: str
    """The function, ``package.module:function``. When called again, it must continue where it stopped and not repeat
    finished work, since machines that start at the same moment may call it one after the other. With several GPUs it is
    called in as many processes, started by torchrun."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function, JSON data."""
    name: str = ""
    """Name in progress messages; if empty, the folder."""
    done: Callable[[], bool] = lambda: False
    """Return whether there is nothing left to do; raise UserError if the folder holds something else."""
    summary: Callable[[], str] = lambda: "done"
    """Return the message about the job once it has succeeded."""

    def beside(self, ending: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    def command(self, processes: int, patience: float = 0.5) -> list[str]:
        """The command line that runs the job in so many processes.

        Args:
            patience: seconds to wait for another process's lease, which may merely be a check whether the job is free.
        """
        words = [str(self.folder), str(processes), str(patience), self.call, json.dumps(dict(self.arguments))]
        return [sys.executable, "-m", "rome.runs.launchers._job", *words]

    def lease(self, **options: Any) -> SoftFileLease:
        """The lease on the job, not yet acquired."""
        return SoftFileLease(self.beside("lock"), lease_duration=LEASE, **options)

    def result(self) -> Any:
        """Return value of the function's last call; None if it returned nothing."""
        file = self.beside("json")
        return json.loads(file.read_bytes()) if file.exists() else None

    def reason(self) -> str:
        """Why the job failed, from its log: the last line with an error, or else the last line."""
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
    """GPUs assigned to the job, as named in CUDA_VISIBLE_DEVICES."""
    reason: str = ""
    """Why the job failed, if its log does not say."""

    @abstractmethod
    def poll(self) -> int | None:
        """The exit code; None while the job is queued or running."""

    @abstractmethod
    def stop(self, number: int | None) -> None:
        """Called when the command is stopped: end the job cleanly and wait for it, or let it continue by itself.

        Args:
            number: of the signal; None if the terminal has sent it to the job too.
        """


class Launcher(Component):
    """Runs jobs: on this machine, or in the queue of a cluster."""

    default_kind: ClassVar[str] = "local"
    stopped: ClassVar[str] = "stopped; the same command continues"
    """Message when a signal stops the command."""

    @abstractmethod
    def start(
        self, jobs: Sequence[Job], running: Sequence[Handle], *, at_once: int | None, gpus: int | None
    ) -> list[Handle]:
        """Start jobs.

        Args:
            running: jobs that are running already.
            at_once: how many jobs may run at a time, over all calls.
            gpus: number per job; None: one if there are any.
        """

    def check(self, *, at_once: int | None, gpus: int | None) -> int | None:
        """Raise UserError, before anything starts, if this launcher cannot work with these settings.

        Returns:
            How many started jobs may be unfinished at a time; None: any number, since something else queues them.
        """
        return at_once

    def found(self, job: Job) -> Handle | None:
        """Handle of the job if an earlier command started it and it is still queued or running, as far as is known."""
        return None

    def waits(self) -> bool:
        """Whether the command waits until the jobs have ended."""
        return True

    def run(self, jobs: Sequence[Job], *, at_once: int | None = None, gpus: int | None = None) -> dict[Path, str]:
        """Run the jobs that are not finished yet.

        Args:
            at_once: how many run at a time; None: one, or as many as the launcher's queue allows.
            gpus: number per job; None: one if there are any. With several, torchrun starts a process for each.

        Returns:
            Folder -> reason, for the jobs that failed.

        Raises:
            UserError: the launcher cannot work with these settings, or the folder of a job holds something else.
            Interrupted: SIGINT, SIGTERM, SIGUSR1 or SIGUSR2 arrived.
        """
        at_once = at_once and min(at_once, max(1, len(jobs)))
        limit = self.check(at_once=at_once, gpus=gpus)
        if len({job.folder for job in jobs}) < len(jobs):
            raise UserError("two jobs have the same folder; name each once")
        for folder in {job.folder.parent for job in jobs}:
            make_folder(folder)
        left = {number: job for number, job in enumerate(jobs, 1) if not job.done()}
        if len(left) < len(jobs):
            print(f"{len(jobs) - len(left)} of {len(jobs)} are finished already", file=sys.stderr)
        following = _JobQueue(self, len(jobs), left)
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


class _JobQueue:
    """The jobs of one call, by number: waiting to be started, running, or held by another process."""

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
            print(f"{len(self.running)} are already running or queued", file=sys.stderr, flush=True)
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
                there = f"{len(self.running)} are running or queued"
                print(f"{there}; the same command shows their progress", file=sys.stderr)
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
        """Whether no other process is working on the job. If one is, the job remains with it until it ends or dies."""
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
                # kept and asked again: it remembers how long there has been no sign of life
                self.elsewhere[number] = lease
                self._say(number, f"{owner(lease)} works on it; waiting")
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
            self.waiting.append(number)  # then it turns out to be held by another process
        elif code == REQUEUE:
            self.waiting.append(number)
            self._say(number, "stopped and saved; it will continue")
        elif code < 0:
            self._fail(number, f"killed by {signal.Signals(-code).name}; the same command continues")
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
    """The process that holds a lease, for messages."""
    known = lease.owner
    return "another process" if known is None else f"process {known.pid} on {known.hostname.partition('?')[0]}"


def require_done(failed: Mapping[Any, str], jobs: int) -> None:
    """Raise UserError if any of so many jobs failed, with a line for each; ``failed`` maps a name to the reason."""
    if failed:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {jobs} failed; the same command tries them again\n{reasons}")


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def chosen_launcher(text: str | None) -> Launcher:
    """Parse a launcher's name (``submitit``) or its settings as YAML (``{kind: submitit, partition: gpu}``).

    Raises:
        UserError: unknown launcher, or invalid settings.
    """
    try:
        return TypeAdapter(Launcher).validate_python({} if text is None else parse_yaml(text))
    except Unreadable as error:
        raise UserError(f"--launcher {text!r}: {error}") from None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, path))}: {message}" for path, message in mistakes(error).items()]
        raise UserError("; ".join(f"--launcher: {each.removeprefix(': ')}" for each in found)) from None
