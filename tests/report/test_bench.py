"""A list of models, evaluated each into a folder of its own, on one leaderboard."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers.small_models import knowing
from helpers.tiny_runs import tiny
from rome.core.errors import UserError
from rome.models import build_model, save_model
from rome.report.bench import Entry, comparable, evaluate_entry, gather_models, jobs_of, read_models
from rome.report.leaderboard import group_of, write_leaderboard
from rome.runs.config import Config
from rome.runs.folder import Run
from rome.threats import LpBall, labelled

NET = """
from torch import nn
def build(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
"""
SUITE = "{kind: apgd, iterations: 5}"
RADII = "Linf=0.02,Linf=0.05,Linf=0.1,L2=0.2"


def made_run(folder: Path, seed: int) -> Path:
    """A run of a model that knows the digits."""
    config = tiny(seed=seed, experts=None, data={"kind": "digits"})
    run = Run(folder)
    run.prepare(config, resume=False, overwrite=False)
    run.release()
    save_model(model_of(config, seed), run.model_file, config=config.dump())
    return folder


def model_of(config: Config, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build_model(config.model, None, classes=10, shape=(1, 8, 8))
    return knowing(model, model.backbone.head, *config.data.open("train").first(512))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs under their own budgets, and a function with the same data."""
    root = tmp_path_factory.mktemp("bench")
    for name, seed in (("one", 0), ("two", 1)):
        made_run(root / name, seed)
    (root / "net.py").write_text(NET)
    (root / "models.yaml").write_text(
        f"suite: '{SUITE}'\nn: 20\nbudgets: {RADII}\ndata: digits\nmodels:\n- {root / 'one'}\n"
        f"- {root / 'two'}\n- {{name: linear, model: '{root / 'net.py'}:build', budgets: digits}}\n"
    )
    for job in jobs_of(read_models(root / "models.yaml"), root / "out").values():
        result = evaluate_entry(**job.arguments)
        job.beside("json").write_text(json.dumps(result))
    return root


def test_models_attacked_alike_stand_together_by_their_union(bench: Path) -> None:
    models = gather_models(read_models(bench / "models.yaml"), bench / "out")
    assert [one.name for one in models] == ["one", "two", "linear"]
    runs, (linear,) = comparable(models)
    assert {one.name for one in runs} == {"one", "two"}
    assert linear.name == "linear"
    assert runs[0].report.union >= runs[1].report.union
    assert runs[0].report.cases == ("clean", "Linf-0.02", "Linf-0.05", "Linf-0.1", "L2")
    assert linear.report.cases == ("clean", "L1", "L2", "Linf")


def test_leaderboard(bench: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = gather_models(read_models(bench / "models.yaml"), bench / "out")
    page = write_leaderboard(models, bench / "out", {"<b>gone</b>": "there is no folder"})
    assert "Linf-0.05" in capsys.readouterr().out
    html = page.read_text()
    assert "<b>gone</b>" not in html
    assert "<script>" in html
    groups = json.loads((bench / "out" / "leaderboard.json").read_text())
    assert [len(group["models"]) for group in groups] == [2, 1]
    (pair,) = groups[0]["pairs"]
    ranked = {one["name"]: one["accuracies"]["union"]["value"] for one in groups[0]["models"]}
    assert pair["value"] == pytest.approx(ranked[pair["first"]] - ranked[pair["second"]])
    rows = list(csv.DictReader((bench / "out" / "leaderboard.csv").read_text().splitlines()))
    assert [row["run"] for row in rows][2:] == ["linear"]
    assert "| 1 |" in (bench / "out" / "leaderboard.md").read_text()


def test_curves_fall_with_the_radius(bench: Path) -> None:
    models = gather_models(read_models(bench / "models.yaml"), bench / "out")
    (curves,) = group_of(comparable(models)[0]).curves.values()  # L2 has one radius
    for one, curve in zip(comparable(models)[0], curves, strict=True):
        assert curve.radii == [0, 0.02, 0.05, 0.1]
        assert curve.values == sorted(curve.values, reverse=True)
        assert curve.values[0] == one.report.clean
        assert curve.values[-1] < curve.values[0]
        smallest = one.report.correct[:, 1:4].all(axis=1) & one.report.correct[:, 0]
        assert curve.values[-1] == smallest.mean()


def test_a_run_below_the_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "one").mkdir()
    (tmp_path / "models.yaml").write_text("models: [~/one, {name: two, run: ~/one}]")
    for entry in read_models(tmp_path / "models.yaml").models:
        assert entry.run == str(tmp_path / "one")


def test_what_is_done_is_known_by_entry_and_weights(bench: Path) -> None:
    jobs = jobs_of(read_models(bench / "models.yaml"), bench / "out")
    assert [job.done() for job in jobs.values()] == [True, True, False]  # a function may have changed
    assert not any(job.done() for job in jobs_of(read_models(bench / "models.yaml", n=10), bench / "out").values())
    config = Run(bench / "two").config
    kept = (bench / "two" / "model.safetensors").read_bytes()
    save_model(model_of(config, 7), bench / "two" / "model.safetensors", config=config.dump())
    assert not jobs["two"].done()
    (bench / "two" / "model.safetensors").write_bytes(kept)
    assert jobs["two"].done()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: []", "models: "),
        ("models: [{run: a, model: b}]", "models.yaml:1: models.0: give either a run or a model"),
        ("models: [{run: a, mean: 0.5}]", "mean: only for a model"),
        ("models:\n- a\n- {model: b, nn: 3}", "models.yaml:3: models.1.nn"),
        ("models: [x, {name: x, model: y}]", "several models are called x"),
        ("models: [a", "models.yaml"),
        ("", "models"),
    ],
)
def test_lists_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "models.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_models(tmp_path / "models.yaml")
    assert message in str(error.value)


def test_entries(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    forms: dict[Any, tuple[str | None, str | None, str]] = {
        str(tmp_path / "run"): (str(tmp_path / "run"), None, "run"),
        "hf://user/net@v1": ("hf://user/net@v1", None, "user/net@v1"),
        "resnet18.tv_in1k": (None, "resnet18.tv_in1k", "resnet18.tv_in1k"),
        "robustbench:Engstrom2019Robustness": (None, "robustbench:Engstrom2019Robustness", "Engstrom2019Robustness"),
    }
    for text, expected in forms.items():
        entry = Entry.model_validate(text)
        assert (entry.run, entry.model, entry.label) == expected
    (tmp_path / "models.yaml").write_text(
        "data: digits\nn: 5\nmodels: [resnet18, {model: resnet34, n: 7, data: cifar10:x}]"
    )
    one, two = read_models(tmp_path / "models.yaml").entries
    assert (one.data, one.n, two.data, two.n) == ("digits", 5, "cifar10:x", 7)
    one, two = read_models(tmp_path / "models.yaml", n=9).entries
    assert (one.n, two.n) == (9, 9)
    (tmp_path / "models.yaml").write_text("search_precision: tf32\nmodels: [a, {model: b, search_precision: fp32}]")
    assert [each.search_precision for each in read_models(tmp_path / "models.yaml").entries] == ["tf32", "fp32"]


def test_balls_of_one_norm_are_told_apart_by_their_radius() -> None:
    balls = [LpBall(norm="Linf", eps=4 / 255), LpBall(norm="Linf", eps=8 / 255), LpBall(norm="L2", eps=0.5)]
    assert [ball.name for ball in labelled(balls)] == ["Linf-4_255", "Linf-8_255", "L2"]
    own = [LpBall(norm="Linf", eps=0.1, label="weak"), LpBall(norm="Linf", eps=0.2)]
    assert [ball.name for ball in labelled(own)] == ["weak", "Linf"]
