"""Grids of runs: which runs, what is skipped, how seeds are joined, and one real grid."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from helpers.tiny_runs import rome, wait_for
from rome.cli.app import main
from rome.core.errors import REQUEUE, UserError
from rome.evaluation.evaluate import Report
from rome.report.sweep import Result, gather_results, points, save_results, show_results, sweep
from rome.runs.folder import Run

CONFIG = """
data: {kind: digits, train_limit: 64, test_limit: 40}
threats: digits
model: {name: vit_tiny_patch16_224, img_size: 8, patch_size: 2, args: {embed_dim: 8, depth: 1, num_heads: 2}}
epochs: 1
batch_size: 32
attack: {kind: pgd, steps: 1}
evaluation: {suite: {kind: apgd, iterations: 5}, n: 10, batch_size: 10}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.yaml"
    file.write_text(CONFIG)
    return file


def code(arguments: list[str]) -> object:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_every_combination_is_one_run_in_a_folder_of_its_own(config: Path, tmp_path: Path) -> None:
    found = points([config], ["seed=0,1", "epochs=2,3", "method=max"], tmp_path)
    assert [(p.config.seed, p.config.epochs, p.config.method.kind) for p in found] == [
        (0, 2, "max"), (0, 3, "max"), (1, 2, "max"), (1, 3, "max"),
    ]  # fmt: skip
    assert [p.folder.name for p in found] == [f"tiny-seed={s}-epochs={e}" for s in (0, 1) for e in (2, 3)]
    assert {p.row for p in found} == {"tiny epochs=2", "tiny epochs=3"}, "by what varies"


def test_commas_inside_brackets_belong_to_the_value(config: Path, tmp_path: Path) -> None:
    found = points([config], ["attack={kind: pgd, steps: 2},{kind: apgd, steps: 3}"], tmp_path)
    assert [p.config.attack.kind for p in found] == ["pgd", "apgd"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["seed"], "write key=a,b,c"),
        (["seed=0,,1"], "write key=a,b,c"),
        (["seed=0", "seed=1"], "are not distinct"),
        (["epochs=1,0"], r"override 'epochs=0'.*epochs"),
        (["seeds=1"], "unknown key. Did you mean 'seed'"),
    ],
)
def test_a_mistake_in_an_axis_is_said_before_anything_runs(
    config: Path, tmp_path: Path, axes: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        points([config], axes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_folders_of_points_lie_in_out_whatever_the_values(config: Path, tmp_path: Path) -> None:
    long, other = "x" * 400, "x" * 399 + "y"
    chosen = points([config], [f"about=../../up,{long},{other},a\\b"], tmp_path / "out")
    assert {point.folder.parent for point in chosen} == {tmp_path / "out"}
    names = [point.folder.name for point in chosen]
    assert names[0] == "tiny-about=.._.._up"
    assert len(set(names)) == 4
    assert max(len(name.encode()) for name in names) <= 150


def test_two_runs_of_one_name_are_refused(config: Path, tmp_path: Path) -> None:
    other = tmp_path / "more" / "tiny.yaml"
    other.parent.mkdir()
    other.write_text(CONFIG)
    with pytest.raises(UserError, match=r"out/tiny would be more than one run; give the configs different names"):
        points([config, other], [], tmp_path / "out")


def test_a_grid_trains_evaluates_joins_seeds_and_goes_on(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], forked: None
) -> None:
    out = tmp_path / "out"
    arguments = ["sweep", str(config), "seed=0,1", "--out", str(out), "--jobs", "2"]
    assert code(arguments) == 0
    told = capsys.readouterr()
    assert "tiny" in told.out
    with open(out / "sweep.csv", newline="") as file:
        records = list(csv.DictReader(file))
    assert [record["seed"] for record in records] == ["0", "1"]
    found = gather_results(points([config], ["seed=0,1"], out))
    for column in found[0].values:
        values = [result.values[column] for result in found]
        assert values == [float(record[column]) for record in records]
        shown = f"{100 * statistics.fmean(values):.1f} \N{PLUS-MINUS SIGN} {100 * statistics.stdev(values):.1f}"
        assert shown in told.out
    assert json.loads((out / "sweep.json").read_text())[0]["run"] == "tiny"
    before = {file: file.stat().st_mtime_ns for file in out.rglob("model.safetensors")}
    assert len(before) == 2
    assert code(arguments) == 0
    assert "2 of 2 already finished" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in out.rglob("model.safetensors")} == before
    for other in ("apgd-9", "apgd-10-inverse"):  # what is shown is what the config asks for, whatever else there is
        copy = out / "tiny-seed=0" / "evaluation" / other
        shutil.copytree(copy.with_name("apgd-10"), copy)
        matrix = dict(np.load(copy / "matrix.npz"))
        np.savez(copy / "matrix.npz", **{**matrix, "correct": ~matrix["correct"]})
    assert gather_results(points([config], ["seed=0,1"], out)) == found
    (more,) = chosen = points([config], ["seed=0", "evaluation.n=20", "epochs=1"], out)
    shutil.copytree(out / "tiny-seed=0", chosen[0].folder)
    assert gather_results(chosen) == []
    assert not sweep(chosen)
    assert {path.name for path in (more.folder / "evaluation").iterdir()} > {"apgd-10", "apgd-20"}
    assert len(gather_results(chosen)) == 1
    assert gather_results(points([config], ["seed=0", "evaluation.n=1000", "epochs=1"], out)) == [], (
        "all 40 are asked for"
    )
    other = points([config], ["seed=0", "evaluation.seed=1", "evaluation.n=20", "epochs=1"], out)
    assert gather_results(other) == [], "a result of other settings is not shown as theirs"
    assert "evaluation with other settings (seed: 0 there, 1 now)" in sweep(other)[more.folder]
    with pytest.raises(UserError, match="was started with other settings: epochs was 1, now 2"):
        sweep(points([config], ["seed=0,1", "epochs=2"], out))


@pytest.mark.slow
def test_a_run_of_several_processes_is_trained_and_evaluated(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    chosen = points([config], ["device=cpu"], tmp_path / "out")
    assert sweep(chosen, gpus=2) == {}
    (result,) = gather_results(chosen)
    assert set(result.values) == {"clean", "L1", "L2", "Linf", "average", "union"}
    assert len(Run(chosen[0].folder).log()) == 3, "one of them writes"


@pytest.mark.slow
def test_sigterm_reaches_the_runs_and_the_same_command_goes_on(config: Path, tmp_path: Path) -> None:
    config.write_text(CONFIG.replace("epochs: 1", "epochs: 400"))
    run = Run(tmp_path / "out" / "tiny-seed=0")
    child = rome("sweep", config, "seed=0,1", "--out", tmp_path / "out", logs=tmp_path / "logs")
    wait_for(lambda: run.log_file.exists() and run.log_file.read_text().count("\n") > 3)
    os.kill(child.process.pid, signal.SIGTERM)
    ended = child.wait()
    assert (ended.code, ended.err) == (REQUEUE, "stopped; run the same command again to continue\n")
    assert run.checkpoint_file.exists()
    assert "stopped by SIGTERM" in run.folder.with_name("tiny-seed=0.log").read_text()
    assert not (tmp_path / "out" / "tiny-seed=1").exists()


def test_a_case_that_failed_in_one_seed_leaves_a_gap(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = points([config], ["seed=0,1,2"], tmp_path)
    for point in chosen:
        names = ["clean", "L1", "L2"][: 2 if point.config.seed == 1 else 3]
        failed = {} if len(names) == 3 else {"L2": "broken"}
        correct = np.ones((10, len(names)), dtype=bool)
        settings = {"suite": point.config.evaluation.suite.dump(), "seed": 0, "model": {}}
        made = Report(correct, tuple(names), np.zeros(10, np.int64), np.arange(10), settings, failed=failed)
        folder = point.folder / "evaluation" / "apgd-10"
        folder.mkdir(parents=True)
        np.savez(folder / "matrix.npz", **made.arrays())
        (folder / "settings.json").write_text(json.dumps(settings))
        (folder / "result.json").write_text(json.dumps(made.to_json()))
    rows = gather_results(chosen)
    show_results(rows)
    shown = capsys.readouterr().out.splitlines()[1]
    assert re.sub(r"\s+", " ", shown).strip() == "tiny 3 100.0 ± 0.0 100.0 ± 0.0" + 3 * " \N{EN DASH}"
    saved = json.loads((save_results(rows, tmp_path).with_suffix(".json")).read_text(), parse_constant=pytest.fail)
    assert [(each["L1"], each["L2"], each["union"]) for each in saved] == [(1, 1, 1), (1, None, None), (1, 1, 1)]


def test_brackets_in_a_row_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["tiny experts.layers=[qkv]", "tiny experts.layers=[/proj]"]
    show_results([Result(SimpleNamespace(row=name), {"clean": 0.5}) for name in names])  # type: ignore[arg-type]
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()[1:3]] == [
        f"{name} 1 50.0" for name in names
    ]


def test_a_run_that_fails_is_named_and_leaves_the_others_alone(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], forked: None
) -> None:
    out = tmp_path / "out"
    axis = "model.name=nope,vit_tiny_patch16_224"
    assert code(["sweep", str(config), axis, "--out", str(out), "--jobs", "2"]) == 2
    told = capsys.readouterr()
    assert "1 of 2 failed" in told.err
    assert "unknown model 'nope'" in told.err
    rows = gather_results(points([config], [axis], out))
    assert [row.point.row for row in rows] == ["tiny model.name=vit_tiny_patch16_224"]
    assert save_results(rows, out).is_file()
