"""Run one job in its own process: ``python -m rome.runs.launchers._job FOLDER PROCESSES PATIENCE CALL ARGUMENTS``.

If PROCESSES is 1, the function is called in this process. If it is larger, torchrun starts this module that many times
with PROCESSES 0, which calls the function without claiming the job.
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
    """Claim the job, run it and return the exit code."""
    if processes == 0:
        return _called(job)
    children: list[subprocess.Popen[bytes]] = []

    def lose(compromise: object) -> None:
        """End at once, because another machine has taken over the job; no file is left incomplete."""
        print(f"error: {owner(lease)} took over {job.folder}", file=sys.stderr, flush=True)
        for child in children:
            os.killpg(child.pid, signal.SIGKILL)
        os._exit(HELD)

    lease = job.lease(on_compromise=lose, thread_local=False)
    try:
        held = lease.acquire(timeout=patience)
    except Timeout:
        say(f"{owner(lease)} is working on {job.folder}")
        return HELD
    with held:
        return _called(job) if processes == 1 else _together(job, processes, children)


def _called(job: Job) -> int:
    module, _, name = job.call.partition(":")
    result = getattr(importlib.import_module(module), name)(**job.arguments)
    if result is not None and is_first():
        replace_file(job.beside("json"), json.dumps(result).encode())
    return 0


def _together(job: Job, processes: int, children: list[subprocess.Popen[bytes]]) -> int:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    stopped: list[int] = []

    def forward(number: int, frame: object) -> None:
        stopped.append(number)
        for child in children:
            child.send_signal(signal.SIGTERM)  # torchrun forwards it to its workers

    for number in (signal.SIGINT, *HANDLED):
        signal.signal(number, forward)
    children.append(subprocess.Popen([*torchrun, *job.command(0)[1:]], start_new_session=True))
    while (code := children[0].poll()) is None:
        time.sleep(0.05)
    return exit_code(stopped[-1]) if code and stopped else int(code != 0)


def main(arguments: list[str]) -> Any:
    folder, processes, patience, call, settings = arguments
    if hasattr(signal, "SIGUSR2"):  # SLURM sends submitit's signal to all processes of a job; the parent handles it
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with exiting():
        sys.exit(work(Job(Path(folder), call, json.loads(settings)), int(processes), float(patience)))


if __name__ == "__main__":
    main(sys.argv[1:])
