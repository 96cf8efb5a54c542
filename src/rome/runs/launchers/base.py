"""The contract of every launcher: jobs go in, and what went wrong comes out.

A :class:`Job` is a function with arguments as JSON data, called in a process of its own that goes on where an earlier
one was stopped. Launchers differ in where that process starts (:meth:`Launcher.start`); this module decides which jobs
are left to do, follows them and prints a line for each.

The process holds a lease beside the job's folder while it works, so the same command may run on several machines that
share the folder: each takes other jobs, waits for those of the others, and takes over what a dead machine left
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
from rome.core.plain_data import Unreadable, parse_yaml
from rome.core.signals import exit_code, handled

HELD = 76
"""Exit code of a job that another process works on."""
LEASE = 60.0
"""Seconds without a sign of life after which another machine may take a job over. All machines must agree."""
POLL = 0.05
"""Seconds between two looks at the jobs that run, and, 40 times that, at those of others."""


@dataclass(frozen=True)
class Job:
    """A function to call in a process of its own."""

    folder: Path
    """What the job is called. ``FOLDER.log`` (standard error), ``FOLDER.lock`` and ``FOLDER.json`` (what the function
    returned, unless None) lie beside it; the folder itself belongs to the function."""
    call: str
    """``package.module:function``. Called again, it must go on where it was stopped and repeat nothing that is
    finished, for machines that start at one moment may call it one after the other. With several GPUs it is called in
    as many processes, which torchrun started."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments, JSON data."""
    name: str = ""
    """What it is called in the lines on it; its folder where empty."""
    done: Callable[[], bool] = lambda: False
    """Whether there is nothing left to do; raises UserError where the folder holds something else."""
    summary: Callable[[], str] = lambda: "done"
    """What to say of a job that has ended well."""

    def beside(self, ending: str) -> Path:
        return self.folder.with_name(f"{self.folder.name}.{ending}")

    def command(self, processes: int, patience: float = 0.5) -> list[str]:
        """The command line that works on it, with ``processes`` processes.

        Args:
            patience: seconds to wait for a claim of somebody else, who may only be looking whether it is free.
        """
        words = [str(self.folder), str(processes), str(patience), self.call, json.dumps(dict(self.arguments))]
        return [sys.executable, "-m", "rome.runs.launchers._job", *words]

    def lease(self, **options: Any) -> SoftFileLease:
        """The claim to the job, not yet acquired."""
        return SoftFileLease(self.beside("lock"), lease_duration=LEASE, **options)

    def result(self) -> Any:
        """What the function returned when it was last called; None where it returned nothing."""
        file = self.beside("json")
        return json.loads(file.read_bytes()) if file.exists() else None

    def reason(self) -> str:
        """Why it failed, by its log: the last error, or the last line."""
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
    """Those that are its own, as CUDA_VISIBLE_DEVICES names them."""
    reason: str = ""
    """Why it failed, where that is not in the job's log."""

    @abstractmethod
    def poll(self) -> int | None:
        """The exit code; None while it runs or waits to."""

    @abstractmethod
    def stop(self, number: int | None) -> None:
        """The command is stopped: end the job in order and wait for it, or leave it to go on by itself.

        Args:
            number: of the signal; None where the terminal sent it to the job, too.
        """


class Launcher(Component):
    """Where jobs run."""

    default_kind: ClassVar[str] = "local"
    stopped: ClassVar[str] = "stopped; the same command goes on"
    """Said when a signal stops the command."""

    @abstractmethod
    def start(
        self, jobs: Sequence[Job], running: Sequence[Handle], *, at_once: int | None, gpus: int | None
    ) -> list[Handle]:
        """Start jobs.

        Args:
            running: those that run already.
            at_once: how many jobs run at a time, all calls together.
            gpus: for each job; None: one where there are any.
        """

    def check(self, *, at_once: int | None, gpus: int | None) -> int | None:
        """Raise UserError, before anything is started, where this launcher cannot work so.

        Returns:
            How many jobs may be started and not ended; None: any number, for something else puts them in a queue.
        """
        return at_once

    def found(self, job: Job) -> Handle | None:
        """A job that an earlier call started and that still runs or waits, where the launcher knows."""
        return None

    def waits(self) -> bool:
        """Whether the command stays until the jobs have ended."""
        return True

    def run(self, jobs: Sequence[Job], *, at_once: int | None = None, gpus: int | None = None) -> dict[Path, str]:
        """Do what is left of the jobs.

        Args:
            at_once: how many run at a time; None: one, or as many as the launcher's queue allows.
            gpus: for each job; None: one where there are any. With several, torchrun starts a process for each.

        Returns:
            Folder -> what went wrong, for the jobs that failed.

        Raises:
            UserError: the launcher cannot work so, or a finished job is another one than asked for.
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
            print(f"{len(jobs) - len(left)} of {len(jobs)} are finished already", file=sys.stderr)
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
    """The jobs of one call, each by its number: waiting to be started, running, or with another process."""

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
            print(f"{len(self.running)} run already or wait in the queue", file=sys.stderr, flush=True)
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
                there = f"{len(self.running)} run or wait in the queue"
                print(f"{there}; the same command shows how far they are", file=sys.stderr)
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
        """Whether no other process works on the job. If one does, the job is theirs until it ends or dies."""
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
                # this very one asks again, for it remembers since when there was no sign of life
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
            self.waiting.append(number)  # where it is found to be with another process
        elif code == REQUEUE:
            self.waiting.append(number)
            self._say(number, "stopped and saved; it goes on")
        elif code < 0:
            self._fail(number, f"killed by {signal.Signals(-code).name}; the same command goes on")
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
    """Who holds a lease."""
    known = lease.owner
    return "another process" if known is None else f"process {known.pid} on {known.hostname.partition('?')[0]}"


def require_done(failed: Mapping[Any, str], jobs: int) -> None:
    """Raise UserError, a line for each, if some of so many jobs failed."""
    if failed:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in failed.items())
        raise UserError(f"{len(failed)} of {jobs} failed; the same command tries them again\n{reasons}")


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)


def chosen_launcher(text: str | None) -> Launcher:
    """The launcher of a name (``submitit``) or of settings as YAML (``{kind: submitit, partition: gpu}``).

    Raises:
        UserError: no such launcher, or not these settings.
    """
    try:
        return TypeAdapter(Launcher).validate_python({} if text is None else parse_yaml(text))
    except Unreadable as error:
        raise UserError(f"--launcher {text!r}: {error}") from None
    except ValidationError as error:
        found = [f"{'.'.join(map(str, path))}: {message}" for path, message in mistakes(error).items()]
        raise UserError("; ".join(f"--launcher: {each.removeprefix(': ')}" for each in found)) from None
