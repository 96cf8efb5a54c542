"""Launchers: which jobs run, with what, and how each ends, on one machine, on several, and on a SLURM that pretends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import SoftFileLease

import rome
from helpers import slurm
from helpers.problems import case
from helpers.tiny_runs import wait_for
from rome.core.errors import REQUEUE, Interrupted, UserError
from rome.core.files import replace_file, replace_with
from rome.runs.launchers import Job, Local, _job, base, chosen_launcher
from rome.runs.launchers.local import visible_gpus

HERE = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes find the helpers, and no variables of a job that the tests may run in."""
    places = [str(HERE), str(Path(rome.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def jobs(folder: Path, number: int, call: str = "note") -> list[Job]:
    return [Job(folder / f"job{i}", f"helpers.jobs:{call}", {"place": str(folder / f"{i}.txt")}) for i in range(number)]


class Fake:
    """A process that ends after so many looks with the codes of its job, one for each time that it is started."""

    def __init__(self, looks: int, code: int) -> None:
        self.looks, self.code, self.signals = looks, code, list[int]()

    def poll(self) -> int | None:
        self.looks -= 1
        return self.code if self.looks < 0 else None

    def terminate(self) -> None:
        self.signals.append(signal.SIGTERM)

    def wait(self) -> int:
        return self.code


class Machine:
    """What a launcher started here: (job's name, processes, variables), and the codes with which jobs end."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int, dict[str, str]]] = []
        self.fakes: list[Fake] = []
        self.codes: dict[str, list[int]] = {}
        self.looks: dict[str, int] = {}

    def start(self, job: Job, processes: int, environment: dict[str, str]) -> Any:
        self.started.append((job.folder.name, processes, environment))
        codes = self.codes.get(job.folder.name, [])
        self.fakes.append(Fake(self.looks.get(job.folder.name, 0), codes.pop(0) if codes else 0))
        return self.fakes[-1]

    def gpus(self) -> list[str | None]:
        return [variables.get("CUDA_VISIBLE_DEVICES") for _, _, variables in self.started]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine()
    monkeypatch.setattr("rome.runs.launchers.local.start_process", machine.start)
    monkeypatch.setattr("rome.runs.launchers.local.cores", lambda: 12)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr(base, "POLL", 0.0)
    return machine


# GPUs and cores


def test_gpus_that_a_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    assert visible_gpus() == ["0", "1", "2"]
    uuids = ["GPU-8932f937-d72c", "MIG-a1208c4e-caad"]
    for text, names in {
        "2,5": ["2", "5"], " 2 , 5 ": ["2", "5"], ",".join(uuids): uuids, "": [], "-1": [], "0,-1,1": ["0"],
        "NoDevFiles": [],
    }.items():  # fmt: skip
        with case(text):
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
            assert visible_gpus() == names


def test_each_job_gets_a_gpu_that_no_other_has_and_gives_it_back(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7,MIG-1")
    machine.looks = {"job0": 5, "job1": 1, "job2": 9}
    assert Local().run(jobs(tmp_path, 5), at_once=3) == {}
    assert machine.gpus() == ["4", "GPU-7", "MIG-1", "GPU-7", "GPU-7"], "whoever ends first makes room"
    assert {variables["OMP_NUM_THREADS"] for _, _, variables in machine.started} == {"4"}, "12 cores among 3 jobs"


def test_several_gpus_are_as_many_processes(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    machine.looks = {"job0": 3, "job1": 3}
    assert Local().run(jobs(tmp_path, 2), at_once=2, gpus=2) == {}
    assert machine.gpus() == ["0,1", "2,3"]
    assert [processes for _, processes, _ in machine.started] == [2, 2]
    assert machine.started[0][2]["OMP_NUM_THREADS"] == "5", "the user's own"


def test_more_jobs_than_gpus_share_them_and_it_is_said(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    machine.looks = dict.fromkeys(("job0", "job1", "job2", "job3"), 3)
    Local().run(jobs(tmp_path, 4), at_once=8)
    assert machine.gpus() == ["0", "1", "0", "1"]
    assert "4 jobs at a time share 2 GPUs (--jobs)" in capsys.readouterr().err


def test_without_gpus(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Local().run(jobs(tmp_path / "a", 1))
    assert "CUDA_VISIBLE_DEVICES" not in machine.started[-1][2]
    with pytest.raises(UserError, match=r"--gpus-per-job is 2, but 0 GPUs are visible here; give at most that many"):
        Local().run(jobs(tmp_path / "b", 1), gpus=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"2, but 1 GPUs are visible here \(CUDA_VISIBLE_DEVICES=3\)"):
        Local().run(jobs(tmp_path / "b", 1), gpus=2)
    assert not (tmp_path / "b").exists()
    Local().run(jobs(tmp_path / "b", 1), gpus=0)
    assert machine.started[-1][2]["CUDA_VISIBLE_DEVICES"] == ""


def test_a_job_is_not_one_of_the_processes_of_whoever_starts_it(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight tasks of srun may each run the same sweep; its jobs are none of the eight."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_STEP_ID"):
        monkeypatch.setenv(name, "8")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    Local().run(jobs(tmp_path, 1))
    assert {name for name in machine.started[0][2] if name.startswith("SLURM_")} == {"SLURM_JOB_ID"}
    assert "RANK" not in machine.started[0][2]


# How jobs end


def test_what_is_done_is_left_out_and_what_fails_leaves_the_others_alone(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = jobs(tmp_path, 3)
    machine.codes = {"job1": [2], "job2": [-9]}
    done = Job(first.folder, first.call, done=lambda: True)
    named = Job(second.folder, second.call, name="mine")
    failed = Local().run([done, named, third])
    assert failed == {
        second.folder: "exit code 2",
        third.folder: "killed by SIGKILL; run the same command again to continue",
    }
    told = capsys.readouterr().err.splitlines()
    assert told[:2] == ["1 of 3 already finished", "[2/3] mine: exit code 2"]


def test_the_reason_is_the_last_error_in_the_log(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, 1)
    logs = {
        "error: one\nerror: two\nE1128 torchrun says more\n=====\n": "two",
        "Traceback\n  KeyError: 'x'\n\n": "KeyError: 'x'",
        "": "",
    }
    for text, reason in logs.items():
        job.beside("log").write_text(text)
        assert job.reason() == reason


def test_a_job_that_was_stopped_and_saved_goes_on(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.codes = {"job0": [REQUEUE, REQUEUE, 0]}
    assert Local().run(jobs(tmp_path, 2)) == {}
    assert [name for name, *_ in machine.started] == ["job0", "job1", "job0", "job0"]
    assert capsys.readouterr().err.count("[1/2]") == 3


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, REQUEUE), (signal.SIGUSR1, REQUEUE), (signal.SIGINT, 130)]
)
def test_a_signal_stops_the_jobs_in_order(
    number: int, code: int, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.looks = {"job0": 99, "job1": 99}
    before = signal.getsignal(signal.SIGTERM)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job ignores
    monkeypatch.setattr("rome.runs.launchers.base.time.sleep", lambda _: signal.raise_signal(number))
    with pytest.raises(Interrupted, match="run the same command again to continue") as ended:
        Local().run(jobs(tmp_path, 3), at_once=2)
    signal.signal(signal.SIGINT, interrupt)
    assert ended.value.code == code
    assert [fake.signals for fake in machine.fakes] == [[] if number == signal.SIGINT else [signal.SIGTERM]] * 2
    assert signal.getsignal(signal.SIGTERM) == before


def test_two_jobs_of_one_folder_are_refused(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two jobs have the same folder"):
        Local().run([*jobs(tmp_path, 1), *jobs(tmp_path, 1)])


# Several machines


def marker(job: Job, host: str = "node7") -> None:
    """The lease of a machine that gives no further sign of life."""
    lines = ["filelock/2", "pid=4711", f"host={host}", "mode=lease", "token=abc", f"duration={base.LEASE!r}"]
    job.beside("lock").write_text("".join(f"{line}\n" for line in lines))


def test_a_job_of_another_machine_is_waited_for(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "POLL", 0.001)
    first, second = jobs(tmp_path, 2)
    theirs = Job(first.folder, first.call, done=(tmp_path / "done").exists, summary=lambda: "well")
    lease = theirs.lease(thread_local=False)
    lease.acquire()

    def end() -> None:
        (tmp_path / "done").touch()
        lease.release()

    timer = threading.Timer(0.3, end)
    timer.start()
    assert Local().run([theirs, second]) == {}
    timer.join()
    assert [name for name, *_ in machine.started] == ["job1"]
    told = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"\[1/2\] {theirs.folder}: process {os.getpid()} on \S+ is working on it; waiting", told[0])
    assert told[-1] == f"[1/2] {theirs.folder}: well (by another process)"


@pytest.mark.parametrize("ahead", [0, 86400, -86400])
def test_a_dead_machine_is_taken_over_from_whatever_its_clock_said(
    ahead: int, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "LEASE", 0.3)
    monkeypatch.setattr(base, "POLL", 0.001)
    (job,) = jobs(tmp_path, 1)
    marker(job)
    os.utime(job.beside("lock"), (time.time() + ahead,) * 2)
    began = time.monotonic()
    assert Local().run([job]) == {}
    assert len(machine.started) == 1
    assert time.monotonic() - began > 0.3, "no earlier than after so long without a sign of life"
    assert not job.beside("lock").exists()


def test_a_job_that_another_machine_took_meanwhile_is_waited_for(machine: Machine, tmp_path: Path) -> None:
    machine.codes = {"job0": [base.HELD, 0]}
    assert Local().run(jobs(tmp_path, 1)) == {}
    assert len(machine.started) == 2


def test_a_lock_that_cannot_be_made_is_one_line_and_the_others_run(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a share without room or with a stale handle."""
    first, second = jobs(tmp_path, 2)
    acquire = SoftFileLease.acquire

    def stale(self: SoftFileLease, *arguments: Any, **options: Any) -> Any:
        if "job0" in self.lock_file:
            raise OSError(116, "Stale file handle", self.lock_file)
        return acquire(self, *arguments, **options)

    monkeypatch.setattr(SoftFileLease, "acquire", stale)
    assert Local().run([first, second]) == {first.folder: f"{first.beside('lock')}: Stale file handle: check the path"}
    monkeypatch.undo()
    monkeypatch.setattr("rome.runs.launchers.local.start_process", machine.start)
    assert Local().run([first]) == {}


def test_a_claimed_job_is_left_to_its_owner(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, 1)
    with job.lease():
        assert _job.work(job, 1, 0.1) == base.HELD
    assert not Path(job.arguments["place"]).exists()
    assert _job.work(job, 1, 0.1) == 0
    assert not job.beside("lock").exists()


def test_whoever_loses_its_lease_writes_no_more(tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, 1, "wait_for_sigterm")
    source = (
        "import sys; from pathlib import Path; from rome.runs.launchers import Job, _job, base; base.LEASE = 0.3;"
        "sys.exit(_job.work(Job(Path(sys.argv[1]), sys.argv[2], {'place': sys.argv[3]}), 1, 1))"
    )
    command = [sys.executable, "-c", source, str(job.folder), job.call, job.arguments["place"]]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(Path(job.arguments["place"]).exists)
    job.beside("lock").unlink()
    marker(job)
    _, told = process.communicate(timeout=20)
    assert process.returncode == base.HELD
    assert told == f"error: process 4711 on node7 took over {job.folder}\n"


@pytest.mark.slow
def test_a_rename_that_fails_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = jobs(tmp_path, 1)

    def fails(*arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    for broken, code in ((True, 2), (False, 0)):
        if broken:
            monkeypatch.setattr("os.replace", fails)
        with pytest.raises(SystemExit) as ended:
            _job.main(job.command(1)[3:])
        monkeypatch.undo()
        assert ended.value.code == code
    assert capsys.readouterr().err == f"error: {job.beside('json')}: Input/output error: check the path\n"
    assert {file.name for file in tmp_path.iterdir()} == {"0.txt", "job0.json"}, "no lock, nothing half written"


def test_processes_of_one_number_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the first processes of two containers."""
    monkeypatch.setattr("os.getpid", lambda: 1)

    def write(partial: Path) -> None:
        partial.write_bytes(b"mine")
        replace_file(tmp_path / "file", b"theirs")

    replace_with(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# Real processes


def test_processes_are_called_fail_are_killed_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    monkeypatch.setenv("RANK", "3")
    place = {name: {"place": str(tmp_path / f"{name}.txt")} for name in ("note", "killed_once", "interrupted_once")}
    given = place | {"fail": {"text": "no such data"}}
    chosen = [Job(tmp_path / "out" / name, f"helpers.jobs:{name}", given[name]) for name in given]
    failed = Local().run(chosen, at_once=2)
    assert {folder.name: reason for folder, reason in failed.items()} == {
        "killed_once": "killed by SIGKILL; run the same command again to continue",
        "fail": "no such data",
    }
    assert chosen[0].result(dict[str, Any])["CUDA_VISIBLE_DEVICES"] == "5"
    assert "RANK" not in chosen[0].result(dict[str, Any])
    assert (tmp_path / "interrupted_once.txt").read_text().count("\n") == 2
    assert "interrupted_once: stopped and saved; it will be continued" in capsys.readouterr().err
    assert chosen[1].beside("lock").exists(), "of a process that is no more"
    assert Local().run([chosen[1]]) == {}
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".json", *[".log"] * 4]


@pytest.mark.slow
def test_several_gpus_are_processes_of_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    noting, failing = jobs(tmp_path, 1)[0], Job(tmp_path / "fails", "helpers.jobs:fail", {"text": "no such data"})
    assert Local().run([noting, failing], gpus=2) == {failing.folder: "no such data"}
    assert Path(noting.arguments["place"]).read_text().count("\n") == 2
    assert noting.result(dict[str, Any]) | {"OMP_NUM_THREADS": ""} == {
        "CUDA_VISIBLE_DEVICES": "0,1", "RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "",
    }  # fmt: skip


SHARING = """
import sys
from pathlib import Path
from rome.runs.launchers import Job, Local
out = Path(sys.argv[1])
places = [out / f"{number}.txt" for number in range(6)]
jobs = [Job(out / place.stem, "helpers.jobs:exclusively", {"place": str(place)}, done=place.exists) for place in places]
sys.exit(len(Local().run(jobs, at_once=2)))
"""


@pytest.mark.slow
def test_two_launchers_never_do_the_same_at_the_same_time(tmp_path: Path) -> None:
    both = [subprocess.Popen([sys.executable, "-c", SHARING, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert [len(file.read_text().splitlines()) for file in sorted(tmp_path.glob("*.txt"))] == [1] * 6


# SLURM, as submitit sees it


@pytest.fixture
def slurm_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the pretended SLURM keeps what was submitted to it."""
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", f"{slurm.install(tmp_path / 'slurm')}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "slurm"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # submitit leaves files open
@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_submitit_without_slurm(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-5,3")
    given: dict[str, dict[str, Any]] = {
        name: {"place": str(tmp_path / f"{name}.txt")} for name in ("note", "killed_once", "interrupted_once")
    }
    given["fail"] = {"text": "no such data"}
    chosen = [Job(tmp_path / "out" / name, f"helpers.jobs:{name}", given[name]) for name in given]
    launcher = chosen_launcher(f"{{kind: submitit, cluster: {cluster}}}")
    failed = launcher.run(chosen, at_once=2)
    assert {folder.name: reason for folder, reason in failed.items()} == {
        "killed_once": "killed by SIGKILL; run the same command again to continue",
        "fail": "no such data",
    }
    assert chosen[0].result(dict[str, Any])["CUDA_VISIBLE_DEVICES"] == "GPU-5"
    assert (tmp_path / "interrupted_once.txt").read_text().count("\n") == 2
    assert launcher.run([chosen[1]]) == {}


@pytest.mark.slow
def test_an_array_of_slurm(slurm_home: Path, tmp_path: Path) -> None:
    given: dict[str, dict[str, Any]] = {f"note{i}": {"place": str(tmp_path / f"{i}.txt")} for i in range(2)}
    given["fail"] = {"text": "no such data"}
    chosen = [Job(tmp_path / "out" / name, f"helpers.jobs:{name.strip('01')}", given[name]) for name in given]
    text = "{kind: submitit, partition: gpu, timeout_min: 90, additional_parameters: {nice: 3}}"
    assert chosen_launcher(text).run(chosen, at_once=2, gpus=0) == {chosen[2].folder: "no such data"}
    (script,) = slurm_home.glob("*.sbatch")
    for option in ("array=0-2%2", "partition=gpu", "time=90", "requeue", "nice=3", "signal=USR2@120"):
        assert f"#SBATCH --{option}\n" in script.read_text()
    assert "gpus" not in script.read_text()
    assert "SLURM_NTASKS" not in chosen[0].result(dict[str, Any]), "it is one task, and not told so"


@pytest.mark.slow
def test_what_is_in_the_queue_is_waited_for_and_not_submitted_again(
    slurm_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = jobs(tmp_path, 2, "wait_for_sigterm")
    assert chosen_launcher("{kind: submitit, wait: false}").run(chosen) == {}
    assert "2 running or in the queue; run the same command again to see their progress" in capsys.readouterr().err
    notes = [Path(job.arguments["place"]) for job in chosen]
    wait_for(lambda: all(note.exists() and note.read_text() for note in notes))

    def preempt() -> None:
        """SLURM tells every process of a job."""
        for task, note in enumerate(notes):
            os.kill(int(note.read_text().split()[-1]), signal.SIGUSR2)
            os.kill(int((slurm_home / f"100_{task}.pid").read_text()), signal.SIGUSR2)

    timer = threading.Timer(2, preempt)
    timer.start()
    assert chosen_launcher("submitit").run(chosen) == {}
    timer.join()
    told = capsys.readouterr().err
    assert "2 already running or in the queue" in told
    assert told.count("done (") == 2
    assert len(list(slurm_home.glob("*.sbatch"))) == 1
    assert [note.read_text().count("\n") for note in notes] == [2, 2], "stopped in order and requeued"


@pytest.mark.slow
def test_what_slurm_ended_is_named_and_submitted_again(slurm_home: Path, tmp_path: Path) -> None:
    (job,) = jobs(tmp_path, 1, "wait_for_sigterm")

    note = Path(job.arguments["place"])

    def cancel() -> None:
        wait_for(lambda: note.exists() and bool(note.read_text()))
        for process in ((slurm_home / "100.pid").read_text(), note.read_text()):
            os.kill(int(process), signal.SIGKILL)

    thread = threading.Thread(target=cancel)
    thread.start()
    failed = chosen_launcher("submitit").run([job])
    thread.join()
    assert "has not produced any output (state: FAILED)" in failed[job.folder]
    assert chosen_launcher("submitit").run([job]) == {}
    assert len(list(slurm_home.glob("*.sbatch"))) == 2


def test_slurm_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"--launcher submitit: Could not detect \"srun\".*cluster: local"):
        chosen_launcher("submitit").run(jobs(tmp_path, 1))


# Settings


def test_a_launcher_is_a_name_or_settings() -> None:
    assert chosen_launcher(None) == chosen_launcher("local") == Local()
    found = chosen_launcher("{kind: submitit, partition: gpu, additional_parameters: {nice: 3}}")
    assert (found.kind, found.partition, found.additional_parameters) == ("submitit", "gpu", {"nice": 3})  # type: ignore[attr-defined]
    for text, message in {
        "slurm": r"--launcher: unknown launcher kind 'slurm'",
        "{kind: submitit, partitoin: gpu}": r"--launcher: partitoin: unknown key. Did you mean 'partition'",
        "{kind: [": r"--launcher '\{kind: \[': ",
        "{kind: submitit, timeout_min: 0}": r"--launcher: timeout_min: ",
    }.items():
        with case(text), pytest.raises(UserError, match=message):
            chosen_launcher(text)


def test_a_missing_package_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rome.runs.launchers.submitit.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'rome-robust\[slurm\]', or use --launcher local"):
        chosen_launcher("submitit").run(jobs(tmp_path / "out", 1))
    assert not (tmp_path / "out").exists()
