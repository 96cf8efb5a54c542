"""Checkpoints within an epoch are those of their update, and what cannot be written ends in a line to go on from."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from helpers.problems import rest_slow
from helpers.replay import Replay
from helpers.tiny_runs import (
    EXACT,
    STEPS,
    Moment,
    assert_same_run,
    both,
    changed,
    in_two_processes,
    no_traceback,
    rome,
    same,
    tiny,
    two_processes,
    updates,
    watched,
    weights,
    without_times,
    write_yaml,
)
from rome.core.errors import REQUEUE, Interrupted, UserError
from rome.core.graphs import Graphs
from rome.runs.folder import Run
from rome.runs.saving import Saver
from rome.training import setup
from rome.training.setup import train

ALWAYS = {"checkpoint": {"minutes": 1e-6}}
"""A checkpoint after every update that no write goes on at."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(tiny(), tmp_path_factory.mktemp("undisturbed") / "run")


def assert_as(run: Run, other: Run) -> None:
    assert same(weights(run.folder), weights(other.folder))
    assert without_times(run.log()) == without_times(other.log())


def due_after(monkeypatch: pytest.MonkeyPatch, update: int) -> None:
    """Make a checkpoint due after that update alone, counted from where a training begins."""
    asked: dict[int, int] = {}

    def due(saver: Saver) -> bool:
        asked[id(saver)] = asked.get(id(saver), 0) + 1
        return asked[id(saver)] == update

    monkeypatch.setattr(Saver, "due", due)


def killed(run: Run, update: int, **changes: Any) -> None:
    """Train until that update, with what was begun to be written written."""

    def strike(number: int) -> None:
        if number == update:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny(**changes), run.folder, resume=True, progress=watched(strike))


VALIDATED = {"method": "ramp", "validation": {"n": 12, "steps": 1}, "data__train_limit": 76}
KINDS: dict[str, dict[str, Any]] = {
    "RAMP, validated": VALIDATED,
    "RANDOM": {},
    "E-AT, SGD, bf16": {"method": "eat", "optimizer": "sgd", "precision": "bf16"},
}


@pytest.mark.parametrize("changes", rest_slow(KINDS, 1))
def test_it_holds_what_a_signal_at_that_update_saves_though_training_goes_on(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = STEPS + 2
    strike = watched(lambda number: os.kill(os.getpid(), signal.SIGTERM) if number == update else None)
    with pytest.raises(Interrupted):
        train(tiny(**changes), tmp_path / "stopped", progress=strike)
    expected = Run(tmp_path / "stopped").load_checkpoint()
    found, later, save = list[dict[str, Any]](), threading.Event(), Run.save_checkpoint

    def late(run: Run, state: dict[str, Any]) -> None:
        if state["update"] == update:
            assert later.wait(60)
            found.append(state)
        save(run, state)

    monkeypatch.setattr(Run, "save_checkpoint", late)
    due_after(monkeypatch, update)
    watch = watched(lambda number: later.set() if number == update + 2 else None)
    train(tiny(**changes), tmp_path / "run", progress=watch)
    (state,) = found
    for each in (state, expected):
        del each["seconds"]
    expected.pop("format")
    one, other = tree_leaves(state), tree_leaves(expected)
    assert len(one) == len(other) > 50
    assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    "changes",
    rest_slow({"graphs": {"graphs": "auto"}, "plain": {}, "RAMP": VALIDATED, "compiled": {"compile": True}}, 1),
)
def test_a_run_goes_on_from_it_as_if_nothing_had_happened(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Run
) -> None:
    plain = changes.keys() <= {"graphs"}
    whole = undisturbed if plain else train(tiny(**changes), tmp_path / "whole")
    if "graphs" in changes:
        monkeypatch.setattr(setup, "graphs_for", lambda *_: Graphs(capture=Replay()))
    run = Run(tmp_path / "run")
    due_after(monkeypatch, 3)
    killed(run, 4, **changes)
    assert run.load_checkpoint()["step"] == 3
    assert [line["update"] for line in updates(run.log())] == [1, 2, 3, 4]
    killed(run, STEPS + 2, **changes)  # from update 3: due after update 6
    assert run.load_checkpoint()["step"] == 1
    assert_as(train(tiny(**changes), run.folder, resume=True), whole)


@pytest.mark.slow
def test_two_processes_checkpoint_at_the_same_update_by_the_first_ones_clock(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed(**EXACT, **ALWAYS))
    run = Run(tmp_path / "run")
    at = Moment("update", STEPS + 4, signal.SIGKILL, rank=1)
    ended = both(two_processes("train", config, "--out", run.folder, logs=tmp_path / "logs", at=at))
    assert [process.code for process in ended] == [1, -signal.SIGKILL]
    assert f"another process of this training ended; continue with: rome train --resume {run.folder}" in ended[0].err
    assert no_traceback(ended[0].err)
    assert run.load_checkpoint()["update"] >= STEPS
    ended = both(two_processes("train", config, "--resume", "--out", run.folder, logs=tmp_path / "again"))
    assert [process.code for process in ended] == [0, 0]
    assert_same_run(run, train(tiny(**EXACT), tmp_path / "one"))


# Signals


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_the_announced_end_of_a_job_ends_in_the_code_that_requeues(name: str, tmp_path: Path) -> None:
    number, run = getattr(signal, name), Run(tmp_path / "run")
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=f"^stopped by {name}; continue with: rome train --resume {run.folder}$"
    ) as ended:
        train(tiny(), run.folder, progress=watched(lambda now: os.kill(os.getpid(), number) if now == 3 else None))
    assert ended.value.code == REQUEUE == os.EX_TEMPFAIL
    assert run.load_checkpoint()["update"] == 3
    assert signal.getsignal(number) is before


# What cannot be written


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Failing:
    """A file of which every write fails after so many, the last with a part."""

    def __init__(self, file: Any, writes: int) -> None:
        self.file, self.left = file, writes

    def write(self, text: bytes) -> int:
        self.left -= 1
        if self.left < 0:
            full()
        return self.file.write(text if self.left else text[: len(text) // 2])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def failing_log(monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    from rome.training import loop

    write = loop.Loop._write

    def wrapped(self: Any, line: dict[str, Any]) -> None:
        if self.log_file is not None and not isinstance(self.log_file, Failing):
            self.log_file = Failing(self.log_file, writes)
        write(self, line)

    monkeypatch.setattr(loop.Loop, "_write", wrapped)


def failing_sync(monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Make the disk full from the so many-th file on that is to be on it for sure."""
    sync, calls = os.fsync, [0]

    def fsync(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] >= call:
            full()
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("writes", rest_slow([3, 1, STEPS + 1, STEPS + 2, 2 * STEPS + 2], 1))
def test_a_disk_that_is_full_for_the_log_ends_in_one_line(
    writes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Run
) -> None:
    failing_log(monkeypatch, writes)
    with pytest.raises(UserError, match=r"log\.jsonl cannot be written \(No space left.*make room and continue with"):
        train(tiny(**ALWAYS), tmp_path / "run")
    monkeypatch.undo()
    assert_as(train(tiny(), tmp_path / "run", resume=True), undisturbed)


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_write_ends_in_one_line(tmp_path: Path, undisturbed: Run) -> None:
    """Config, origin, log, checkpoints, loggers, model."""
    for call in range(1, 100):
        run = Run(tmp_path / str(call))
        with pytest.MonkeyPatch.context() as patch:
            failing_sync(patch, call)
            with suppress(UserError):
                train(tiny(**ALWAYS, loggers=["tensorboard", "csv"]), run.folder)
                break
        assert not list(run.folder.glob(".*.partial"))
        assert not run.finished
        assert_as(train(tiny(loggers=["tensorboard", "csv"]), run.folder, resume=True), undisturbed)
    assert call > 10, "it was full at many places"


@pytest.mark.slow
@pytest.mark.parametrize("place", [failing_log, failing_sync])
def test_a_disk_that_is_full_for_the_first_process_ends_both_with_its_line(
    place: Callable[[pytest.MonkeyPatch, int], None], tmp_path: Path
) -> None:
    in_two_processes(_full_for_the_first, place, tmp_path)


def _full_for_the_first(rank: int, place: Callable[[pytest.MonkeyPatch, int], None], folder: Path) -> None:
    port = str(29000 + sum(map(ord, str(folder))) % 1000)
    os.environ.update(
        {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    )
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            place(patch, 6)
        with pytest.raises(UserError, match="cannot be written"):
            train(tiny(**ALWAYS, loggers=[]), folder / "run")


@pytest.mark.slow
def test_a_clock_that_jumps_back_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Run
) -> None:
    import time

    present = time.time
    watch = watched(lambda number: monkeypatch.setattr(time, "time", lambda: present() - number * 1e6))
    run = train(tiny(**ALWAYS), tmp_path / "run", progress=watch)
    assert_as(run, undisturbed)
    seconds = [line["seconds"] for line in run.log() if line["event"] == "epoch"]
    assert 0 < seconds[0] < seconds[1]
    assert all(line["images_per_second"] > 0 for line in updates(run.log()))


# Two at once


@pytest.mark.slow
def test_of_two_launches_at_the_same_moment_one_trains(tmp_path: Path, undisturbed: Run) -> None:
    config = write_yaml(tmp_path / "tiny.yaml", changed())
    for attempt in range(3):
        run = Run(tmp_path / str(attempt))
        ended = both([rome("train", config, "--out", run.folder, logs=tmp_path / "logs" / str(i)) for i in range(3)])
        assert sorted(process.code for process in ended) == [0, 2, 2]
        for process in ended:
            assert no_traceback(process.err)
            assert process.code == 0 or process.err.startswith("error: ")
        assert_as(run, undisturbed)


@pytest.mark.parametrize("code", rest_slow([errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], 1))
def test_where_there_are_no_locks_a_file_is_one(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    first, second = Run(tmp_path / "run"), Run(tmp_path / "run")
    assert first.prepare(tiny(), resume=True, overwrite=False) is None
    with pytest.raises(UserError, match=r"another process is training in .*choose another --out"):
        second.prepare(tiny(), resume=True, overwrite=False)
    first.release()
    assert not (tmp_path / "run" / "train.soft.lock").exists()
    second.prepare(tiny(), resume=True, overwrite=False)
    second.release()
