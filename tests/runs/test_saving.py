"""Checkpoints are written in the background, one at a time, two are kept, and a damaged one is found out."""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from rome.core.errors import UserError
from rome.runs.folder import Run
from rome.runs.saving import Saver


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def saver(run: Run) -> Iterator[Saver]:
    saver = Saver(run, minutes=2, clock=lambda: clock.time)
    yield saver
    saver.close()


class clock:  # noqa: N801
    """Minutes as seconds pass where a test says so."""

    time = 0.0


def state(update: int, **more: Any) -> dict[str, Any]:
    return {"update": update, "epoch": 0, "step": update, "model": {"weight": torch.arange(4000.0) + update}, **more}


class Slow:
    """Checkpoints that are written when a test lets them be."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.may_end, self.begun, self.at_once = threading.Event(), 0, 0
        save = torch.save

        def slow(state: Any, file: Any) -> None:
            self.begun += 1
            self.at_once += 1
            assert self.at_once == 1, "two writes at once"
            assert self.may_end.wait(60)
            save(state, file)
            self.at_once -= 1

        monkeypatch.setattr(torch, "save", slow)


def test_what_changes_while_it_is_written_does_not_reach_the_file(
    run: Run, saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Slow(monkeypatch)
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = [{"lr": 1.0}]
    saver.save({"model": model.state_dict(), "groups": groups}, constant={"best": None})
    for tensor in model.state_dict().values():
        tensor.add_(1)
    groups[0]["lr"] = 2.0
    slow.may_end.set()
    saver.wait()
    found = run.load_checkpoint()
    assert found["model"].keys() == expected.keys()
    assert all(torch.equal(found["model"][name], expected[name]) for name in expected)
    assert found["groups"] == [{"lr": 1.0}]
    assert found["best"] is None
    assert isinstance(found["model"], OrderedDict)
    assert found["model"]._metadata["1"] == {"version": 2}, "by which modules read states of earlier versions"


def test_one_is_due_after_so_many_minutes_and_never_while_one_is_written(
    saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, clock.time = Slow(monkeypatch), 0.0
    saver.latest, due = 0.0, []
    for second in range(0, 700, 10):
        clock.time = float(second)
        if saver.due():
            due.append(second)
            saver.save(state(second))
        if second >= 400:
            slow.may_end.set()
            saver.wait()
    assert due == [120, 410, 530, 650]
    saver.minutes = None
    clock.time = 1e9
    assert not saver.due()


def test_the_next_write_waits_for_the_one_before(run: Run, saver: Saver, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Slow(monkeypatch)
    threading.Timer(0.05, slow.may_end.set).start()
    for update in (1, 2, 3):
        saver.save(state(update))
    saver.wait()
    assert slow.begun == 3
    assert [run.load_checkpoint(file)["update"] for file in (run.before_file, run.checkpoint_file)] == [2, 3]


def test_what_the_thread_cannot_write_is_said_by_the_next_call(
    run: Run, saver: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.save(state(1))
    saver.wait()

    def full(state: Any, file: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for call in (saver.check, saver.wait, lambda: saver.save(state(3))):
        saver.save(state(2))
        assert saver._writing is not None
        saver._writing.exception()  # it is over
        with pytest.raises(UserError, match=r"last\.pt cannot be written .*make room and continue with --resume"):
            call()
        saver.check()  # said once
    saver.save(state(2))
    saver.close()
    assert run.load_checkpoint()["update"] == 1


def test_two_are_kept_where_there_are_no_hard_links(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    for update in (1, 2, 3):
        run.save_checkpoint(state(update))
    assert [run.load_checkpoint(file)["update"] for file in (run.before_file, run.checkpoint_file)] == [2, 3]


# Damage


def test_no_flipped_bit_of_a_tensor_passes_unseen(run: Run) -> None:
    run.save_checkpoint(state(1))
    whole, chance = run.checkpoint_file.read_bytes(), random.Random(0)
    start = whole.index(torch.arange(1.0, 3.0).numpy().tobytes())
    for _ in range(100):
        content = bytearray(whole)
        content[start + chance.randrange(4 * 4000)] ^= 1 << chance.randrange(8)
        run.checkpoint_file.write_bytes(content)
        with pytest.raises(UserError, match=r"last\.pt cannot be read .*restore it, or pass --overwrite"):
            run.load_checkpoint()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "flipped"])
def test_where_the_last_is_damaged_the_one_before_counts(
    damage: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for update in (3, 8):
        run.save_checkpoint(state(update))
    run.log_file.write_text('{"update": 3, "event": "update"}\n{"update": 9, "event": "update"}\n')
    content = bytearray(run.checkpoint_file.read_bytes())
    content[len(content) // 2] ^= 1
    run.checkpoint_file.write_bytes({"cut": content[:-100], "flipped": content}.get(damage, b""))
    if damage == "missing":
        run.checkpoint_file.unlink()
    assert run.has_checkpoint
    assert run._load_latest()["update"] == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{run.checkpoint_file} cannot be used (")
    assert line.endswith("resuming from the previous checkpoint, at update 3; 6 updates are repeated")
    assert run.load_checkpoint()["update"] == 3, "for every process that reads it now"
    run.save_checkpoint(state(4))
    assert [run.load_checkpoint(file)["update"] for file in (run.before_file, run.checkpoint_file)] == [3, 4]
