"""The launcher for SLURM. It uses submitit, whose other executors run the same jobs on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rome.core.errors import REQUEUE, UserError, first_line
from rome.core.files import replace_file
from rome.core.launched import alone
from rome.runs.launchers.base import LEASE, Handle, Job, Launcher
from rome.runs.launchers.local import seeing, shared_gpus

CONTINUE = (REQUEUE, -signal.SIGTERM)
"""Exit codes after which a job is started again. SLURM sends SIGTERM before its preemption signal; a job that has not
yet installed its signal handlers ends with -SIGTERM."""
FOLDER = "submitit"
"""Folder beside the jobs' folders, with submitit's scripts, pickles and logs, and the id of each job."""


class Submitit(Launcher):
    """SLURM job arrays of at most --jobs at a time, requeued at preemption and at the time limit, through submitit."""

    kind = "submitit"
    stopped = "stopped waiting; queued jobs continue (scancel ends them); run the same command to wait for them again"

    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """``slurm``, or, to test without SLURM, ``local`` (processes on this machine) or ``debug`` (one after the other in
    the command's own process)."""
    wait: bool = True
    """Wait until the jobs have ended and show their results; false: return once they are submitted."""
    partition: str | None = None
    """SLURM partition; null: the cluster's default."""
    account: str | None = None
    """SLURM account that the jobs are charged to; null: the cluster's default."""
    qos: str | None = None
    """SLURM quality of service; null: the cluster's default."""
    constraint: str | None = None
    """Features that a node must have, such as ``a100&nvlink``; null: any node."""
    timeout_min: int = Field(default=24 * 60, ge=1)
    """Time limit of a job in minutes, after which it is requeued."""
    max_num_timeout: int = Field(default=100, ge=0)
    """How often a job may be requeued at the time limit; after preemption it is always requeued."""
    signal_delay_s: int = Field(default=120, ge=1)
    """Seconds before the time limit at which a job is told to write its checkpoint."""
    cpus_per_task: int | None = Field(default=None, ge=1)
    """CPU cores per job; null: SLURM's default."""
    mem_gb: float | None = Field(default=None, gt=0)
    """Memory per job in GB; null: SLURM's default."""
    setup: tuple[str, ...] = ()
    """Shell commands to run before each job, such as ``module load cuda``."""
    additional_parameters: dict[str, Any] = Field(default_factory=dict)
    """Further sbatch options by name, such as ``{nice: 100, exclusive: true}``."""

    def check(self, *, at_once: int | None, gpus: int | None) -> int | None:
        if find_spec("submitit") is None:
            raise UserError(
                "--launcher submitit needs the package submitit, which is not installed: "
                "pip install 'rome-robust[slurm]', or use --launcher local"
            )
        return None if self.cluster == "slurm" or not self.wait else at_once or 1

    def waits(self) -> bool:
        return self.wait

    def start(
        self, jobs: Sequence[Job], running: Sequence[Handle], *, at_once: int | None, gpus: int | None
    ) -> list[Handle]:
        queued = self.cluster == "slurm"  # SLURM assigns the GPUs and sets CUDA_VISIBLE_DEVICES itself
        shares = [None] * len(jobs) if queued else shared_gpus(len(jobs), running, gpus)
        work = {
            job.folder: Work(job.command(gpus or 1, 2 * LEASE), job.beside("log"), seeing(own))
            for job, own in zip(jobs, shares, strict=True)
        }
        each = (1 if gpus is None else gpus) or None
        handles: dict[Path, Handle] = {}
        for folder in {job.folder.parent for job in jobs}:
            own = [job for job in jobs if job.folder.parent == folder]
            executor = self._executor(folder)
            executor.update_parameters(name="rome", gpus_per_node=each if queued else None, **self._parameters(at_once))
            try:
                submitted = executor.submit_array([work[job.folder] for job in own])
            except Exception as error:  # from submitit, or an error of sbatch
                raise UserError(f"--launcher submitit: nothing was submitted: {first_line(error)}") from error
            for job, task in zip(own, submitted, strict=True):
                replace_file(_id_file(job), str(task.job_id).encode())
                handles[job.folder] = Submitted(task, list(shares[jobs.index(job)] or ()))
        return [handles[job.folder] for job in jobs]

    def _executor(self, folder: Path) -> Any:
        import submitit

        limits = {"slurm_max_num_timeout": self.max_num_timeout, "local_max_num_timeout": self.max_num_timeout}
        try:
            return submitit.AutoExecutor(folder / FOLDER, cluster=self.cluster, **limits)
        except RuntimeError as error:  # there is no srun
            raise UserError(
                f"--launcher submitit: {first_line(error)} Try cluster: local, or --launcher local"
            ) from error

    def _parameters(self, at_once: int | None) -> dict[str, Any]:
        shared = ("timeout_min", "cpus_per_task", "mem_gb")
        own = ("partition", "account", "qos", "constraint", "signal_delay_s")
        return {
            **{name: getattr(self, name) for name in shared},
            **{f"slurm_{name}": getattr(self, name) for name in own},
            "slurm_array_parallelism": at_once,
            "slurm_setup": list(self.setup) or None,
            "slurm_additional_parameters": {
                "requeue": True,
                **self.additional_parameters,
            },  # also if a node fails
        }

    def found(self, job: Job) -> Handle | None:
        if self.cluster != "slurm" or not _id_file(job).exists():  # others end with the command or hold the lease
            return None
        executor = self._executor(job.folder.parent)
        task = executor._executor.job_class(executor.folder, _id_file(job).read_text())
        return None if task.done(force_check=True) else Submitted(task)


def _id_file(job: Job) -> Path:
    return job.folder.parent / FOLDER / f"{job.folder.name}.id"


class Submitted(Handle):
    """Handle of a job submitted by submitit."""

    def __init__(self, task: Any, gpus: Sequence[str] = ()) -> None:
        self.task, self.gpus = task, gpus

    def poll(self) -> int | None:
        if not self.task.done():
            return None
        if (error := self.task.exception()) is not None:
            self.reason = " ".join(str(error).splitlines()[:2])
            return 1
        return int(self.task.result())

    def stop(self, number: int | None) -> None:
        pass


class Work:
    """The callable that submitit pickles and runs in its job: runs a job's command until it need not be continued."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.command, self.log, self.environment = command, log.resolve(), environment

    def __call__(self) -> int:
        code: int | None = REQUEUE
        while code in CONTINUE:
            with open(self.log, "wb") as log:
                environment = alone(os.environ) | self.environment
                self.process = subprocess.Popen(self.command, env=environment, stdout=subprocess.DEVNULL, stderr=log)
            while (code := self.process.poll()) is None:  # wait() would hold a lock that checkpoint() needs
                time.sleep(0.2)
        assert code is not None
        return code

    def checkpoint(self, *arguments: Any) -> Any:
        """Stop the command so that it saves its state, and requeue; submitit calls this at preemption and time-out."""
        from submitit.helpers import DelayedSubmission

        self.process.send_signal(signal.SIGTERM)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(Work(self.command, self.log, self.environment))
