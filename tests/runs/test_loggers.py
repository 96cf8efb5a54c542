"""Loggers: they show what the log says, go on where they were, and never end the work that they follow."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from torch import nn

import rome.runs.loggers.base
from helpers.problems import Digits
from helpers.tiny_runs import same, tiny, watched, weights
from rome.core.errors import UserError
from rome.evaluation.evaluate import evaluate
from rome.evaluation.run import evaluate_saved
from rome.evaluation.tracked import chosen_loggers, picture, track
from rome.runs.folder import Run
from rome.runs.loggers import Logger, Tracked, Writer
from rome.runs.loggers.csv import Csv
from rome.threats import DIGITS
from rome.training.setup import train

SHORT: dict[str, Any] = {
    "epochs": 1,
    "validation": {"n": 4, "steps": 1},
    "evaluation": {"suite": {"kind": "lp", "steps": 2}, "n": 4, "batch_size": 4},
}
"""Five updates, a validation, and a quick evaluation."""


class Recorder(Logger):
    """A tracker in memory, which a test breaks where it likes."""

    kind = "toy-recorder"
    runs: ClassVar[list[tuple[Tracked, list[tuple[int, dict[str, float]]], list[str]]]] = []
    broken: ClassVar[str] = ""

    def open(self, run: Tracked) -> Writer:
        return RecordingWriter(run)


class RecordingWriter(Writer):
    def __init__(self, run: Tracked) -> None:
        self.fail("open")
        self.id = run.id or f"id-{len(Recorder.runs)}"
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.others: list[str] = []
        Recorder.runs.append((run, self.rows, self.others))

    def fail(self, where: str) -> None:
        print("chatter of a library")
        if Recorder.broken == where:
            raise RuntimeError(f"no connection while {where}\nand a second line")

    def log_scalars(self, values: Mapping[str, float], step: int) -> None:
        self.fail("numbers" if len(self.rows) < 3 else "later numbers")
        self.rows.append((step, dict(values)))

    def log_image(self, name: str, image: np.ndarray, step: int) -> None:
        self.fail("picture")
        assert image.dtype == np.uint8
        assert image.ndim == 3
        self.others.append(name)

    def close(self, status: str) -> None:
        self.fail("close")
        self.others.append(status)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    Recorder.runs.clear()
    Recorder.broken = ""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing follows but its own log."""
    return train(tiny(**SHORT, loggers=[]), tmp_path_factory.mktemp("plain") / "run")


def flat(line: Mapping[str, Any], prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for key, value in line.items():
        found |= flat(value, f"{prefix}/{key}") if isinstance(value, dict) else {f"{prefix}/{key}": value}
    return {name: value for name, value in found.items() if isinstance(value, float)}


def in_log(run: Run) -> list[tuple[int, dict[str, float]]]:
    """What the log says, by the names and steps that trackers show."""
    return [(line["update"], flat(line, line["event"])) for line in run.log()]


def interrupted(run: Path, after: int, **settings: Any) -> None:
    """A training that ends in an error after so many updates."""

    def see(number: int) -> None:
        if number == after:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train(tiny(**SHORT, **settings), run, progress=watched(see))


# Always


def test_what_is_logged_is_what_the_log_says(tmp_path: Path, plain: Run) -> None:
    run = train(tiny(**SHORT, loggers=["toy-recorder"]), tmp_path / "run")
    ((tracked, rows, others),) = Recorder.runs
    assert rows == in_log(run)
    names = {name for _, values in rows for name in values}
    assert {f"update/{name}" for name in ("loss", "accuracy/L1", "lr", "images_per_second")} <= names
    assert {f"validation/{name}" for name in ("clean", "robust/Linf", "average", "union")} <= names
    assert others == ["finished"]
    assert tracked.config == run.config.dump()
    assert same(weights(run.folder), weights(plain.folder))
    assert not plain.tensorboard.exists()


@pytest.mark.parametrize("where", ["open", "later numbers", "close"])
def test_a_tracker_that_fails_costs_a_line_and_nothing_else(
    where: str, tmp_path: Path, plain: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Recorder.broken = where
    run = train(tiny(**SHORT, loggers=["toy-recorder", "csv"]), tmp_path / "run")
    out, err = capsys.readouterr()
    assert err.count("loggers: toy-recorder failed (no connection while") == 1
    assert "second line" not in err
    assert out == "", "what a library prints is not a result"
    assert same(weights(run.folder), weights(plain.folder))
    assert rows_of(run) == [(step, name, value) for step, values in in_log(run) for name, value in values.items()]


def rows_of(run: Run) -> list[tuple[int, str, float]]:
    """The CSV file."""
    with (run.folder / "metrics.csv").open(newline="") as file:
        return [(int(row["update"]), row["name"], float(row["value"])) for row in csv.DictReader(file)]


@pytest.mark.parametrize("after", [None, 2])
def test_a_row_that_a_kill_cut_short_is_dropped(after: int | None, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("update,name,value\n1,loss,2.5\n2,loss,1.2")
    writer = Csv().open(Tracked(tmp_path, "run", {}, after=after))
    writer.log_scalars({"loss": 1.25}, 2)
    writer.close("finished")
    assert (tmp_path / "metrics.csv").read_text() == "update,name,value\n1,loss,2.5\n2,loss,1.25\n"


def test_a_run_that_resumes_goes_on_in_the_same_tracked_run(tmp_path: Path) -> None:
    """Nothing is logged twice where the tracker can take lines back, and the id is that of the first time."""
    settings = {"loggers": ["csv", "toy-recorder"]}
    interrupted(tmp_path / "run", 3, **settings)
    run = train(tiny(**SHORT, **settings), tmp_path / "run", resume=True)
    (first, _, ends), (second, _, _) = Recorder.runs
    assert (first.id, ends) == ("", ["failed"])
    assert second.id == "id-0" == json.loads((run.folder / "loggers.json").read_text())["toy-recorder"]
    assert second.after == 0, "there was no checkpoint, so all updates were done again"
    assert rows_of(run) == [(step, name, value) for step, values in in_log(run) for name, value in values.items()]
    evaluate_saved(run.folder)
    assert Recorder.runs[-1][0].id == "id-0"
    assert Recorder.runs[-1][0].after is None
    train(tiny(**SHORT, **settings), run.folder, overwrite=True)
    assert Recorder.runs[-1][0].id == "", "another run is another one for the tracker, too"


def test_an_evaluation_logs_what_it_reports(tmp_path: Path, plain: Run, capsys: pytest.CaptureFixture[str]) -> None:
    report, folder = evaluate_saved(plain.folder, out=tmp_path / "result", loggers=["toy-recorder"])
    ((tracked, rows, others),) = Recorder.runs
    ((step, values),) = rows
    assert step == plain.log()[-1]["update"]
    found = {"clean": report.clean, **report.robust, "average": report.average, "union": report.union}
    assert values == pytest.approx(
        {f"evaluation/lp-4/{name}": value for name, value in found.items()}
        | {"evaluation/lp-4/group/lp": report.groups["lp"]}
    )
    fooled = [f"evaluation/lp-4/{case}" for case in report.attacks if report.robust[case] < report.clean]
    assert others == [*fooled, "finished"]
    assert tracked.folder == plain.folder
    evaluate_saved(plain.folder, out=folder)
    assert len(Recorder.runs) == 1, "a result that was there is not logged again"
    Recorder.broken = "numbers"
    evaluate_saved(plain.folder, out=folder, loggers=["toy-recorder"])
    assert "loggers: toy-recorder failed (no connection while numbers)" in capsys.readouterr().err


def test_pictures_show_originals_what_fools_and_the_difference(
    tmp_path: Path, digits: Digits, digits_model: nn.Module
) -> None:
    x, y = (part[:30] for part in digits.test)
    report = evaluate(digits_model.eval(), x, y, threats=DIGITS["Linf"], suite="lp", out=tmp_path / "result")
    drawn = picture(x, tmp_path / "result", "Linf")
    assert drawn is not None
    fooled = np.flatnonzero(report.correct[:, 0] & ~report.correct[:, 1])[:8]
    height, width = 3 * 66 + 2, 66 * len(fooled) + 2  # of 8 x 8 pixels, enlarged to 64, with 2 between
    assert drawn.shape == (height, width, 3)
    rows = drawn[2:, 2:, 0].reshape(3, 66, len(fooled), 66)[:, 4:64:8, :, 4:64:8].transpose(0, 2, 1, 3) / 255
    assert np.abs(rows[0] - x[fooled, 0].numpy()).max() <= 0.5 / 255 + 1e-6
    difference = rows[1] - rows[0]
    assert 0 < np.abs(difference).max() <= DIGITS["Linf"].eps + 1 / 255
    assert np.array_equal(np.sign(np.round(rows[2] - 0.5, 1)) * difference >= 0, np.ones_like(difference, dtype=bool))
    assert picture(x, tmp_path / "result", "clean") is None, "no attack, no picture"


def test_a_missing_package_is_said_before_anything_else(
    tmp_path: Path, plain: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rome.runs.loggers.base, "find_spec", lambda name: None)
    expected = r"loggers: wandb needs the package wandb, .*: pip install 'rome-robust\[wandb\]', or remove wandb"
    with pytest.raises(UserError, match=expected):
        train(tiny(loggers=["wandb", "csv"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=expected):
        evaluate_saved(plain.folder, loggers=["wandb"])
    capsys.readouterr()
    assert [each.kind for each in chosen_loggers(tiny(loggers=["wandb", "csv"]), None)] == ["csv"]
    assert "remove wandb from loggers; the evaluation continues without it" in capsys.readouterr().err


def test_settings_of_loggers(plain: Run) -> None:
    assert [logger.kind for logger in tiny().loggers] == ["tensorboard"]
    assert [logger.kind for logger in tiny(loggers={"kind": "csv"}).loggers] == ["csv"]
    with pytest.raises(UserError, match=r"loggers: csv, csv are not distinct; name each once"):
        tiny(loggers=["csv", "csv"])
    with pytest.raises(UserError, match=r"unknown logger kind 'wandbb'. Did you mean 'wandb'\?"):
        tiny(loggers=["wandbb"])
    with pytest.raises(UserError, match=r"--loggers: unknown logger kind 'wb'"):
        evaluate_saved(plain.folder, loggers=["wb"])


# With the real libraries, where they are installed: offline


Read = Callable[[], tuple[list[str], dict[str, list[tuple[int, float]]], int]]


def in_wandb(run: Run) -> Any:
    """Ids, values by name and number of pictures in wandb's offline files, whose records lie in blocks of 32 KB."""
    pb = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    ids, values, pictures = [], dict[str, list[tuple[int, float]]](), 0
    for path in sorted(run.folder.glob("wandb/offline-run-*/*.wandb")):
        data, place, part = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
            part, place = part + data[place + 7 : place + 7 + length], place + 7 + length
            if kind not in (1, 4):  # the first or a middle part
                continue
            record, part = pb.Record.FromString(part), b""
            if record.HasField("run"):
                ids.append(record.run.run_id)
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name, value in row.items():
                if not name.startswith("_") and isinstance(value, (int, float)):
                    values.setdefault(name, []).append((row["updates"], value))
            pictures += sum(name.startswith("evaluation") and name.endswith("_type") for name in row)
    return ids, values, pictures


def in_mlflow(run: Run) -> Any:
    client = pytest.importorskip("mlflow").MlflowClient()
    experiment = client.get_experiment_by_name("rome")
    found = client.search_runs([experiment.experiment_id])
    number = found[0].info.run_id
    values = {
        name: [(point.step, point.value) for point in client.get_metric_history(number, name)]
        for name in found[0].data.metrics
    }
    assert found[0].info.status == "FINISHED"
    assert found[0].data.params["experts.rank"] == "2"
    return [each.info.run_id for each in found], values, len(client.list_artifacts(number, "evaluation/lp-30"))


def in_trackio(run: Run) -> Any:
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    name = json.loads((run.folder / "loggers.json").read_text())["trackio"]
    values, pictures = dict[str, list[tuple[int, float]]](), 0
    for row in storage.get_logs("rome", name):
        for key, value in row.items():
            if isinstance(value, dict):
                pictures += 1
            elif isinstance(value, (int, float)) and key != "step":
                values.setdefault(key, []).append((row["step"], value))
    return list(dict.fromkeys(storage.get_runs("rome"))), values, pictures


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "read"), [("wandb", in_wandb), ("mlflow", in_mlflow), ("trackio", in_trackio)])
def test_a_tracker_offline(
    kind: str,
    read: Callable[[Run], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    digits: Digits,
    digits_model: nn.Module,
) -> None:
    """One run holds a training that was interrupted, its rest and its evaluation, with every number of the log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # which it reads when it is imported
    pytest.importorskip(kind)
    settings = {"loggers": [kind]}
    interrupted(tmp_path / "run", 3, **settings)
    run = train(tiny(**SHORT, **settings), tmp_path / "run", resume=True)
    x, y = (part[:30] for part in digits.test)
    report = evaluate(digits_model.eval(), x, y, threats=DIGITS["Linf"], suite="lp", out=tmp_path / "result")
    track(run.config.loggers, run.folder, run.config, report, x, tmp_path / "result", "evaluation/lp-30", 5)
    ids, values, pictures = read(run)
    assert len(set(ids)) == 1
    for step, row in in_log(run):
        for name, value in row.items():
            assert any(at == step and one == pytest.approx(value) for at, one in values[name]), name
    assert values["evaluation/lp-30/union"] == [(5, pytest.approx(report.union))]
    assert pictures == 1
