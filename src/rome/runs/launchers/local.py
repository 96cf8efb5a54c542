"""The launcher for processes on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence

from rome.core.errors import UserError
from rome.core.launched import alone
from rome.runs.launchers.base import Handle, Job, Launcher

GPUS = "CUDA_VISIBLE_DEVICES"


class Local(Launcher):
    """Processes on this machine, each with its own GPUs and CPU cores."""

    kind = "local"

    def check(self, *, at_once: int | None, gpus: int | None) -> int | None:
        there, jobs = visible_gpus(), at_once or 1
        if gpus and gpus > len(there):
            raise UserError(
                f"--gpus-per-job is {gpus}, but {len(there)} GPUs are visible here"
                f"{f' ({GPUS}={os.environ[GPUS]})' if GPUS in os.environ else ''}; give at most that many"
            )
        each = min(1, len(there)) if gpus is None else gpus
        if jobs * each > len(there) > 0:
            print(f"{jobs} jobs at a time share {len(there)} GPUs (--jobs)", file=sys.stderr)
        return jobs

    def start(
        self, jobs: Sequence[Job], running: Sequence[Handle], *, at_once: int | None, gpus: int | None
    ) -> list[Handle]:
        shares, processes = shared_gpus(len(jobs), running, gpus), gpus or 1
        environment = alone(os.environ)
        environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // ((at_once or 1) * processes))))
        return [
            _Process(start_process(job, processes, environment | seeing(own)), own or ())
            for job, own in zip(jobs, shares, strict=True)
        ]


class _Process(Handle):
    def __init__(self, process: subprocess.Popen[bytes], gpus: Sequence[str]) -> None:
        self.process, self.gpus = process, gpus

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self, number: int | None) -> None:
        if number is not None:  # a signal from the terminal reaches the process by itself
            self.process.terminate()
        self.process.wait()


def shared_gpus(jobs: int, running: Sequence[Handle], gpus: int | None) -> list[list[str] | None]:
    """Assign GPUs to each new job, the least used first; None if this machine has none and ``gpus`` is None."""
    there, uses = visible_gpus(), Counter(gpu for handle in running for gpu in handle.gpus)
    shares: list[list[str] | None] = []
    for _ in range(jobs):
        own = sorted(there, key=uses.__getitem__)[: 1 if gpus is None else gpus]
        uses.update(own)
        shares.append(own if there or gpus is not None else None)
    return shares


def seeing(gpus: Sequence[str] | None) -> dict[str, str]:
    """Environment variable that limits a process to these GPUs; empty for None."""
    return {} if gpus is None else {GPUS: ",".join(gpus)}


def start_process(job: Job, processes: int, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with open(job.beside("log"), "wb") as log:
        return subprocess.Popen(job.command(processes), env=environment, stdout=subprocess.DEVNULL, stderr=log)


def visible_gpus() -> list[str]:
    """List the GPUs that this process may use, named as in CUDA_VISIBLE_DEVICES (numbers, UUIDs or names of MIG
    instances), without initializing CUDA."""
    if GPUS in os.environ:
        names = [name.strip() for name in os.environ[GPUS].split(",")]
        for place, name in enumerate(names):
            if name in ("", "-1", "NoDevFiles"):  # CUDA stops reading here; SLURM writes NoDevFiles for no GPUs
                return names[:place]
        return names
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]  # asks NVML


def cores() -> int:
    """Number of CPU cores that this process may use; containers and SLURM jobs may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
