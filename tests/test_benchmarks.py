"""Each benchmark runs at a tiny size and reports what it promises; its numbers are not judged here."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
Run = Callable[..., dict[str, list[dict[str, Any]]]]


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("common")


@pytest.fixture
def run(common: ModuleType, tmp_path: Path) -> Run:
    """Runs a benchmark with ``--quick`` and reads its tables back from the JSON file."""

    def run(name: str, *options: str) -> dict[str, list[dict[str, Any]]]:
        file = tmp_path / f"{name}.json"
        settings = ["--quick", "--device", "cpu", "--json", str(file), *options]
        importlib.import_module(name).main(settings)
        report = json.loads(file.read_text())
        assert report["command"] == settings
        assert {"cpu", "cores", "threads", "torch", "load"} <= set(report["hardware"])
        assert {"date", "commit", "settings", "load_at_end"} <= set(report)
        return dict(report["tables"])

    return run


def cases(rows: list[dict[str, Any]]) -> set[str]:
    return {row["case"] for row in rows}


@pytest.mark.slow
def test_experts_compares_plain_rome_and_a_loop_that_computes_the_same(run: Run) -> None:
    (rows,) = run("experts").values()
    assert {row["what"] for row in rows} == {"forward", "latency", "input gradient", "training step"}
    assert cases(rows) == {"plain", "rome", "loop", "rome + L_div"}
    assert all(row["disagreement"] <= 1e-5 for row in rows)
    assert all(row["ratio"] == [1, 1, 1] and row["arithmetic"] == 1 for row in rows if row["case"] == "plain")
    assert all(row["arithmetic"] > 1 for row in rows if row["case"] != "plain")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is what Linux says of it")
def test_data_measures_one_and_several_ranks_of_folders_and_tables(run: Run) -> None:
    (rows,) = run("data").values()
    assert [row["ranks"] for row in rows] == [1, 1, 2] * 2
    assert all(row["images_per_second_and_core"] > 0 and row["together"] > row["rank"] for row in rows)


@pytest.mark.slow
def test_layout_compares_the_same_models_in_both_orders(run: Run) -> None:
    (rows,) = run("layout").values()
    assert {row["model"] for row in rows} == {"resnet18, plain", "resnet18, rome"}
    assert {row["what"] for row in rows} == {"forward", "input gradient", "training step"}
    assert cases(rows) == {"channels first", "channels last", "folded"}
    assert all(row["ratio"] == [1, 1, 1] for row in rows if row["case"] == "channels first")


@pytest.mark.slow
def test_attacks_are_timed_at_equal_steps_and_inside_their_balls(run: Run) -> None:
    (rows,) = run("attacks").values()
    assert {row["norm"] for row in rows} == {"L1", "L2", "Linf"}
    assert {"limit", "rome PGD", "rome APGD"} <= cases(rows)
    for row in rows:
        if row["case"].startswith("rome"):
            forwards, backwards = row["passes"]
            assert backwards == row["steps"]
            assert forwards == row["steps"] + (row["case"] == "rome APGD")
            assert row["size"] <= 1 + 1e-4


def test_host_times_the_replay_of_an_update(run: Run) -> None:
    (rows,) = run("host").values()
    assert cases(rows) == {"RANDOM", "RoME+RANDOM"}
    assert all(row["milliseconds"].keys() == {"one graph", "two graphs", "freeze"} for row in rows)


@pytest.mark.slow
def test_mixed_computes_the_same_images_with_fewer_forwards(run: Run) -> None:
    (rows,) = run("mixed").values()
    for workload in ("RANDOM", "MAX"):
        forwards = {row["case"]: row["forwards"] for row in rows if row["what"] == workload}
        assert forwards == {"mixed": 2, "separate": 2 + 2 + 1}
    assert all(row["same"] == 1 for row in rows)


@pytest.mark.slow
def test_training_runs_real_updates_of_both_methods_and_says_where_the_time_goes(run: Run) -> None:
    tables = run("training", "--profile")
    rows = next(rows for title, rows in tables.items() if title.startswith("Training updates"))
    assert cases(rows) == {"RANDOM", "RoME+RANDOM"}
    for row in rows:
        assert row["attack_steps"] == {"L1": 2, "L2": 2, "Linf": 1}
        assert row["extrapolated"]
        assert 0 < row["mfu"] < 1
        assert row["minutes_20_epochs"] > 0
    for (parts,) in (rows for title, rows in tables.items() if title.startswith("Parts")):
        total = parts.pop("total")
        assert sum(parts.values()) == pytest.approx(total)
        assert all(seconds > 0 for seconds in parts.values())


def test_unseen_counts_the_passes_of_every_attack_and_corruption(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    (rows,) = run("unseen", "--cases", "fog", "sparsefool", "ppgd", "gma", "pixelate-3", "sparsefool-original").values()
    ours = {"fog", "sparsefool", "ppgd", "gma", "pixelate-3"}
    assert ours <= cases(rows) <= ours | {"sparsefool-original"}
    passes = {row["case"]: tuple(row["passes"]) for row in rows}
    assert passes["fog"] == (2 + 1, 2)  # two steps, the verdict
    assert passes["gma"] == (1 + 2 + 1, 2)  # also which experts the clean image avoids
    assert passes["pixelate-3"] == (1, 0)
    for row in rows:
        assert row["robust"] == sum(row["verdicts"]) / row["images"]
        assert row["minutes_1000"] == pytest.approx(1000 * row["seconds"] / 60)
        forward, both = row["bare"]["forward"], row["bare"]["with gradient"]
        made = row["passes"][0] * forward + row["passes"][1] * (both - forward)
        assert row["over_passes"] * made == pytest.approx(row["times_bare"] * both)
    told = " ".join(capsys.readouterr().out.split())
    assert "an AlexNet of random weights" in told
    assert "4 attacks take" in told
    assert "1 types of corruption at five severities take" in told
    if "sparsefool-original" in passes:
        assert passes["sparsefool-original"][1] > passes["sparsefool"][1]
        assert "of the original's time" in told
    else:
        assert "sparsefool-original skipped: the package is not installed" in told


def test_apgd_l1_compares_with_the_known_optimum(run: Run) -> None:
    rows = [row for table in run("apgd_l1").values() for row in table]
    assert cases(rows) == {"rome", "rome, float64", "rome, a fifth", "published", "published, at the image"}
    assert all(row["least"] <= row["mean"] <= 1 + 1e-5 for row in rows)


@pytest.mark.slow
def test_gpu_steps_compares_both_forms_and_writes_as_it_goes(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    tables = run("gpu_steps")
    (parity,) = (rows for title, rows in tables.items() if title.startswith("RoME from"))
    assert all(row["logits"] < 1e-5 and row["gradient"] < 1e-5 for row in parity)
    (rows,) = (rows for title, rows in tables.items() if title.startswith("Attack steps"))
    steps = {row["case"]: row for row in rows}
    assert set(steps) == {"plain", "rome", "general"}
    layers = 2 * 4
    assert steps["rome"]["operations"] <= steps["plain"]["operations"] + 8 * layers < steps["general"]["operations"]
    assert steps["plain"]["ratio"] == [1, 1, 1]
    assert steps["rome"]["arithmetic"] > 1
    told = capsys.readouterr().out
    assert "failed" not in told
    assert "mix backward" in told


@pytest.mark.slow
def test_gpu_steps_goes_on_after_a_row_that_fails_and_ends_in_time(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = importlib.import_module("gpu_steps")
    monkeypatch.setattr(steps, "parity", lambda *_: 1 / 0)
    monkeypatch.setattr(steps, "parts", lambda *_: 1 / 0)
    options = ["--quick", "--device", "cpu", "--out", str(tmp_path)]
    steps.main(options)
    assert "vit-micro, parity failed: ZeroDivisionError: division by zero" in capsys.readouterr().out
    assert any(title.startswith("Attack") for title in json.loads((tmp_path / "gpu_steps.json").read_text())["tables"])
    assert "out of time before: bare products" in steps.main([*options, "--minutes", "0"])["notes"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--unfrozen",)], ids=["frozen", "unfrozen"])
def test_autoattack_is_timed_under_every_norm(options: tuple[str, ...], run: Run) -> None:
    (rows,) = run("autoattack", *options).values()
    cases = [(row["norm"], row["case"]) for row in rows]
    assert cases == [(norm, case) for norm in ("L1", "L2", "Linf") for case in ("rome", "pyautoattack")]
    assert all(row["same"] == row["images"] for row in rows if row["case"] == "rome")


@pytest.mark.slow
def test_gpu_runs_its_parts_in_turn_and_survives_what_fails_or_takes_too_long(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    gpu = importlib.import_module("gpu")
    programs = {"prints": "print('a line')", "fails": "raise SystemExit(3)", "hangs": "import time; time.sleep(600)"}
    parts = [
        gpu.Part(name, 0.0 if name == "hangs" else 0.9, [sys.executable, "-c", program])
        for name, program in programs.items()
    ]
    monkeypatch.setattr(gpu, "parts", lambda *_: parts)
    monkeypatch.setattr(gpu, "LEAST", 2)
    assert gpu.main(["--minutes", "1", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "a line" in out
    said = (tmp_path / "gpu.md").read_text()
    for line in ("- prints: done", "- fails: failed with exit code 3", "- hangs: stopped at the end of its time"):
        assert said.count(line) == 2  # where it ended, and in the summary
    assert gpu.main(["--minutes", "0", "--out", str(tmp_path)]) == 0
    assert "- prints: skipped, no time left" in (tmp_path / "gpu.md").read_text()
    assert (tmp_path / "gpu.md").read_text().startswith(said)  # nothing of an earlier run is lost


def test_what_gpu_runs_is_there_and_its_files_are_few(
    common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every benchmark takes the options that it gets: it comes to its start."""
    started = []

    def start(options: Any) -> None:
        started.append(options)
        raise InterruptedError

    monkeypatch.setattr(common, "start", start)
    gpu = importlib.import_module("gpu")
    parts = gpu.parts("data", 12, "cuda", tmp_path, False)
    files = {part.command[part.command.index("--json") + 1] for part in parts if "--json" in part.command}
    assert len(files) + 1 <= 8
    for part in parts:
        if "--json" in part.command:
            module = importlib.import_module(Path(part.command[1]).stem)
            with pytest.raises(InterruptedError):
                module.main(part.command[2:])
    assert len(started) == len(files) == 5


@pytest.mark.slow
def test_checkpoints_compares_updates_with_and_without_a_write(run: Run) -> None:
    (rows,) = run("checkpoints").values()
    update, *others = rows
    assert (update["case"], update["ratio"]) == ("update", [1, 1, 1])
    assert len(others) == 3
    assert all(row["bytes"] > 1e6 and min(row["seconds"]) > 0 for row in rows)


def test_accuracy_at_equal_time_is_that_of_the_updates_made_by_then(common: ModuleType) -> None:
    comparison = importlib.import_module("comparison")
    log = [{"event": "update", "update": i, "accuracy": {"L1": i / 100, "L2": i / 100}} for i in range(1, 41)]
    log.append({"event": "epoch", "update": 40, "seconds": 80.0})
    assert comparison.before(log, 80) == pytest.approx(0.395)  # the last two of 40
    assert comparison.before(log, 40) == pytest.approx(0.195)
    assert comparison.before(log, 500) == pytest.approx(0.395)
    names = {file.stem for file in (BENCHMARKS.parent / "experiments" / "gpu").glob("[a-z]*.yaml")}
    assert names == {"natural", *comparison.METHODS}


def test_cases_take_turns(common: ModuleType) -> None:
    order: list[str] = []
    work = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    times = common.interleave(work, torch.device("cpu"), rounds=3, warmup=1, shortest=0)
    assert "".join(order) == "ABC" + "ABC" + "BCA" + "CAB"
    assert {name: len(found) for name, found in times.items()} == {"A": 3, "B": 3, "C": 3}


def test_ratios_pair_the_times_of_a_round(common: ModuleType) -> None:
    assert common.ratio([2, 9, 3], [1, 3, 2]) == (2, 1.5, 3)


def test_counted_arithmetic_is_the_closed_form(common: ModuleType) -> None:
    """A linear model: forward one product; to the input two; to the parameters forward and weight gradient."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    assert importlib.import_module("flops").count_flops(model, shape=(3, 2, 2)) == (120, 240, 240)


def test_counted_arithmetic_of_vit_b_is_the_papers(common: ModuleType) -> None:
    """5.60 G MACs (paper, table 6)."""
    with torch.device("meta"):
        model = common.create_model("vit_base_patch16_224", num_classes=10, img_size=32, patch_size=4)
    assert round(importlib.import_module("flops").count_flops(model).forward / 2e9, 2) == 5.60


def test_routing_joins_seeds_and_compares_them_in_pairs(common: ModuleType) -> None:
    routing = importlib.import_module("routing")
    numbers = {"information": 0.5, "distance": 0.25, "probe": 0.9, "features": 0.6, "load": 1.0}
    lines = [
        {"config": "random", "seed": 0, "clean": 0.9, "union": 0.5},
        {"config": "random", "seed": 1, "clean": 0.8, "union": 0.4},
        {"config": "rome", "seed": 1, "clean": 0.7, "union": 0.6, **numbers},
        {"config": "rome", "seed": 0, "clean": 0.9, "union": 0.4, **numbers},
    ]
    table = routing.table(lines, "random")
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["config"] == ["random", "rome"]
    assert columns["union"] == ["45.0 ± 7.1", "50.0 ± 14.1"]
    assert columns["over random"] == ["", "+5.0 (-10.0 to +20.0)"]
    assert columns["information"] == ["", "50.00"]
    assert columns["load"] == ["", "1.000"]
