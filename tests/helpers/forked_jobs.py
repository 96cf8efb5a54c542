"""Jobs of a launcher in processes from the fork server: to start one anew costs 7 seconds."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from helpers.small_models import THREADS
from helpers.tiny_runs import started
from rome.runs.launchers import Job
from rome.runs.launchers._job import main


class Forked:
    """The process of a job."""

    def __init__(self, job: Job, processes: int, environment: Mapping[str, str]) -> None:
        self.process = started(run_quietly, job.beside("log"), job.command(processes)[3:])

    def poll(self) -> int | None:
        return self.process.exitcode

    def terminate(self) -> None:
        self.process.terminate()

    def wait(self) -> None:
        self.process.join()


def run_quietly(log: Path, job: list[str]) -> None:
    torch.set_num_threads(THREADS)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    try:
        main(job)
    finally:
        sys.stderr.flush()
