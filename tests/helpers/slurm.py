"""sbatch, srun, sacct and scontrol, as far as submitit needs them: tasks of arrays are processes of this machine.

Run as ``python slurm.py COMMAND ARGUMENTS`` with PRETENDED_SLURM naming a folder, where what was submitted is kept.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scontrol")
SIGNS = {"%A": "SLURM_ARRAY_JOB_ID", "%a": "SLURM_ARRAY_TASK_ID", "%j": "SLURM_JOB_ID", "%t": "SLURM_PROCID"}
"""In names of files."""


def install(folder: Path) -> Path:
    """Executables of these names in ``folder/bin``, for PATH."""
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        file = folder / "bin" / name
        words = shlex.join(["env", f"PRETENDED_SLURM={folder}", sys.executable, __file__, name])
        file.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        file.chmod(0o755)
    return folder / "bin"


def sbatch(home: Path, script: str) -> None:
    text = Path(script).read_text()
    number = str(len(list(home.glob("*.sbatch"))) + 100)
    (home / f"{number}.sbatch").write_text(text)
    array = re.search(r"^#SBATCH --array=0-(\d+)", text, re.MULTILINE)
    for task in range(int(array[1]) + 1) if array else [None]:
        name = number if task is None else f"{number}_{task}"
        (home / f"{name}.state").write_text("PENDING")
        own = {} if task is None else {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": str(task)}
        own |= {"SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "node1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}
        quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen([sys.executable, __file__, "controlled", name], env=os.environ | own, **quiet)
    print(f"Submitted batch job {number}")


def controlled(home: Path, name: str) -> None:
    """Run a task, again as often as it is requeued."""
    state, requeued = home / f"{name}.state", home / f"{name}.requeue"
    code = None
    while code is None or requeued.exists():
        requeued.unlink(missing_ok=True)
        state.write_text("RUNNING")
        code = subprocess.call(["bash", str(home / f"{name.split('_')[0]}.sbatch")])
    state.write_text("FAILED" if code else "COMPLETED")


def srun(home: Path, *words: str) -> None:
    files, rest = {}, list(words)
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            name = rest.pop(0)
            for sign, variable in SIGNS.items():
                name = name.replace(sign, os.environ.get(variable, ""))
            files[option] = open(name, "ab")  # noqa: SIM115
    process = subprocess.Popen(rest, stdout=files["--output"], stderr=files["--error"])
    names = [os.environ[name] for name in ("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID") if name in os.environ]
    (home / f"{'_'.join(names)}.pid").write_text(str(process.pid))
    sys.exit(process.wait())


def sacct(home: Path, *words: str) -> None:
    print("JobID|State|NodeList")
    for file in sorted(home.glob("*.state")):
        print(f"{file.stem}|{file.read_text()}|node1")


def scontrol(home: Path, action: str, name: str) -> None:
    assert action == "requeue"
    (home / f"{name}.requeue").touch()


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(os.environ["PRETENDED_SLURM"]), *sys.argv[2:])
