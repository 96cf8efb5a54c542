"""Runs of a second on the digits, and `rome` in a process of its own that a test may kill.

A fork server that has imported everything starts such a process in a tenth of a second instead of ten.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from torch import Tensor

from helpers.small_models import THREADS
from rome.experts import expert_layers
from rome.models import build_model, read_tensors, save_model
from rome.runs.config import Config, parse
from rome.runs.folder import Run
from rome.training.log import Update

TINY: dict[str, Any] = {
    "data": {"kind": "digits", "train_limit": 64, "test_limit": 40},
    "model": {
        "name": "vit_tiny_patch16_224",
        "img_size": 8,
        "patch_size": 4,
        "args": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    },
    "experts": {"kind": "low-rank", "experts": 2, "rank": 2},
    "epochs": 2,
    "batch_size": 12,
    "device": "cpu",
    "attack": {"kind": "pgd", "steps": 1},
    "evaluation": {"suite": {"kind": "apgd", "iterations": 5}, "n": 20, "batch_size": 20},
}
"""RoME+RANDOM: two epochs of five updates, with four examples of each threat; a RANDOM run with ``experts: None``."""

EXACT = {"model": {"name": f"{Path(__file__).parent / 'exact_model.py'}:build"}}
"""Changes of it for comparisons between other batches, which must not differ by more than rounding."""

PRELOAD = [
    "rome.cli.app",
    "rome.training.setup",
    "rome.training.progress",
    "lightning_fabric",
    "torch.utils.tensorboard",
    "torch._dynamo",
]
PRELOAD += ["sklearn.datasets", "sklearn.model_selection"]

STEPS = 5
"""Updates in an epoch of it."""


def changed(**changes: Any) -> dict[str, Any]:
    """The settings above with some changed: ``changed(epochs=1, attack__steps=2)``."""
    settings = copy.deepcopy(TINY)
    for name, value in changes.items():
        *path, last = name.split("__")
        inner = settings
        for key in path:
            inner = inner[key]
        inner[last] = value
    return settings


def tiny(**changes: Any) -> Config:
    return parse(changed(**changes))


def write_yaml(path: Path, settings: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path


def weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a finished run."""
    return read_tensors(folder)[1]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal to the last bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def updates(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in log if line["event"] == "update"]


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of a log without what depends on the machine's speed."""
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in log]


def watched(see: Callable[[int], None]) -> Callable[[Config, int, int], Any]:
    """A ``progress`` for :func:`rome.train` that calls ``see`` with the number of every update."""

    class Watcher:
        def update(self, update: Update) -> None:
            see(update.number)

        def epoch(self, summary: dict[str, Any]) -> None:
            pass

        def validation(self, found: dict[str, Any]) -> None:
            pass

    @contextmanager
    def progress(config: Config, total: int, done: int) -> Iterator[Watcher]:
        yield Watcher()

    return progress


class Moment(NamedTuple):
    """Where a process sends itself a signal."""

    place: str
    """``update``: after an update is logged; ``writing``: with half of a checkpoint on disk; ``logged``: at the end of
    an epoch, logged but not yet in a checkpoint; ``model``: before the model's file gets its name."""
    number: int
    """Which update, or how many-th checkpoint or epoch."""
    signal: int = signal.SIGKILL
    times: int = 1
    rank: int | None = None
    """Only the process of this number."""


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    out: str
    err: str


@dataclass
class Child:
    """`rome` in a process of its own."""

    process: Any
    out: Path
    err: Path

    def wait(self, timeout: float = 60) -> Ended:
        self.process.join(timeout)
        late = self.process.is_alive()
        if late:
            self.process.kill()
            self.process.join()
        ended = Ended(self.process.exitcode, self.out.read_text(), self.err.read_text())
        assert not late, f"still running after {timeout} s: {ended.err}"
        return ended


def rome(*arguments: object, logs: Path, at: Moment | None = None, env: dict[str, str] | None = None) -> Child:
    """Start ``rome ARGUMENTS``, in the environment ``env`` adds to."""
    logs.mkdir(parents=True, exist_ok=True)
    number = len(list(logs.glob("*.err")))
    files = logs / f"{number}.out", logs / f"{number}.err"
    for file in files:
        file.touch()
    return Child(started(_run, [str(argument) for argument in arguments], files, at, env or {}), *files)


def started(function: Callable[..., None], *arguments: Any) -> Any:
    """``function(*arguments)`` in a process from the fork server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def two_processes(*arguments: object, logs: Path, **options: Any) -> list[Child]:
    """``rome ARGUMENTS`` in two processes, in the environment that torchrun would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_MAX_RESTARTS": "0"}
    return [
        rome(*arguments, logs=logs / str(rank), env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in (0, 1)
    ]


def in_two_processes(function: Callable[..., None], *arguments: Any) -> None:
    """``function(rank, *arguments)`` in two processes, rank 0 and 1; an error in one is raised here."""
    multiprocessing.set_forkserver_preload(PRELOAD)
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.002)


def no_traceback(text: str) -> bool:
    return "Traceback" not in text and not re.search(r"^\w*(Error|Exception)\b", text, re.MULTILINE)


def _run(arguments: list[str], files: tuple[Path, Path], at: Moment | None, env: dict[str, str]) -> None:
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    os.environ.update(env)
    torch.set_num_threads(THREADS)
    if at is not None and at.rank in (None, int(env.get("RANK", 0))):
        _arm(at)
    from rome.cli.app import main

    try:
        main(arguments)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _arm(at: Moment) -> None:
    """Make this process send itself a signal at that moment."""
    import rome.models.files
    import rome.training.loop

    loop = rome.training.loop.Loop
    calls = 0

    def reached() -> bool:
        nonlocal calls
        calls += 1
        return calls == at.number

    def strike() -> None:
        for _ in range(at.times):
            os.kill(os.getpid(), at.signal)

    if at.place in ("update", "logged"):
        write = loop._write

        def logged(self: Any, line: dict[str, Any]) -> None:
            write(self, line)
            if line["event"] == ("update" if at.place == "update" else "epoch") and reached():
                strike()

        loop._write = logged
    elif at.place == "writing":
        save = torch.save

        def half(state: Any, file: Any) -> None:
            save(state, file)
            if reached():
                os.truncate(file, os.path.getsize(file) // 2)
                strike()

        torch.save = half
    else:
        assert at.place == "model"
        save_file = rome.models.files.save_file

        def saved(*arguments: Any) -> None:
            save_file(*arguments)
            if reached():
                strike()

        rome.models.files.save_file = saved


def both(children: list[Child]) -> list[Ended]:
    return [child.wait() for child in children]


def assert_same_run(run: Run, alone: Run) -> None:
    """Losses, their parts and accuracies of every update, and the weights at the end, up to rounding."""
    found, expected = updates(run.log()), updates(alone.log())
    assert len(found) == len(expected) == 2 * STEPS
    for line, one in zip(found, expected, strict=True):
        assert line.keys() == one.keys()
        for name in line.keys() - {"images_per_second", "accuracy", "event"}:
            assert line[name] == pytest.approx(one[name], abs=1e-5), (name, line, one)
        assert line["accuracy"] == pytest.approx(one["accuracy"], abs=1e-6)
    end, one_end = weights(run.folder), weights(alone.folder)
    assert end.keys() == one_end.keys()
    for name in end:
        torch.testing.assert_close(end[name], one_end[name], atol=2e-4, rtol=1e-3)


def save_run(folder: Path, **changes: Any) -> Path:
    """A run whose model was never trained; its experts and gates are random instead of zero."""
    config = parse(changed(**changes))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        split = config.data.open("test")
        model = build_model(config.model, config.experts, classes=len(split.classes), shape=split.shape)
        for layer in expert_layers(model).values():
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.dump()))
    save_model(model, folder / "model.safetensors", config=config.dump())
    return folder
