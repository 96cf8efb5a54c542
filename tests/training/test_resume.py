"""A run survives a kill at any moment, ends in order on a signal, and its folder is never overwritten by accident."""

from __future__ import annotations

import os
import random
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.problems import rest_slow
from helpers.tiny_runs import (
    STEPS,
    Moment,
    changed,
    no_traceback,
    rome,
    same,
    tiny,
    updates,
    wait_for,
    watched,
    weights,
    without_times,
    write_yaml,
)
from rome.cli.app import main
from rome.core.errors import REQUEUE, Interrupted, UserError
from rome.core.files import make_folder
from rome.runs.folder import Run
from rome.training.setup import train


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """RoME+RANDOM in fp32, from beginning to end."""
    return train(tiny(), tmp_path_factory.mktemp("undisturbed") / "run")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_yaml(tmp_path / "tiny.yaml", changed(name="run"))


def assert_as_undisturbed(run: Run, undisturbed: Run) -> None:
    """The same bits, and a log that tells every update and every epoch once."""
    assert same(weights(run.folder), weights(undisturbed.folder))
    assert not run.has_checkpoint
    assert without_times(run.log()) == without_times(undisturbed.log())
    assert [line["update"] for line in updates(run.log())] == list(range(1, 2 * STEPS + 1))


def resume(run: Run, **changes: Any) -> Run:
    return train(tiny(**changes), run.folder, resume=True)


# Kills


MOMENTS = [
    Moment("update", STEPS + 1),
    Moment("writing", 2),
    Moment("model", 1),
    Moment("update", 2),
    Moment("logged", 1),
    Moment("writing", 1),
]


@pytest.mark.parametrize("moment", rest_slow({f"{moment.place}-{moment.number}": moment for moment in MOMENTS}, 2))
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    moment: Moment, config: Path, tmp_path: Path, undisturbed: Run
) -> None:
    run = Run(tmp_path / "run")
    arguments = config, "checkpoint.minutes=1e-6", "--out", run.folder  # a checkpoint whenever none is being written
    ended = rome("train", *arguments, logs=tmp_path / "logs", at=moment).wait()
    assert ended.code == -signal.SIGKILL
    assert not run.finished
    if moment.place == "writing":
        assert list(run.folder.glob("*.partial")), "the kill must have hit the file half written"
    assert_as_undisturbed(resume(run), undisturbed)


def test_a_kill_from_outside_at_a_random_moment_of_the_second_epoch(
    config: Path, tmp_path: Path, undisturbed: Run
) -> None:
    run = Run(tmp_path / "run")
    child = rome("train", config, "--out", run.folder, logs=tmp_path / "logs")
    lines = random.randint(STEPS + 1, 2 * STEPS - 1)
    wait_for(lambda: run.log_file.exists() and run.log_file.read_text().count("\n") >= lines)
    os.kill(child.process.pid, signal.SIGKILL)
    if child.wait().code == -signal.SIGKILL:  # otherwise it had finished meanwhile
        resume(run)
    assert_as_undisturbed(run, undisturbed)


def test_tensorboard_shows_every_update_once_after_a_kill(config: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path / "run")
    at = Moment("logged", 2)
    rome("train", config, "--out", run.folder, logs=tmp_path / "logs", at=at).wait()
    resume(run)
    events = EventAccumulator(str(run.tensorboard)).Reload()
    assert [point.step for point in events.Scalars("update/loss")] == list(range(1, 2 * STEPS + 1))


@pytest.mark.slow
def test_a_run_may_be_killed_again_and_again(config: Path, tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path / "run")
    for number in (3, STEPS + 2, 4):
        rome(
            "train", config, "--out", run.folder, "--resume", logs=tmp_path / "logs", at=Moment("update", number)
        ).wait()
    assert_as_undisturbed(resume(run), undisturbed)


CNN = {"name": "resnetv2_18", "args": {"channels": [8, 8, 8, 8], "layers": [1, 1, 1, 1]}}


KINDS: dict[str, dict[str, Any]] = {
    "dropout+augmentation": {
        "data__augment": True,
        "model__args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.3},
    },
    "eat+experts+augmentation": {"method": "eat", "attack": {"kind": "apgd", "steps": 2}, "data__augment": True},
    "ramp+trades+accumulate+sgd+bf16": {
        "method": {"kind": "ramp", "trades": 6},
        "accumulate": 2,
        "optimizer": "sgd",
        "precision": "bf16",
    },
    "batch+accumulate+sgd": {"method": {"kind": "random", "per": "batch"}, "accumulate": 3, "optimizer": "sgd"},
    "natural+bf16+apgd": {
        "method": "max",
        "natural_epochs": 1,
        "precision": "bf16",
        "attack": {"kind": "apgd", "steps": 2},
    },
    "msd": {"method": {"kind": "msd", "steps": 2}},
    "eat": {"method": "eat", "experts": None, "accumulate": 2},
    "convolutions": {"method": "ramp", "model": CNN, "experts": {"kind": "low-rank", "experts": 2, "rank": 1}},
}


@pytest.mark.parametrize("changes", rest_slow(KINDS, 3))
def test_every_kind_of_randomness_and_state_goes_on(changes: dict[str, Any], tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    interrupted(run, STEPS + 2, **changes)
    assert_as_undisturbed(resume(run, **changes), train(tiny(**changes), tmp_path / "whole"))


@pytest.mark.parametrize("natural", rest_slow([1, 0], 1))
@pytest.mark.slow
def test_a_killed_run_of_ramp_goes_on_between_two_fusions(natural: int, tmp_path: Path) -> None:
    changes = {"method": "ramp", "natural_epochs": natural}
    run = Run(tmp_path / "run")
    config = write_yaml(tmp_path / "ramp.yaml", changed(name="run", **changes))
    at = Moment("update", STEPS + 2)
    assert rome("train", config, "--out", run.folder, logs=tmp_path / "logs", at=at).wait().code == -signal.SIGKILL
    for stop in (STEPS + 1, STEPS + 3):  # signals, each with a checkpoint in the middle of the epoch
        strike = watched(lambda n, stop=stop: os.kill(os.getpid(), signal.SIGTERM) if n == stop else None)
        with pytest.raises(Interrupted):
            train(tiny(**changes), run.folder, resume=True, progress=strike)
    assert_as_undisturbed(resume(run, **changes), train(tiny(**changes), tmp_path / "whole"))


@pytest.mark.parametrize("tail", ['{"event": "upd', '{"event": "update", "update": 6}', "\n\n"])
def test_a_log_line_cut_short_is_dropped(tail: str, tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path / "run")
    interrupted(run, STEPS)
    with open(run.log_file, "a") as log:
        log.write(tail)
    assert_as_undisturbed(resume(run), undisturbed)


# Signals


def interrupted(run: Run, update: int, number: int = signal.SIGTERM, **changes: Any) -> int:
    """Train until a signal arrives during that update; the exit code."""

    def strike(now: int) -> None:
        if now == update:
            os.kill(os.getpid(), number)

    with pytest.raises(Interrupted) as stopped:
        train(tiny(**changes), run.folder, progress=watched(strike))
    return stopped.value.code


def test_sigterm_ends_the_process_in_one_line_and_asks_to_go_on(config: Path, tmp_path: Path, undisturbed: Run) -> None:
    run = Run(tmp_path / "run")
    at = Moment("update", STEPS + 2, signal.SIGTERM)
    ended = rome("train", config, "--out", run.folder, logs=tmp_path / "logs", at=at).wait()
    assert (ended.code, ended.out) == (REQUEUE, "")
    assert [line for line in ended.err.splitlines() if not line.startswith("run: epoch")] == [
        f"stopped by SIGTERM; continue with: rome train --resume {run.folder}"
    ]
    finished = rome("train", "--resume", run.folder, logs=tmp_path / "logs").wait()
    assert (finished.code, finished.out) == (0, "")
    assert_as_undisturbed(run, undisturbed)


def test_ctrl_c_ends_with_130_and_a_checkpoint_of_that_very_update(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], undisturbed: Run
) -> None:
    run, before = Run(tmp_path / "run"), signal.getsignal(signal.SIGINT)
    assert interrupted(run, 3, signal.SIGINT) == 130
    state = run.load_checkpoint()
    assert (state["epoch"], state["step"]) == (0, 3)
    assert signal.getsignal(signal.SIGINT) is before, "the handlers are as before"
    with pytest.raises(SystemExit) as ended:
        main(["train", str(config), "--out", str(run.folder)])
    assert ended.value.code == 2, "an unfinished run needs --resume"
    assert "pass --resume to continue it or --overwrite" in capsys.readouterr().err
    assert_as_undisturbed(resume(run), undisturbed)


def test_a_second_ctrl_c_ends_at_once(config: Path, tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    twice = Moment("update", 2, signal.SIGINT, times=2)
    ended = rome("train", config, "--out", run.folder, logs=tmp_path / "logs", at=twice).wait()
    assert ended.code == 130
    assert no_traceback(ended.err)
    assert not run.checkpoint_file.exists(), "it did not wait for a checkpoint"


@pytest.mark.parametrize("update", [1, STEPS])
def test_a_signal_at_the_last_update_of_an_epoch_stops_there(update: int, tmp_path: Path) -> None:
    """Also where an epoch is a single update."""
    run = Run(tmp_path / "run")
    limit = 12 * update
    assert interrupted(run, update, data__train_limit=limit) == REQUEUE
    assert (run.load_checkpoint()["epoch"], run.load_checkpoint()["step"]) == (1, 0)
    assert len(updates(run.log())) == update
    whole = train(tiny(data__train_limit=limit), tmp_path / "whole")
    assert same(weights(resume(run, data__train_limit=limit).folder), weights(whole.folder))


def test_a_signal_in_the_very_last_update_lets_the_run_finish(tmp_path: Path, undisturbed: Run) -> None:
    run = train(
        tiny(),
        tmp_path / "run",
        progress=watched(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 2 * STEPS else None),
    )
    assert_as_undisturbed(run, undisturbed)


# Which folder a run may use


def prepare(run: Run, *, resume: bool = False, overwrite: bool = False, **changes: Any) -> Any:
    return run.prepare(tiny(**changes), resume=resume, overwrite=overwrite)


@pytest.fixture
def stopped(tmp_path: Path) -> Run:
    """A run interrupted in its second epoch."""
    run = Run(tmp_path / "stopped")
    interrupted(run, STEPS + 2)
    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_finished_run_is_not_touched_unless_told(undisturbed: Run, tmp_path: Path) -> None:
    before = contents(undisturbed.folder)
    for resuming in (False, True):
        with pytest.raises(UserError, match="holds a finished run; choose another --out or pass --overwrite"):
            train(tiny(), undisturbed.folder, resume=resuming)
    assert contents(undisturbed.folder) == before


def test_overwrite_starts_anew_and_leaves_other_files(stopped: Run) -> None:
    (stopped.folder / "notes.txt").write_text("mine")
    for name in ("evaluation", "evaluation-budgets", "evaluation-best-budgets"):
        (stopped.folder / name).mkdir()
    assert prepare(stopped, overwrite=True, seed=5) is None
    stopped.release()
    assert sorted(path.name for path in stopped.folder.iterdir()) == ["config.yaml", "notes.txt", "origin.json"]
    assert stopped.config == tiny(seed=5)


def test_two_processes_do_not_train_in_one_folder(stopped: Run) -> None:
    first, second = Run(stopped.folder), Run(stopped.folder)
    prepare(first, resume=True)
    before = contents(stopped.folder)
    for options in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(UserError, match=r"another process is training in .*choose another --out"):
            prepare(second, **options)
    assert contents(stopped.folder) == before
    first.release()
    assert not (stopped.folder / "train.lock").exists()
    assert prepare(second, resume=True)["step"] == 2
    second.release()


def test_an_unfinished_run_needs_resume_or_overwrite(stopped: Run) -> None:
    before = contents(stopped.folder)
    with pytest.raises(UserError, match="holds an unfinished run; pass --resume to continue it or --overwrite"):
        prepare(stopped)
    assert contents(stopped.folder) == before
    assert prepare(stopped, resume=True)["step"] == 2


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
@pytest.mark.parametrize("name", ["thesis.tex", "model.safetensors", "evaluation/result.json", "last.pt"])
def test_a_folder_of_something_else_is_refused_and_left_alone(
    options: dict[str, bool], name: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run; choose another --out"):
        prepare(Run(tmp_path), **options)
    assert contents(tmp_path) == {name: b"mine"}


def test_an_out_that_cannot_be_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="choose another --out"):
            prepare(Run(out))
    assert (tmp_path / "file").read_text() == "mine"


def test_resume_with_nothing_there_starts(tmp_path: Path) -> None:
    for run in (Run(tmp_path / "new"), Run(tmp_path / "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert prepare(run, resume=True) is None
        assert run.config == tiny()


def test_a_kill_before_the_config_had_its_name_does_not_block_the_folder(tmp_path: Path) -> None:
    (tmp_path / f".config.yaml.{os.getppid()}.partial").write_text("seed:")
    assert prepare(Run(tmp_path), resume=True) is None
    assert list(tmp_path.glob(".*.partial")) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seed": 3}, "seed was 0, now 3"),
        ({"epochs": 9}, "epochs was 2, now 9"),
        ({"precision": "bf16"}, "precision was 'fp32', now 'bf16'"),
        ({"method": "max"}, r"method\.kind was 'random', now 'max'"),
        ({"experts__rank": 3}, r"experts\.rank was 2, now 3"),
        ({"experts": None}, r"experts(\.\w+)* was .*, now None"),
        ({"attack__steps": 2, "batch_size": 16}, r"attack\.steps was 1, now 2; batch_size was 12, now 16"),
    ],
)
def test_other_settings_are_refused_by_name(changes: dict[str, Any], told: str, stopped: Run) -> None:
    before = contents(stopped.folder)
    with pytest.raises(UserError, match=f"was started with other settings: .*{told}"):
        prepare(stopped, resume=True, **changes)
    assert contents(stopped.folder) == before


def test_what_computes_the_same_may_change(stopped: Run, undisturbed: Run) -> None:
    changes = {"device": "auto", "workers": 1, "about": "now with a note", "evaluation__n": 7}
    if torch.cuda.is_available():
        changes["device"] = "cpu"
    finished = resume(stopped, **changes)
    assert same(weights(finished.folder), weights(undisturbed.folder))
    assert finished.config.evaluation.n == 7
    assert prepare_only(finished, compile=True, graphs=False) == tiny(compile=True, graphs=False)


def prepare_only(run: Run, **changes: Any) -> Any:
    """The config after resuming a copy of a run without its model."""
    run.model_file.unlink()
    prepare(run, resume=True, **changes)
    return run.config


# Checkpoints that cannot be used


def damaged(stopped: Run, content: bytes) -> str:
    """What resuming says about a checkpoint of this content without another before it; it stays as it is."""
    stopped.before_file.unlink(missing_ok=True)
    stopped.checkpoint_file.write_bytes(content)
    with pytest.raises(UserError) as refused:
        resume(stopped)
    assert stopped.checkpoint_file.read_bytes() == content
    return str(refused.value)


def test_a_full_disk_is_told_and_leaves_the_checkpoint_before(stopped: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stopped.checkpoint_file.read_bytes()

    def full(state: Any, file: Any) -> None:
        Path(file).write_bytes(b"part")
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 64 vs 0\nframe #0: ...")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"last\.pt cannot be written .*is the disk full.*--resume"):
        resume(stopped)
    assert stopped.checkpoint_file.read_bytes() == before
    assert list(stopped.folder.glob("*.partial")) == list(stopped.folder.glob(".*.partial")) == []
    monkeypatch.undo()
    (stopped.folder / ".last.pt.1.partial").write_bytes(b"of a kill")
    resume(stopped)
    assert stopped.finished
    assert list(stopped.folder.glob(".*.partial")) == []


def test_a_full_disk_before_any_checkpoint_promises_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(state: Any, file: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    run = Run(tmp_path)
    with pytest.raises(UserError, match=r"There is no previous checkpoint; make room and continue with --resume"):
        run.save_checkpoint({})
    monkeypatch.undo()
    run.save_checkpoint({})
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="The previous checkpoint is kept"):
        run.save_checkpoint({})


def test_what_killed_processes_left_goes_and_what_is_being_written_stays(tmp_path: Path) -> None:
    old, new = ".a.json.1.partial", ".b.json.2.partial"
    for name in (old, new, ".mine.partial", "a.partial"):
        (tmp_path / name).touch()
    os.utime(tmp_path / old, (0, 0))
    make_folder(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {new, ".mine.partial", "a.partial"}


def test_a_damaged_checkpoint_is_named_and_kept(stopped: Run) -> None:
    whole = stopped.checkpoint_file.read_bytes()
    contents = [
        b"",
        b"\0" * 100,
        b"PK\x03\x04",
        b"not a checkpoint",
        whole[:1000],
        whole[: len(whole) // 2],
        whole[:-1],
    ]
    contents += [whole[1:], bytes(random.Random(0).randbytes(len(whole)))]
    for content in contents:
        message = damaged(stopped, content)
        assert str(stopped.checkpoint_file) in message
        assert "cannot be read" in message
        assert "restore it, or pass --overwrite to start anew" in message


def test_flipped_bytes_never_end_in_a_traceback(stopped: Run) -> None:
    """In the names and sizes around the tensors a few mean nothing; anywhere else they are refused with a reason."""
    whole = stopped.checkpoint_file.read_bytes()
    chance = random.Random(0)
    for _ in range(60):
        content = bytearray(whole)
        for place in chance.sample(range(len(whole)), 4):
            content[place] ^= 1 << chance.randrange(8)
        stopped.checkpoint_file.write_bytes(content)
        with suppress(UserError):
            assert stopped.load_checkpoint()["format"] == 1


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(stopped: Run, undisturbed: Run) -> None:
    content = bytearray(stopped.checkpoint_file.read_bytes())
    content[len(content) // 2] ^= 1
    stopped.checkpoint_file.write_bytes(content)
    assert_as_undisturbed(resume(stopped), undisturbed)


@pytest.mark.parametrize("change", ["foreign", "format", "missing", "shape"])
def test_a_checkpoint_of_something_else_is_refused(change: str, stopped: Run, tmp_path: Path) -> None:
    state = stopped.load_checkpoint()
    if change == "foreign":
        state = {"state_dict": state["model"]}
    elif change == "format":
        state["format"] = 0
    elif change == "missing":
        del state["optimizer"]
    else:
        name = next(iter(state["model"]))
        state["model"][name] = torch.zeros(3, 3)
    torch.save(state, tmp_path / "other.pt")
    message = damaged(stopped, (tmp_path / "other.pt").read_bytes())
    assert "does not fit this config" in message or "is not a checkpoint of this version" in message
    assert "--overwrite" in message


def test_a_checkpoint_is_read_without_running_what_it_holds(stopped: Run, tmp_path: Path) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return (tmp_path / "harm").write_text, ("done",)

    torch.save({"format": 1, "model": Harm()}, tmp_path / "other.pt")
    damaged(stopped, (tmp_path / "other.pt").read_bytes())
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(content, "config.yaml is damaged .*: restore it") for content in ("", "- a list", "{", "seed: [")]
    + [("no such key: 1", "was started with other settings")],
)
def test_a_broken_config_of_a_run_is_explained(content: str, message: str, stopped: Run) -> None:
    stopped.config_file.write_text(content)
    with pytest.raises(UserError, match=message):
        resume(stopped)


def test_the_resolved_config_is_plain_yaml(stopped: Run) -> None:
    assert yaml.safe_load(stopped.config_file.read_text()) == tiny().dump()
