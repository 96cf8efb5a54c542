"""Several processes compute what one computes, and a mistake or a signal ends all of them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.problems import rest_slow
from helpers.tiny_runs import (
    EXACT,
    STEPS,
    Child,
    Moment,
    assert_same_run,
    both,
    changed,
    no_traceback,
    rome,
    same,
    tiny,
    two_processes,
    updates,
    wait_for,
    watched,
    weights,
    write_yaml,
)
from rome.core.distributed import local_share, own_device
from rome.core.errors import REQUEUE, Interrupted, UserError
from rome.core.launched import LAUNCHED, alone, launched_together
from rome.evaluation.evaluate import Report
from rome.runs.folder import Run
from rome.training.setup import train


@pytest.mark.parametrize(("count", "local", "share"), [(0, 4, 0), (1, 4, 1), (8, 4, 2), (9, 4, 2), (5, 1, 5)])
def test_a_machines_workers_are_shared_out_among_its_processes(
    count: int, local: int, share: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_share(count) == count, "of one process"
    for name in LAUNCHED:
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert local_share(count) == share


CONFIGS: dict[str, dict[str, Any]] = {
    "RANDOM+experts": {},
    "RANDOM per batch+experts": {"method": {"kind": "random", "per": "batch"}},
    "MAX+experts, two steps": {"method": "max", "attack__steps": 2, "batch_size": 8, "data__train_limit": 40},
    "RANDOM+experts, threats with their own attacks": {
        "threats": [
            {"norm": "linf", "eps": 0.1},
            {"kind": "attack", "attack": {"kind": "stadv", "steps": 2}},
            {"kind": "attack", "attack": {"kind": "fog", "steps": 1}},
        ],
        "accumulate": 2,
    },
    "MAX per batch": {"method": {"kind": "max", "per": "batch"}, "experts": None},
    "AVG, accumulated": {"method": "avg", "experts": None, "accumulate": 3},
    "trainable projection, a natural epoch first": {
        "experts": {"experts": 2, "rank": 2, "projection": "trainable"},
        "natural_epochs": 1,
    },
    "a natural epoch first": {"natural_epochs": 1, "method": "avg"},
    "MSD+experts": {"method": {"kind": "msd", "steps": 2}},
    "E-AT": {"method": "eat", "experts": None, "attack": {"kind": "apgd", "steps": 2}},
    "E-AT+experts, accumulated": {"method": "eat", "attack__steps": 2, "accumulate": 3},
    "RAMP": {"method": "ramp", "experts": None},
    "RAMP, trainable projection": {"method": "ramp", "experts": {"experts": 2, "rank": 2, "projection": "trainable"}},
    "RAMP, accumulated": {"method": "ramp", "accumulate": 3, "optimizer": "sgd"},
    "RAMP with TRADES": {"method": {"kind": "ramp", "trades": 6}, "natural_epochs": 1},
    "MORE": {  # a stage an epoch; the strong decay would show on what should not move
        "experts": {"kind": "more"},
        "method": "more",
        "optimizer": {"kind": "adamw", "weight_decay": 5},
    },
}


@pytest.mark.parametrize("changes", rest_slow(CONFIGS, 1))
def test_two_processes_compute_what_one_computes(changes: dict[str, Any], tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed(name="tiny", **(EXACT | changes)))
    run = Run(tmp_path / "two")
    ended = both(two_processes("train", config, "--out", run.folder, logs=tmp_path / "logs"))
    assert [process.code for process in ended] == [0, 0], ended
    assert_same_run(run, train(tiny(**(EXACT | changes)), tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["RANDOM per batch+experts", "MORE"])
def test_bf16_processes_end_with_the_same_weights(case: str, tmp_path: Path) -> None:
    """Attacks under autocast use weights that are cast once; the gradients are still averaged, in every update."""
    changes = CONFIGS[case] | {"precision": "bf16", "model": {"name": f"{tmp_path / 'own.py'}:build"}}
    (tmp_path / "own.py").write_text(REMEMBERED)
    config = write_yaml(tmp_path / "tiny.yaml", changed(**changes))
    ended = both(two_processes("train", config, "--out", tmp_path / "run", logs=tmp_path / "logs"))
    assert [process.code for process in ended] == [0, 0], ended
    first, second = (torch.load(tmp_path / f"end-{rank}.pt") for rank in (0, 1))
    assert any(value.dtype == torch.float32 and value.ndim > 1 for value in first.values())
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


REMEMBERED = """
import os
from pathlib import Path
import timm
import torch
from rome.methods import Method

def build(num_classes):
    end = Method.epoch_end

    def spy(self, setting, epoch):
        end(self, setting, epoch)
        torch.save(setting.attacked.state_dict(), Path(__file__).with_name(f"end-{os.environ['RANK']}.pt"))

    Method.epoch_end = spy
    torch.manual_seed(0)
    sizes = dict(img_size=8, patch_size=4, in_chans=1, embed_dim=8, depth=2, num_heads=2)
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, **sizes)
"""
"""A model that each process writes down after every epoch."""


BATCHNORM = """
import os
from pathlib import Path
import torch
from torch import nn
from rome.methods import RAMP

def build(num_classes):
    end = RAMP.epoch_end

    def spy(self, setting, epoch):
        for when in ("before", "after"):
            if when == "after":
                end(self, setting, epoch)
            state = {name: value.clone() for name, value in setting.attacked.state_dict().items()}
            torch.save(state, Path(__file__).with_name(f"{when}-{epoch}-{os.environ['RANK']}.pt"))

    RAMP.epoch_end = spy
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))
"""
"""A model with BatchNorm that writes down what each process holds before and after RAMP's fusion."""


def test_processes_fuse_to_the_same_weights_and_statistics(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(BATCHNORM)
    model = {"name": f"{tmp_path / 'own.py'}:build"}
    config = write_yaml(tmp_path / "tiny.yaml", changed(method="ramp", experts=None, model=model))
    ended = both(two_processes("train", config, "--out", tmp_path / "run", logs=tmp_path / "logs"))
    assert [process.code for process in ended] == [0, 0], ended

    def states(when: str) -> list[dict[str, torch.Tensor]]:
        return [torch.load(tmp_path / f"{when}-{rank}.pt") for rank in (0, 1)]

    for epoch in (0, 1):
        first, second = states(f"after-{epoch}")
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)
        first, second = states(f"before-{epoch}")
        differ = [name for name in first if not torch.equal(first[name], second[name])]
        assert differ == ["backbone.2.running_mean", "backbone.2.running_var"], "each had its own batches"


ATTACKED = """
import os
from pathlib import Path
import torch
from torch import nn
from rome.attacks import PGD

def build(num_classes):
    search, calls = PGD.search, []

    def spy(self, model, *rest):
        calls.append(model)
        if len(calls) == 4:
            state = {name: value.clone() for name, value in model.state_dict().items()}
            torch.save(state, Path(__file__).with_name(f"attacked-{os.environ['RANK']}.pt"))
        return search(self, model, *rest)

    PGD.search = spy
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, num_classes))
"""
"""A model with BatchNorm that writes down what the fourth attack of each process meets."""


@pytest.mark.slow
def test_processes_attack_the_same_statistics(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(ATTACKED)
    config = write_yaml(tmp_path / "tiny.yaml", changed(experts=None, model={"name": f"{tmp_path / 'own.py'}:build"}))
    ended = both(two_processes("train", config, "--out", tmp_path / "run", logs=tmp_path / "logs"))
    assert [process.code for process in ended] == [0, 0], ended
    first, second = (torch.load(tmp_path / f"attacked-{rank}.pt") for rank in (0, 1))
    assert bool(first["backbone.2.running_mean"].any())
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.slow
def test_only_the_first_process_speaks(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed(epochs=1, data__train_limit=12))
    first, second = both(two_processes("train", config, "--out", tmp_path / "run", logs=tmp_path / "logs"))
    assert first.err.splitlines()[-3].startswith("tiny: epoch 1/1")
    assert first.err.splitlines()[-1].startswith("next: rome evaluate")
    assert "Warning" not in first.err
    assert (second.out, second.err) == ("", "")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1


# srun


STEP = {
    "JOB_ID": "4711", "STEP_ID": "0", "NTASKS": "4", "STEP_NUM_TASKS": "4", "NNODES": "3", "STEP_NUM_NODES": "2",
    "NODELIST": "gpu[1-3]", "STEP_NODELIST": "gpu[2,3]", "STEP_TASKS_PER_NODE": "2(x2)", "PROCID": "3", "LOCALID": "1",
    "NODEID": "1", "JOB_NAME": "train",
}  # fmt: skip
"""What a task of ``srun --nodes 2 --ntasks-per-node 2`` reads in a job of three nodes, after SLURM_."""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set variables of SLURM; what is made of them is forgotten afterwards."""
    made = [*LAUNCHED, "WORLD_SIZE", "GROUP_RANK", "SLURM_NTASKS_PER_NODE"]
    for name in [*made, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def put(variables: dict[str, str], **others: str) -> None:
        for name, value in (variables | others).items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    return put


def test_a_task_of_srun_is_one_of_several(slurm: Callable[..., None]) -> None:
    slurm(STEP)
    assert launched_together() == 4
    told = {name: os.environ[name] for name in [*LAUNCHED, "WORLD_SIZE", "GROUP_RANK"]}
    assert told == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1",
        "MASTER_ADDR": "gpu2", "MASTER_PORT": str(15000 + 4711),
    }  # fmt: skip
    assert alone({"PATH": "here", "LOCAL_SCRATCH": "there"}) == {"PATH": "here", "LOCAL_SCRATCH": "there"}
    assert not {name for name in alone(os.environ) if name in told or name.startswith("SLURM_STEP")}


def test_two_steps_of_one_job_meet_at_other_ports(slurm: Callable[..., None]) -> None:
    slurm(STEP, STEP_ID="1")
    launched_together()
    assert os.environ["MASTER_PORT"] == str(15000 + 4711 + 101)


def test_what_a_batch_script_exports_is_overruled_but_for_the_address(
    slurm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm(STEP)
    for name, value in {"WORLD_SIZE": "8", "MASTER_ADDR": "gpu2-ib", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    assert launched_together() == 4
    assert [os.environ[name] for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")] == ["3", "gpu2-ib", "29500"]


def test_torchrun_in_a_job_of_slurm_is_torchrun(slurm: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(STEP)
    for name in LAUNCHED:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launched_together() == 8
    assert os.environ["RANK"] == "1"


@pytest.mark.parametrize(
    "changes",
    [
        {"STEP_NUM_TASKS": "1"},  # a batch script that was submitted from a step's shell
        {"STEP_ID": str(2**32 - 6)},  # the shell of salloc
        {"STEP_ID": ""},
    ],
)
def test_one_task_that_would_work_alone_beside_others_is_refused(
    changes: dict[str, str], slurm: Callable[..., None]
) -> None:
    slurm(STEP, **changes)
    with pytest.raises(UserError, match=r"this SLURM job has 4 tasks, but this process would work alone: start it "):
        launched_together()
    assert "RANK" not in os.environ


def test_a_batch_script_of_several_tasks_is_refused_and_one_of_one_is_alone(slurm: Callable[..., None]) -> None:
    batch = {name: STEP[name] for name in ("JOB_ID", "NTASKS", "NNODES", "NODELIST", "PROCID", "LOCALID", "NODEID")}
    slurm(batch)
    with pytest.raises(UserError, match="4 tasks"):
        launched_together()
    slurm(batch, NTASKS="1")
    assert launched_together() == 1


def test_tasks_spread_unevenly_are_refused(slurm: Callable[..., None]) -> None:
    slurm(STEP, STEP_TASKS_PER_NODE="3,1")
    with pytest.raises(UserError, match=r"unevenly over 2 nodes \(3,1\): use srun --ntasks-per-node instead"):
        launched_together()


@pytest.mark.parametrize(
    ("variables", "there", "own"),
    [
        ({}, 2, 1),  # every task sees all GPUs of its node
        ({"GPUS_PER_TASK": "1"}, 1, 0),  # its own only
        ({"STEP_GPUS": "0,1"}, 1, 0),
        ({}, 1, None),  # one GPU for two tasks
        ({"STEP_GPUS": "0"}, 1, None),
    ],
)
def test_the_gpu_of_a_task(
    variables: dict[str, str],
    there: int,
    own: int | None,
    slurm: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: there)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    slurm(STEP, **variables)
    if own is None:
        with pytest.raises(UserError, match="process 1 has no GPU of its own: this machine has 1;"):
            own_device(torch.device("cuda"))
    else:
        assert own_device(torch.device("cuda")) == torch.device("cuda", own)
        assert chosen == [own]
    assert own_device(torch.device("cpu")) == torch.device("cpu")


def of_srun(*arguments: object, logs: Path, options: tuple[str, ...] = ("", "")) -> list[Child]:
    """``rome ARGUMENTS`` in two processes, in the environment that srun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"JOB_ID": "4711", "STEP_ID": "0", "NTASKS": "2", "STEP_NUM_TASKS": "2", "NNODES": "1", "NODEID": "0"}
    common |= {"NODELIST": "127.0.0.1", "STEP_NODELIST": "127.0.0.1", "STEP_NUM_NODES": "1", "STEP_TASKS_PER_NODE": "2"}
    return [
        rome(
            *arguments,
            *filter(None, [option]),
            logs=logs / str(rank),
            env={
                f"SLURM_{name}": value for name, value in {**common, "PROCID": str(rank), "LOCALID": str(rank)}.items()
            }
            | {"MASTER_PORT": str(port)},
        )
        for rank, option in enumerate(options)
    ]


@pytest.mark.slow
def test_srun_trains_and_evaluates_what_torchrun_does_to_the_last_bit(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed(name="tiny"))
    for start, out in ((two_processes, "torchrun"), (of_srun, "srun")):
        for command in (("train", config, "--out", tmp_path / out), ("evaluate", tmp_path / out)):
            first, second = both(start(*command, logs=tmp_path / "logs" / out / command[0]))
            assert (first.code, second.code, second.err) == (0, 0, "")
    assert same(weights(tmp_path / "srun"), weights(tmp_path / "torchrun"))
    reports = [Report.load(next((tmp_path / out / "evaluation").iterdir())) for out in ("srun", "torchrun")]
    assert (reports[0].correct == reports[1].correct).all()


@pytest.mark.slow
def test_tasks_of_srun_with_different_settings_are_refused(tmp_path: Path) -> None:
    """Eight seeds in eight tasks would train one model."""
    config = write_yaml(tmp_path / "tiny.yaml", changed(name="tiny"))
    out = tmp_path / "run"
    ended = both(of_srun("train", config, "--out", out, logs=tmp_path / "logs", options=("seed=0", "seed=1")))
    assert [process.code for process in ended] == [2, 2]
    assert all("the processes were given different settings" in process.err for process in ended)
    assert not out.exists()


# Mistakes


@pytest.mark.parametrize(
    ("overrides", "message"),
    rest_slow(
        [
            (["batch_size=13"], "batch_size/accumulate = 13 is not a multiple of the 2 processes"),
            (["batch_size=12", "accumulate=4"], "batch_size/accumulate = 3 is not a multiple of the 2 processes"),
            (["batch_size=66"], "batch_size 66 exceeds the 64 training examples"),
        ],
        1,
    ),
)
def test_settings_that_do_not_suit_several_processes_end_every_process(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed())
    ended = both(two_processes("train", config, *overrides, "--out", tmp_path / "run", logs=tmp_path / "logs"))
    assert [process.code for process in ended] == [2, 2]
    assert all(message in process.err and no_traceback(process.err) for process in ended)


@pytest.mark.parametrize("case", rest_slow(["finished", "unfinished", "foreign", "corrupt", "other settings"], 1))
def test_a_folder_that_cannot_be_used_ends_every_process_at_once(case: str, tmp_path: Path) -> None:
    """The first process finds it; the others must not wait for it."""
    config = write_yaml(tmp_path / "tiny.yaml", changed())
    run, options, overrides = Run(tmp_path / "run"), [], []
    if case == "foreign":
        run.folder.mkdir()
        (run.folder / "thesis.tex").write_text("mine")
    else:
        run.prepare(tiny(), resume=False, overwrite=False)
        run.release()
    if case == "finished":
        run.model_file.write_text("a model")
    if case in ("corrupt", "other settings"):
        run.checkpoint_file.write_text("not a checkpoint")
        options = ["--resume"]
    if case == "other settings":
        overrides = ["seed=5"]
    ended = [
        child.wait(timeout=20)
        for child in two_processes("train", config, *overrides, "--out", run.folder, *options, logs=tmp_path / "logs")
    ]
    assert [process.code for process in ended] == [2, 2]
    assert all(f"error: {run.folder}" in process.err and no_traceback(process.err) for process in ended)


def test_a_loss_that_is_not_finite_ends_every_process(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed())
    ended = both(two_processes("train", config, "optimizer.lr=1e30", "--out", tmp_path / "run", logs=tmp_path / "logs"))
    assert [process.code for process in ended] == [2, 2]
    assert all("Lower optimizer.lr" in process.err and no_traceback(process.err) for process in ended)


# Signals


@pytest.mark.parametrize("rank", rest_slow([1, 0], 1))
def test_a_signal_to_one_process_stops_all_at_the_same_update(rank: int, tmp_path: Path) -> None:
    """torchrun signals every process, but not at one moment; here only one of them hears of it."""
    config = write_yaml(tmp_path / "tiny.yaml", changed(**EXACT))
    run = Run(tmp_path / "run")
    arguments = ("train", config, "--out", run.folder)
    # ``update`` counts log lines, which every process passes
    struck = Moment("update", STEPS + 2, signal.SIGTERM, rank=rank)
    ended = both(two_processes(*arguments, logs=tmp_path / "logs", at=struck))
    assert [process.code for process in ended] == [REQUEUE, REQUEUE]
    assert all("stopped by SIGTERM; continue with: rome train --resume" in process.err for process in ended)
    assert all(no_traceback(process.err) for process in ended)
    state = run.load_checkpoint()
    assert (state["epoch"], state["step"]) == (1, 3), "the update in which all of them knew"
    ended = both(two_processes(*arguments, "--resume", logs=tmp_path / "logs"))
    assert [process.code for process in ended] == [0, 0]
    assert_same_run(run, train(tiny(**EXACT), tmp_path / "one"))


@pytest.mark.slow
def test_a_run_may_go_on_with_another_number_of_processes(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed(**EXACT))
    run = Run(tmp_path / "run")
    struck = Moment("update", 3, signal.SIGTERM)
    both(two_processes("train", config, "--out", run.folder, logs=tmp_path / "logs", at=struck))
    assert_same_run(train(tiny(**EXACT), run.folder, resume=True), train(tiny(**EXACT), tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.timeout(400)  # two processes that load torch, on a machine that may be busy
def test_torchrun_trains_and_ends_in_order_on_sigterm(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed(epochs=200, **EXACT))
    run = Run(tmp_path / "run")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "rome.cli", "train", str(config), "--out", str(run.folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "err", "wb") as err:
        process = subprocess.Popen(command, stdout=err, stderr=err, env=env)
    try:
        wait_for(lambda: run.log_file.exists() and run.log_file.read_text().count("\n") > 2 * STEPS, 240)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.terminate()  # killed, it would leave its workers behind
        process.wait(60)
    state, lines = run.load_checkpoint(), updates(run.log())
    assert state["epoch"] * STEPS + state["step"] == len(lines) < 200 * STEPS
    assert "stopped by SIGTERM" in (tmp_path / "err").read_text()

    one = watched(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == STEPS else None)
    with pytest.raises(Interrupted):
        train(tiny(epochs=200, **EXACT), tmp_path / "one", progress=one)
    for line, expected in zip(lines[:STEPS], updates(Run(tmp_path / "one").log()), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-5)
