"""Several processes evaluate what one evaluates, to the last bit; one speaks, and none waits for one that is gone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.problems import rest_slow
from helpers.tiny_runs import Child, Ended, no_traceback, tiny, two_processes
from rome.core.errors import REQUEUE
from rome.evaluation.evaluate import Report
from rome.evaluation.run import evaluate_saved
from rome.runs.folder import Run
from rome.training.setup import train

BATCH = 4
SUITE = {
    "kind": "several",
    "suites": [
        {"kind": "apgd", "iterations": 5},
        {"kind": "toys", "how": ["noise", "negative"], "on_all": True, "group": "corruptions"},
    ],
}


def config(*how: str) -> Any:
    """A run whose evaluation draws, attacks and corrupts; with further toys, for every example."""
    more = [{"kind": "toys", "how": list(how), "prefix": "more", "on_all": True, "group": "more"}] if how else []
    suite = {**SUITE, "suites": [*SUITE["suites"], *more]}
    return tiny(
        name="tiny",
        imports=["helpers.toy_suites"],
        epochs=4,
        natural_epochs=4,
        batch_size=30,
        data__train_limit=1200,
        optimizer={"lr": 2e-2},
        threats=[{"norm": "L1", "eps": 0.5}, {"norm": "L2", "eps": 0.1}, {"norm": "Linf", "eps": 0.02}],
        evaluation={"suite": suite, "n": 18, "batch_size": BATCH},
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(config(), tmp_path_factory.mktemp("processes") / "tiny")


@pytest.fixture(scope="module")
def one(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds."""
    return evaluate_saved(run.folder, out=tmp_path_factory.mktemp("alone") / "one", checks=True)[1]


def with_toys(run: Run, folder: Path, *how: str) -> Run:
    """A copy of the run whose evaluation has these toys as well."""
    from rome.models import load_model, save_model

    shutil.copytree(run.folder, folder)
    save_model(load_model(run.model_file), Run(folder).model_file, config=config(*how).dump())
    return Run(folder)


def both(*arguments: object, logs: Path) -> list[Ended]:
    children: list[Child] = two_processes("evaluate", *arguments, logs=logs)
    return [child.wait(60) for child in children]


def facts(report: Report) -> dict[str, Any]:
    """A report without what depends on the time."""
    told = report.to_json()
    return {key: value for key, value in told.items() if key not in ("seconds", "date", "reused")}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(run: Run, one: Path, tmp_path: Path) -> None:
    alone = Report.load(one)
    ended = both(run.folder, "--out", tmp_path / "two", "--json", "--checks", logs=tmp_path / "logs")
    assert [process.code for process in ended] == [0, 0], ended
    together = Report.load(tmp_path / "two")
    assert facts(together) == facts(alone)
    assert all(0 < alone.robust[name] < alone.clean for name in ("L1", "L2", "Linf"))
    for name, array in alone.arrays().items():
        np.testing.assert_array_equal(together.arrays()[name], array)
    batches = [
        {(file.parent.name, file.name) for file in (folder / "batches").rglob("*.safetensors")}
        for folder in (one, tmp_path / "two")
    ]
    assert batches[0] == batches[1]

    first, second = ended
    assert json.loads(first.out)["robust"] == together.robust
    assert "corruptions" in json.loads(first.out)["groups"]
    assert first.err.count("Linf: ") >= 1
    assert (second.out, second.err) == ("", "")
    again = both(run.folder, "--out", tmp_path / "two", "--json", logs=tmp_path / "again")
    returned = json.loads(first.out) | {"reused": {"result": together.date}}
    assert json.loads(again[0].out) == returned, "a finished result is returned to all"
    assert ("reused: " in again[0].err, again[1].err) == (True, "")


@pytest.mark.slow
def test_what_one_process_did_two_go_on_with(run: Run, one: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate_saved(run.folder, out=out, cases=["L1", "toy-0"])
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    assert [process.code for process in both(run.folder, "--out", out, logs=tmp_path / "logs")] == [0, 0]
    after = {file: file.stat().st_mtime_ns for file in out.rglob("*.safetensors")}
    assert {file: after[file] for file in before} == before
    assert (Report.load(out).correct == Report.load(one).correct).all()


@pytest.mark.slow
def test_an_attack_that_breaks_in_one_process_fails_its_case_in_all(run: Run, tmp_path: Path) -> None:
    broken = with_toys(run, tmp_path / "run", "raise-1", "same")
    ended = both(broken.folder, "--out", tmp_path / "out", "--json", logs=tmp_path / "logs")
    assert [process.code for process in ended] == [1, 0], ended  # the one that speaks says so
    result = json.loads(ended[0].out)
    assert result["failed"] == {"more-0": "RuntimeError: a toy that breaks (in process 1)"}
    assert set(result["robust"]) == {"L1", "L2", "Linf", "toy-0", "toy-1", "more-1"}
    assert (result["groups"]["more"], result["union"]) == (None, result["unions"]["lp"])


@pytest.mark.slow
def test_a_disk_that_is_full_for_one_process_ends_both_at_once(run: Run, tmp_path: Path) -> None:
    broken = with_toys(run, tmp_path / "run", "full-1", "same")
    ended = both(broken.folder, "--out", tmp_path / "out", logs=tmp_path / "logs")
    assert [process.code for process in ended] == [2, 2], ended
    assert all("error: it cannot be written" in process.err for process in ended)
    assert not list((tmp_path / "out" / "batches").glob("more-1/*")), "no further case"
    assert not (tmp_path / "out" / "result.json").exists()


def test_a_process_that_is_killed_ends_the_other_and_nothing_is_lost(run: Run, tmp_path: Path) -> None:
    broken = with_toys(run, tmp_path / "run", "kill-1")
    out = tmp_path / "out"
    first, second = both(broken.folder, "--out", out, logs=tmp_path / "logs")
    assert second.code == -signal.SIGKILL
    assert first.code == 1
    assert "another process ended; finished work is kept" in first.err
    assert no_traceback(first.err)
    assert not (out / "result.json").exists()
    done = {file.parent.name for file in out.rglob("*.safetensors")}
    assert {"L1", "L2", "Linf", "toy-0", "toy-1"} <= done
    alone, _ = evaluate_saved(broken.folder, out=out)
    assert alone.failed == {}
    assert alone.robust["more-0"] == alone.clean


@pytest.mark.slow
def test_a_process_whose_time_is_over_ends_both_and_the_larger_code_requeues(run: Run, tmp_path: Path) -> None:
    broken = with_toys(run, tmp_path / "run", "usr1-1")
    first, second = both(broken.folder, "--out", tmp_path / "out", logs=tmp_path / "logs")
    assert (first.code, second.code) == (1, REQUEUE)
    assert "another process ended; finished work is kept" in first.err
    assert second.err.endswith("stopped by SIGUSR1; finished work is kept\n")
    assert no_traceback(first.err + second.err)


@pytest.mark.parametrize("wrong", rest_slow(["--n", "--cases", "--suite"], 1))
def test_a_mistake_ends_every_process(wrong: str, run: Run, tmp_path: Path) -> None:
    value = {"--n": 99, "--cases": "L7", "--suite": "apdg"}[wrong]
    ended = both(run.folder, wrong, value, "--out", tmp_path / "out", logs=tmp_path / "logs")
    assert [process.code for process in ended] == [2, 2]
    assert all("error: " in process.err and no_traceback(process.err) for process in ended)


@pytest.mark.slow
def test_a_folder_that_cannot_be_used_ends_every_process(run: Run, tmp_path: Path) -> None:
    """The first process finds it; the other must not wait."""
    evaluate_saved(run.folder, n=6, out=tmp_path / "out", cases=["toy-0"])
    ended = both(run.folder, "--n", 7, "--out", tmp_path / "out", logs=tmp_path / "logs")
    assert [process.code for process in ended] == [2, 2]
    assert all("holds an evaluation with other settings (n: 6 there, 7 now" in process.err for process in ended)


@pytest.mark.slow
def test_processes_with_different_models_are_refused(tmp_path: Path) -> None:
    """A function of the user's whose weights differ from process to process."""
    (tmp_path / "net.py").write_text(
        "import os, torch\nfrom torch import nn\n"
        "def net(num_classes):\n"
        "    torch.manual_seed(int(os.environ['RANK']))\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    arguments = ("--model", f"{tmp_path / 'net.py'}:net", "--data", "digits", "--suite", "lp", "--n", 12)
    ended = both(*arguments, "--out", tmp_path / "out", logs=tmp_path / "logs")
    assert [process.code for process in ended] == [2, 2]
    assert all("the processes were given different models" in process.err for process in ended)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_process_that_cannot_begin_does_not_leave_the_other_waiting(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import os\nfrom torch import nn\n"
        "def net(num_classes):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise ValueError('not on this machine')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    arguments = ("--model", f"{tmp_path / 'net.py'}:net", "--data", "digits", "--suite", "lp", "--n", 12)
    first, second = both(*arguments, "--out", tmp_path / "out", logs=tmp_path / "logs")
    assert (first.code, second.code) == (1, 2)
    assert "not on this machine" in second.err
    assert "another process ended" in first.err


@pytest.mark.slow
def test_torchrun_evaluates(run: Run, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command += ["-m", "rome.cli", "evaluate", str(run.folder), "--out", str(tmp_path / "two"), "--json"]
    path = f"{Path(__file__).parents[1]}:{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("\n") == 1
    alone, _ = evaluate_saved(run.folder, out=tmp_path / "one")
    assert json.loads(ended.stdout)["robust"] == alone.robust
