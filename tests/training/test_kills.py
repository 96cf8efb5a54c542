"""kill -9 at random moments: nothing is lost but what came after the last checkpoint, and the end is the same."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny_runs import STEPS, changed, rome, same, tiny, updates, watched, weights, without_times, write_yaml
from rome.runs.config import load
from rome.runs.folder import Run, _describe_damage
from rome.runs.saving import Saver
from rome.training.setup import train

KILLS = 100
LONGEST = 3.0
"""Seconds that a process may live; the first or so is spent before its first update."""
LONG: dict[str, Any] = {
    "data__train_limit": 240,
    "epochs": 15,
    "validation": {"n": 12, "steps": 1, "every": 2},
    "method": "ramp",
    "data__augment": True,
    "loggers": ["tensorboard", "csv"],
    "checkpoint": {"minutes": 0.2 / 60},
}
"""15 epochs of 19 updates, with state in the method, in the optimizer and in the validation."""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_at_random_moments(tmp_path: Path) -> None:
    config = write_yaml(tmp_path / "run.yaml", changed(name="run", **LONG))
    undisturbed = train(load(config), tmp_path / "undisturbed")
    chance, kills, finished, lost, number = random.Random(), 0, 0, list[int](), 0
    run = Run(tmp_path / "run-0")
    while kills < KILLS or number:
        child = rome("train", config, "--out", run.folder, "--resume", logs=tmp_path / "logs")
        ended = time.monotonic() + chance.uniform(0.2, LONGEST) if kills < KILLS else float("inf")
        while child.process.is_alive() and time.monotonic() < ended:
            time.sleep(0.001)
        if child.process.is_alive():
            os.kill(child.process.pid, signal.SIGKILL)
        code = child.wait(600).code
        assert code in (0, -signal.SIGKILL), child.err.read_text()
        number += 1
        if code == 0:
            assert same(weights(run.folder), weights(undisturbed.folder))
            assert without_times(run.log()) == without_times(undisturbed.log())
            assert not run.has_checkpoint
            assert not list(run.folder.glob(".*.partial"))
            finished, number = finished + 1, 0
            run = Run(tmp_path / f"run-{finished}")
            continue
        kills += 1
        for file in (run.checkpoint_file, run.before_file):
            assert not file.exists() or not _describe_damage(file)
        saved = run.load_checkpoint()["update"] if run.has_checkpoint else 0
        seen = [line["update"] for line in updates(run.log())]
        assert seen == list(range(1, len(seen) + 1)), "no gap, no repeat"
        assert saved <= len(seen)
        lost.append(len(seen) - saved)
    whole = len(updates(undisturbed.log()))
    print(f"{kills} kills, {finished} runs of {whole} updates; updates lost: {sum(lost)}, at most {max(lost)} at once")


def test_what_a_kill_loses_is_at_most_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by a minute an update, and no time for writing."""
    run, lost = Run(tmp_path / "run"), list[int]()
    due = Saver.due

    def minutes(saver: Saver) -> bool:
        saver.wait()
        saver.clock = lambda: 60.0 * len(lost)
        saver.latest = min(saver.latest, saver.clock())
        return due(saver)

    def see(update: int) -> None:
        saved = run.load_checkpoint()["update"] if run.checkpoint_file.exists() else 0
        lost.append(update - 1 - saved)

    monkeypatch.setattr(Saver, "due", minutes)
    train(tiny(checkpoint={"minutes": 2}), run.folder, progress=watched(see))
    assert len(lost) == 2 * STEPS
    assert max(lost) == 2
