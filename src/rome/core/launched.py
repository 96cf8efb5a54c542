"""How this process was started: alone, or as one of several by torchrun or srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from rome.core.errors import UserError

LAUNCHED = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets for each process, besides the number of processes (``WORLD_SIZE``)."""
_STEP = {"SLURM_NTASKS": "NUM_TASKS", "SLURM_NNODES": "NUM_NODES", "SLURM_NODELIST": "NODELIST"}
"""Variables of the SLURM job that Fabric reads -> the variables of the step that srun started (SLURM_STEP_...)."""
_OURS = re.compile(
    r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
    r"|SLURM_(NTASKS\w*|NPROCS|PROCID|LOCALID|STEP\w+))"
)
"""Matches the variables by which torchrun and srun tell a process that it is one of several."""


def launched_together() -> int:
    """The number of processes that torchrun or srun started; 1 if neither did. srun's variables are translated into
    torchrun's, which all other code reads.

    Raises:
        UserError: the environment announces several processes but not how they find each other, or SLURM has several
            tasks and this process would not work together with the others.
    """
    if "RANK" not in os.environ and _number("SLURM_NTASKS") > 1:
        _adopt_srun()
    world = os.environ.get("WORLD_SIZE", "1")
    missing = [name for name in LAUNCHED if name not in os.environ]
    if not world.isdecimal() or int(world) < 1 or (int(world) > 1 and missing):
        lacks = f" without {', '.join(missing)}" if missing else ""
        raise UserError(
            f"the environment says WORLD_SIZE={world}{lacks}: start several processes with torchrun, or unset it"
        )
    return int(world)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else 0


def _adopt_srun() -> None:
    """Set torchrun's variables from those of this SLURM task, as Fabric's plugin reads them."""
    import warnings

    tasks, nodes = _number("SLURM_NTASKS"), _number("SLURM_STEP_NUM_NODES") or _number("SLURM_NNODES") or 1
    # a batch script and the shell of salloc are steps, too, with IDs from 2^32 - 16 on
    step = os.environ.get("SLURM_STEP_ID", "")
    in_step = "SLURM_PROCID" in os.environ and step.isdecimal() and int(step) < 2**32 - 16
    if not in_step or _number("SLURM_STEP_NUM_TASKS") != tasks:
        raise UserError(
            f"this SLURM job has {tasks} tasks, but this process would work alone: start it with srun "
            "(srun rome ...) or torchrun, or request a single task (srun --ntasks=1 rome ...)"
        )
    spread = os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(tasks))
    if spread not in (str(tasks // nodes), f"{tasks // nodes}(x{nodes})"):
        raise UserError(
            f"SLURM spread {tasks} tasks unevenly over {nodes} nodes ({spread}): use srun --ntasks-per-node instead "
            "of --ntasks"
        )
    for name, of_step in _STEP.items():
        os.environ[name] = os.environ.get(f"SLURM_STEP_{of_step}", os.environ.get(name, "127.0.0.1"))
    os.environ["SLURM_NTASKS_PER_NODE"] = str(tasks // nodes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

        slurm = SLURMEnvironment(auto_requeue=False)
    if "MASTER_PORT" not in os.environ:  # Fabric derives it from the job, so two steps of one job would share it
        port = slurm.main_port + 101 * _number("SLURM_STEP_ID")
        os.environ["MASTER_PORT"] = str(15000 + (port - 15000) % 10000)
    os.environ |= {
        "MASTER_ADDR": slurm.main_address,
        "RANK": str(slurm.global_rank()),
        "WORLD_SIZE": str(slurm.world_size()),
        "LOCAL_RANK": str(slurm.local_rank()),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "GROUP_RANK": str(slurm.node_rank()),
    }


def alone(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a subprocess that is to work alone, even if this process is one of several."""
    return {name: value for name, value in environment.items() if not _OURS.fullmatch(name)}


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun or srun started, or the only one."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
