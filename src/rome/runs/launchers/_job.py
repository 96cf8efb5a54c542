"""Run one job in its own process: ``python -m rome.runs.launchers._job FOLDER PROCESSES PATIENCE CALL ARGUMENTS``.

With one process, the function is called here; with several, torchrun starts this module once for each of them, with
PROCESSES 0.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from filelock import Timeout

from rome.core.console import exiting, say
from rome.core.files import replace_file
from rome.core.launched import is_first
from rome.core.signals import HANDLED, exit_code
from rome.runs.launchers.base import HELD, Job, owner


def work(job: Job, processes: int, patience: float) -> int:
    """Acquire the job's lease and run it; return the exit code."""
    if processes == 0:
        return _call(job)
    children: list[subprocess.Popen[bytes]] = []

    def lose(compromise: object) -> None:
        """Kill everything: another machine has taken over the job, so nothing more may be written here. Files on disk
        are complete."""
        print(f"error: {owner(lease)} took over {job.folder}", file=sys.stderr, flush=True)
        for child in children:
            os.killpg(child.pid, signal.SIGKILL)
        os._exit(HELD)

    lease = job.lease(on_compromise=lose, thread_local=False)
    try:
        held = lease.acquire(timeout=patience)
    except Timeout:
        say(f"{owner(lease)} works on {job.folder}")
        return HELD
    with held:
        return _call(job) if processes == 1 else _call_with_torchrun(job, processes, children)


def _call(job: Job) -> int:
    module, _, name = job.call.partition(":")
    result = getattr(importlib.import_module(module), name)(**job.arguments)
    if result is not None and is_first():
        replace_file(job.beside("json"), json.dumps(result).encode())
    return 0


def _call_with_torchrun(job: Job, processes: int, children: list[subprocess.Popen[bytes]]) -> int:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    stopped: list[int] = []

    def forward(number: int, frame: object) -> None:
        stopped.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM)  # torchrun forwards this signal to its workers

    for number in (signal.SIGINT, *HANDLED):
        signal.signal(number, forward)
    children.append(subprocess.Popen([*torchrun, *job.command(0)[1:]], start_new_session=True))
    while (code := children[0].poll()) is None:
        time.sleep(0.05)
    return exit_code(stopped[-1]) if code and stopped else int(code != 0)


def main(arguments: list[str]) -> Any:
    folder, processes, patience, call, settings = arguments
    if hasattr(signal, "SIGUSR2"):  # submitit's signal, for the parent process, but sent to the whole job
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with exiting():
        sys.exit(work(Job(Path(folder), call, json.loads(settings)), int(processes), float(patience)))


if __name__ == "__main__":
    main(sys.argv[1:])
