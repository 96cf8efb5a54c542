"""The paper's tables filled from runs: which run belongs to which row, what is joined, marked and compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rome.core.errors import UserError
from rome.evaluation.evaluate import Report
from rome.evaluation.named import named_config
from rome.report.compared import paired
from rome.report.cost import count
from rome.report.tables.paper_rows import BALLS, TABLES
from rome.report.tables.paper_tables import fill
from rome.report.tables.table_formats import render, sources
from rome.runs.config import load, parse
from rome.runs.experiments import files, folder

PAPERS = {"name": "vit_base_patch16_224", "img_size": 32, "patch_size": 4}
"""The model of Table 1."""
Robust = tuple[float, float, float]


def evaluated(
    place: Path,
    settings: dict[str, Any],
    robust: tuple[float, float, float],
    routing: str = "learned",
    *,
    suite: str = "apgd",
    n: int = 200,
    fog: float | None = None,
    **stored: Any,
) -> Path:
    """A run's folder with a config and an evaluation of n examples with these robust accuracies."""
    base = {"data": {"kind": "cifar10", "path": str(place.parent / "data")}, "model": PAPERS}
    config = parse({**base, **settings})
    place.mkdir(parents=True, exist_ok=True)
    (place / "config.yaml").write_text(yaml.safe_dump(config.dump(), sort_keys=False))
    shares = {"clean": 1.0, **dict(zip(BALLS, robust, strict=True)), **({} if fog is None else {"fog": fog})}
    matrix = np.stack([np.arange(n) < round(n * share) for share in shares.values()], axis=1)
    stored |= {
        "model": stored.get("model", {}),
        "suite": {"kind": suite},
        "data": {"sha256": f"first {n}"},
        "provenance": {"routing": routing, "config": config.dump()},
    }
    report = Report(matrix, tuple(shares), np.zeros(n, np.int64), np.arange(n), stored)
    evaluation = place / "evaluation" / f"{suite}-{n}-{routing}"
    evaluation.mkdir(parents=True)
    np.savez(evaluation / "matrix.npz", **report.arrays())
    (evaluation / "settings.json").write_text(json.dumps(stored))
    (evaluation / "result.json").write_text(json.dumps(report.to_json()))
    return place


def line_of(lines: list[Any], label: str) -> Any:
    (line,) = [line for line in lines if line.label == label]
    return line


def test_every_row_is_an_experiment_with_the_papers_numbers() -> None:
    for table, (columns, sections) in TABLES.items():
        for name in (name for experiments in sections.values() for name in experiments):
            config = load(folder() / f"{name}.yaml")
            assert config.paper is not None, name
            if not name.endswith("/eat-per-example"):
                assert set(columns) - {"latency_one_ms"} <= set(config.paper.numbers), (table, name)


def test_tables_have_as_many_rows_as_in_the_paper() -> None:
    """Table 3 has one more of each model: E-AT with a threat for each example, which is like for like beside RoME's."""
    rows = {table: [len(experiments) for experiments in sections.values()] for table, (_, sections) in TABLES.items()}
    assert rows == {
        "1": [13, 13], "2": [17], "3": [7, 7, 7, 7], "4": [3, 7, 7], "5": [4], "6": [4],
        "A1": [12, 12], "A2": [8], "A3": [6, 6], "A4": [7], "A5": [5],
    }  # fmt: skip


def test_every_experiment_with_the_papers_numbers_is_in_a_table() -> None:
    listed = {name for _, sections in TABLES.values() for experiments in sections.values() for name in experiments}
    for file in files():
        if load(file).paper is not None and "literal" not in file.relative_to(folder()).parts:
            assert str(file.relative_to(folder()).with_suffix("")) in listed


def test_no_two_rows_of_a_section_are_the_same_training(tmp_path: Path) -> None:
    for table, (_, sections) in TABLES.items():
        for section, experiments in sections.items():
            assert len(set(experiments)) == len(experiments), (table, section)


def test_a_run_fills_the_row_that_trains_like_it(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", {"method": "max", "attack": {"kind": "pgd", "steps": 3}}, (0.5, 0.6, 0.4))
    lines = fill("1", [run])
    line = line_of([line for line in lines if line.section == "CIFAR-10"], "PGD MAX")
    assert {column: cell.values for column, cell in line.cells.items()} == {
        "clean": (1.0,), "L1": (0.5,), "L2": (0.6,), "Linf": (0.4,), "average": (pytest.approx(0.5),), "union": (0.4,),
    }  # fmt: skip
    assert line.cells["union"].paper == pytest.approx(0.385)
    assert not any(cell.values for other in lines if other.label != "PGD MAX" for cell in other.cells.values())


def given(place: Path, settings: dict[str, Any], sha256: str = "1", **shown: Any) -> Path:
    """The evaluation of a model that no run made, made from that of a run."""
    source = next((evaluated(place / "run", {}, (0.5, 0.6, 0.4), **shown) / "evaluation").iterdir())
    config = named_config({"model": "net.pt", "data": "digits"})
    assert config is not None
    kept = {"model": {"name": "net.pt"}, "config": config.dump()}
    stored = json.loads((source / "settings.json").read_text())
    stored |= {"model": {"type": "Net", "sha256": sha256}, "provenance": kept, **settings}
    (source / "settings.json").write_text(json.dumps(stored))
    return source


def test_a_given_model_has_a_row_of_its_own(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", {"method": "max", "attack": {"kind": "pgd"}}, (0.9, 0.9, 0.9))
    lines = fill("1", [run, given(tmp_path / "b", {})])
    assert lines[-1].section == "Given models"
    assert sum(line.section == "Given models" for line in lines) == 1
    assert {column: cell.values for column, cell in lines[-1].cells.items()} == {
        "clean": (1.0,), "L1": (0.5,), "L2": (0.6,), "Linf": (0.4,), "average": (pytest.approx(0.5),), "union": (0.4,),
    }  # fmt: skip
    assert np.isnan(lines[-1].cells["union"].paper)
    assert not any(cell.best for line in lines for cell in line.cells.values()), "alone of its like"
    assert "net.pt on digits, 200 examples, suite apgd" in sources(lines)
    for form in ("text", "markdown", "latex", "html"):
        assert "Given models" in render("Table 1", lines, form)


def test_evaluations_of_one_given_model_share_a_row_and_two_models_do_not(tmp_path: Path) -> None:
    same = [given(tmp_path / "c", {}), given(tmp_path / "e", {}, n=100)]
    rows = [
        line for line in fill("1", [*same, given(tmp_path / "d", {}, sha256="2")]) if line.section == "Given models"
    ]
    assert [[report.n for report in line.reports] for line in rows] == [[200], [200]]
    apart = [renamed(given(tmp_path / name, {}, suite=suite), name) for name, suite in (("patch", "x"), ("gma", "y"))]
    row = fill("2", apart)[-1]
    assert (row.label, row.cells["patch"].values, row.cells["GMA"].values) == ("net.pt", (0.5,), (0.5,))


def test_no_evaluation_of_a_given_model_is_dropped_without_a_word(tmp_path: Path) -> None:
    """Of another model or under other budgets it has a row of its own; a second one of the same is refused."""
    function = {"model": {"type": "function", "sha256": None}, "provenance": {}}
    places = [
        given(tmp_path / "a", {}),
        given(tmp_path / "b", {"threats": {"Linf": {"eps": 0.1}}}),
        given(tmp_path / "c", function),
        given(tmp_path / "d", function),
    ]
    places = [place.rename(place.with_name(f"at-{i}")) for i, place in enumerate(places)]
    lines = [line for line in fill("1", places) if line.section == "Given models"]
    assert [line.label for line in lines] == ["at-0", "at-1", "at-2", "at-3"]
    assert "evaluated differently" in render("Table 1", lines[:2], "text")
    assert fill("1", [places[0], places[2]])[-1].label == "function", "its name says enough"
    again = given(tmp_path / "e", {"seed": 1})
    with pytest.raises(
        UserError, match=rf"{places[0]} and {again} are both evaluations of net.pt by suite apgd on 200"
    ):
        fill("1", [*places, again])


def renamed(evaluation: Path, case: str) -> Path:
    """With its L1 as if that were another attack."""
    arrays = Report.load(evaluation).arrays()
    names = [case if name == "L1" else name for name in arrays["cases"]]
    np.savez(evaluation / "matrix.npz", **{**arrays, "cases": np.array(names)})
    return evaluation


def test_a_given_model_without_a_column_of_the_table_is_told_what_to_run(tmp_path: Path) -> None:
    lp = given(tmp_path, {})
    with pytest.raises(UserError, match="has no finished evaluation with a column of table 2; run") as told:
        fill("2", [lp])
    assert str(told.value).startswith(str(lp))
    assert "run `rome evaluate --model net.pt --data digits --suite unseen,corruptions` first" in str(told.value)


def test_seeds_of_a_row_are_joined_and_the_gain_over_the_plain_method_has_welchs_interval(tmp_path: Path) -> None:
    experts = {"kind": "low-rank"}
    plain = [evaluated(tmp_path / f"p{s}", {"seed": s}, (0.5, 0.5, u)) for s, u in enumerate((0.30, 0.34))]
    ours = [
        evaluated(tmp_path / f"o{s}", {"seed": s, "experts": experts}, (0.5, 0.5, u)) for s, u in enumerate((0.4, 0.45))
    ]
    lines = [line for line in fill("1", [*plain, *ours]) if line.section == "CIFAR-10"]
    line = line_of(lines, "PGD RoME+RANDOM")
    assert line.cells["union"].mean == pytest.approx(0.425)
    assert line.cells["union"].deviation == pytest.approx(0.05 / 2**0.5)
    value, low, high = line.gain
    assert value == pytest.approx(0.105)
    # Welch by hand: s^2/n = .000625 and .0002; t quantile .975 of 1.6... degrees of freedom
    a, b = 0.05**2 / 4, 0.04**2 / 4
    freedom = (a + b) ** 2 / (a**2 + b**2)
    from scipy.stats import t

    half = t.ppf(0.975, freedom) * (a + b) ** 0.5
    assert (low, high) == (pytest.approx(value - half), pytest.approx(value + half))
    assert line_of(lines, "PGD RANDOM").gain is None


@pytest.mark.parametrize("settings", [{}, {"evaluation": {"n": 7}}])
def test_two_runs_of_one_seed_are_no_two_seeds(settings: dict[str, Any], tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / "a", {}, (0.5, 0.5, 0.3)), evaluated(tmp_path / "b", settings, (0.5, 0.5, 0.3))]
    with pytest.raises(UserError, match="with the same seed, 0, and cannot be averaged; leave one out"):
        fill("1", runs)


def test_rome_with_e_at_is_compared_with_e_at_as_it_was_measured(tmp_path: Path) -> None:
    """Per example, like RoME's, where there is such a run, else as published; what nobody measured takes no place."""
    model = {"name": load(folder() / "fine-tuning/vit-b/eat.yaml").model.name, "img_size": 8, "patch_size": 4}
    base = {"model": model, "attack": "apgd"}
    ours = evaluated(tmp_path / "o", {**base, "method": "eat", "experts": {"kind": "low-rank"}}, (0.5, 0.5, 0.4))
    runs = [ours, evaluated(tmp_path / "b", {**base, "method": "eat"}, (0.5, 0.5, 0.3))]
    line = line_of([line for line in fill("3", runs) if line.measured], "ViT-B RoME+E-AT")
    assert (line.against, line.gain[0]) == ("ViT-B E-AT", pytest.approx(0.1))
    runs.append(evaluated(tmp_path / "e", {**base, "method": {"kind": "eat", "per": "example"}}, (0.5, 0.5, 0.35)))
    line = line_of([line for line in fill("3", runs) if line.measured], "ViT-B RoME+E-AT")
    assert (line.against, line.gain[0]) == ("ViT-B E-AT per example", pytest.approx(0.05))


def test_one_run_each_is_compared_on_the_same_examples(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {}, (0.5, 0.5, 0.3))
    b = evaluated(tmp_path / "b", {"experts": {"kind": "low-rank", "layers": ["qkv", "proj"]}}, (0.5, 0.5, 0.4))
    line = line_of([line for line in fill("1", [a, b]) if line.section == "CIFAR-10"], "PGD RoME+RANDOM")
    expected = paired(line.reports[0], Report.load(a / "evaluation" / "apgd-200-learned"))
    assert line.gain == (expected.value, expected.low, expected.high)


def test_intervals_of_several_differences_hold_together(tmp_path: Path) -> None:
    def made(name: str, method: str, union: float, *, experts: bool, seed: int = 0) -> Path:
        settings = {"method": method, "seed": seed, **({"experts": {"kind": "low-rank"}} if experts else {})}
        return evaluated(tmp_path / name, settings, (0.5, 0.5, union))

    two = [made("a", "random", 0.3, experts=False), made("b", "random", 0.4, experts=True)]
    four = [*two, made("c", "max", 0.3, experts=False), made("d", "max", 0.35, experts=True)]
    filled = [[line for line in fill("1", runs) if line.section == "CIFAR-10"] for runs in (two, four)]
    alone, among = (line_of(lines, "PGD RoME+RANDOM").gain for lines in filled)
    assert alone[0] == among[0] == pytest.approx(0.1)
    # normal quantiles of 95% and of 97.5%
    assert (among[2] - among[1]) / (alone[2] - alone[1]) == pytest.approx(2.2414027 / 1.9599640)
    assert "in brackets simultaneous 95% intervals for all 2" in render("Table 1", filled[1], "text")


def test_seeds_that_agree_have_a_difference_without_an_interval(tmp_path: Path) -> None:
    runs = [
        evaluated(tmp_path / f"{i}{s}", {"seed": s, **settings}, (0.5, 0.5, 0.3 + 0.1 * i))
        for i, settings in enumerate(({}, {"experts": {"kind": "low-rank"}}))
        for s in range(2)
    ]
    lines = [line for line in fill("1", runs) if line.section == "CIFAR-10"]
    value, low, high = line_of(lines, "PGD RoME+RANDOM").gain
    assert value == pytest.approx(0.1)
    assert np.isnan([low, high]).all()
    assert "+10.0 (" not in render("Table 1", lines, "text")


def test_table_5_reads_the_evaluations_with_other_gates(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", {"experts": {"kind": "low-rank"}}, (0.5, 0.5, 0.4))
    evaluated(run, {"experts": {"kind": "low-rank"}}, (0.5, 0.5, 0.2), routing="inverse")
    found = {line.label: line.cells["union"].values for line in fill("5", [run])}
    assert found == {"Random gating": (), "Inverse gating": (0.2,), "w/o experts": (), "PGD RoME+RANDOM": (0.4,)}


def test_a_run_fills_the_rows_of_its_own_data_set_else_those_of_the_first(tmp_path: Path) -> None:
    model = {"model": {"name": "vit_base_patch16_224", "img_size": None}}
    imagenet100 = {"kind": "folder", "path": "x", "classes": "imagenet100"}
    runs = {
        "digits": evaluated(tmp_path / "a", {"method": "max", "data": {"kind": "digits"}}, (0.5, 0.6, 0.4)),
        "cifar10": evaluated(tmp_path / "b", {}, (0.5, 0.6, 0.3)),
        "folder": evaluated(tmp_path / "c", {"data": imagenet100, "threats": "imagenet", **model}, (0.5, 0.6, 0.2)),
    }
    found = {
        (line.section, line.label): line.cells["union"].values
        for line in fill("1", [*runs.values()])
        if line.cells["union"].values
    }
    assert found == {
        ("Own runs: vit_base_patch16_224 on digits (L1 1, L2 0.35, Linf 0.1)", "PGD MAX"): (0.4,),
        ("CIFAR-10", "PGD RANDOM"): (0.3,),
        ("ImageNet-100", "PGD RANDOM"): (0.2,),
    }


def test_the_papers_numbers_stand_beside_its_model_data_and_budgets_alone(tmp_path: Path) -> None:
    small = [{"norm": "l1", "eps": 6}, {"norm": "l2", "eps": 0.25}, {"norm": "linf", "eps": "4/255"}]
    runs = [
        evaluated(tmp_path / "a", {}, (0.5, 0.6, 0.3)),
        evaluated(tmp_path / "b", {"threats": small}, (0.7, 0.7, 0.6)),
        evaluated(tmp_path / "c", {"model": {**PAPERS, "patch_size": 8}}, (0.7, 0.7, 0.6)),
        evaluated(tmp_path / "d", {"model": {**PAPERS, "name": f"{PAPERS['name']}.augreg_in1k"}}, (0.5, 0.6, 0.2)),
    ]
    lines = [line for line in fill("1", runs) if line.cells["union"].values]
    assert [line.section for line in lines] == [
        "CIFAR-10",
        "CIFAR-10",
        "Own runs: vit_base_patch16_224 on cifar10 (L1 12, L2 0.5, Linf 0.03137)",
        "Own runs: vit_base_patch16_224 on cifar10 (L1 6, L2 0.25, Linf 0.01569)",
    ]
    papers = [line.cells["union"].paper for line in lines]
    assert papers == pytest.approx([0.386, 0.386, np.nan, np.nan], nan_ok=True)
    assert [line.cells["union"].best for line in lines] == [True, False, False, False]
    assert re.search(r"^PGD RANDOM  .* 60\.0$", render("Table 1", lines, "text"), re.MULTILINE), (
        "no dash for the paper's"
    )


def test_only_runs_that_differ_in_the_seed_and_were_evaluated_alike_are_averaged(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path / f"a{s}", {"seed": s}, (0.5, 0.6, u)) for s, u in enumerate((0.3, 0.34))]
    moved = {"kind": "cifar10", "path": str(tmp_path / "elsewhere")}
    runs.append(evaluated(tmp_path / "a2", {"seed": 2, "data": moved}, (0.5, 0.6, 0.32)))
    other = evaluated(tmp_path / "slow", {"optimizer": {"kind": "adamw", "lr": 1e-5}}, (0.5, 0.6, 0.1))
    fewer = evaluated(tmp_path / "fewer", {"seed": 3}, (0.5, 0.6, 0.5), n=40)
    lines = [line for line in fill("1", [*runs, other, fewer]) if line.cells["union"].values]
    assert [(line.label, line.cells["union"].values) for line in lines] == [
        ("PGD RANDOM, a0", (0.3, 0.34, 0.32)),
        ("PGD RANDOM, slow", (0.1,)),
        ("PGD RANDOM, fewer", (0.5,)),
    ]


def test_an_evaluation_of_other_weights_fills_no_row(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", {}, (0.5, 0.6, 0.3))
    (run / "model.safetensors").write_bytes(b"other weights")
    settings = run / "evaluation" / "apgd-200-learned" / "settings.json"
    stored = json.loads(settings.read_text())
    stored["provenance"] |= {"checkpoint": "model.safetensors", "checkpoint_sha256": "0" * 64}
    settings.write_text(json.dumps(stored))
    with pytest.raises(UserError, match=r"other weights .* --overwrite"):
        fill("1", [run])


def test_average_and_union_are_over_the_balls_whatever_else_the_suite_attacked_with(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {}, (0.5, 0.6, 0.4), suite="all", fog=0.1)
    b = evaluated(tmp_path / "b", {"experts": {"kind": "low-rank"}}, (0.5, 0.6, 0.45), suite="all", fog=0.0)
    lines = [line for line in fill("1", [a, b]) if line.section == "CIFAR-10"]
    cells = line_of(lines, "PGD RANDOM").cells
    assert (cells["average"].values, cells["union"].values) == ((pytest.approx(0.5),), (0.4,))
    assert line_of(lines, "PGD RoME+RANDOM").gain[0] == pytest.approx(0.05)


def test_rows_show_the_evaluation_that_most_runs_have_before_the_stronger_one_of_a_single_run(tmp_path: Path) -> None:
    a = evaluated(tmp_path / "a", {}, (0.5, 0.6, 0.4))
    experts = {"experts": {"kind": "low-rank"}}
    b = evaluated(tmp_path / "b", experts, (0.5, 0.6, 0.5))
    evaluated(b, experts, (0.5, 0.6, 0.25), suite="autoattack", n=40)
    text = render("Table 1", fill("1", [a, b]), "text")
    assert [line.reports[0].suite for line in fill("1", [a, b]) if line.reports] == ["apgd", "apgd"]
    assert "evaluated differently" not in text
    assert [line.reports[0].suite for line in fill("1", [b]) if line.reports] == ["autoattack"]
    c = evaluated(tmp_path / "c", {"method": "max"}, (0.5, 0.6, 0.4), n=80)
    assert "evaluated differently" in render("Table 1", fill("1", [a, c]), "text")
    assert measured_differently(tmp_path, "1", "2")
    assert not measured_differently(tmp_path, "1", "1")
    lines = fill("1", [a, evaluated(tmp_path / "d", experts, (0.5, 0.6, 0.4), n=80)])
    assert not any(line.gain for line in lines), "not on the same examples"


def test_searches_in_two_precisions_are_two_protocols(tmp_path: Path) -> None:
    experts = {"experts": {"kind": "low-rank"}}
    places = {
        (name, precision): evaluated(tmp_path / f"{name}-{precision}", own, (0.5, 0.6, 0.4), search_precision=precision)
        for name, own in (("plain", {}), ("rome", experts))
        for precision in ("fp32", "tf32")
    }
    for precision in ("fp32", "tf32"):
        lines = fill("1", [places["plain", "fp32"], places["rome", precision]])
        alike = precision == "fp32"
        assert ("evaluated differently" not in render("Table 1", lines, "text")) == alike
        assert any(line.gain for line in lines) == alike
        assert ("suite apgd, searched in TF32" not in sources(lines)) == alike


def measured_differently(place: Path, *networks: str) -> bool:
    """Whether Table 2 of given models says so whose PPGD was measured by these."""
    both = [
        renamed(given(place / f"{i}{networks}", {"networks": {"ppgd": network}}, sha256=str(i)), "ppgd")
        for i, network in enumerate(networks)
    ]
    return "evaluated differently" in render("Table 2", fill("2", both), "text")


def test_where_no_row_is_without_experts_differences_are_to_rome(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", {"experts": {"kind": "low-rank"}}, (0.5, 0.5, 0.4))
    evaluated(run, {"experts": {"kind": "low-rank"}}, (0.5, 0.5, 0.2), routing="inverse")
    lines = fill("5", [run])
    inverse, whole = line_of(lines, "Inverse gating"), line_of(lines, "PGD RoME+RANDOM")
    expected = paired(inverse.reports[0], whole.reports[0])
    assert inverse.gain == (expected.value, expected.low, expected.high)
    assert (inverse.gain[0], inverse.against, whole.gain) == (pytest.approx(-0.2), "PGD RoME+RANDOM", None)
    text = render("Table 5", lines, "text")
    assert "union less RoME's: difference to PGD RoME+RANDOM, in brackets its 95% interval" in text
    assert re.search(r"Inverse gating .* -20\.0 \(-25\.\d to -14\.\d\)", text)
    latex = render("Table 5", lines, "latex")
    assert r"$-$20.0 ($-$25." in latex
    assert r" & clean & $\ell_1$ & $\ell_2$ & $\ell_\infty$ & average & union & union less RoME's" in latex
    assert "bold is the best of ours" in latex


@pytest.mark.slow
def test_sizes_are_counted_and_not_best(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", {"experts": {"kind": "low-rank"}}, (0.5, 0.5, 0.4))
    config = load(run / "config.yaml")
    for table, column, what in (("A3", "parameters_M", "parameters"), ("A4", "added_parameters_M", "experts")):
        cell = line_of(fill(table, [run]), "PGD RoME+RANDOM").cells[column]
        assert cell.values == (count(config)[what] / 1e6,)
        assert not cell.best
    full = count(load(folder() / "table1" / "rome-random-pgd.yaml"))
    assert (round(full["parameters"] / 1e6, 2), round(full["experts"] / 1e6, 2)) == (88.85, 3.70)


def test_the_best_of_ours_is_marked_in_its_section_and_kind_of_attack(tmp_path: Path) -> None:
    runs = [
        evaluated(tmp_path / "a", {}, (0.5, 0.5, 0.3)),
        evaluated(tmp_path / "b", {"method": "max"}, (0.4, 0.5, 0.4)),
        evaluated(tmp_path / "c", {"attack": "apgd"}, (0.2, 0.2, 0.2)),
    ]
    lines = [line for line in fill("1", runs) if line.section == "CIFAR-10"]
    marked = {line.label: [c for c, cell in line.cells.items() if cell.best] for line in lines if line.reports}
    assert marked == {
        "PGD RANDOM": ["L1"],
        "PGD MAX": ["Linf", "union"],
        "APGD RANDOM": [],
    }


def test_what_guessing_reaches_is_best_of_nothing_and_named(tmp_path: Path) -> None:
    """Ten classes: a model that always answers one of them has 10% under every attack."""
    runs = [
        evaluated(tmp_path / name, {"method": name}, (union, union, union), classes=10)
        for name, union in (("random", 0.0), ("max", 0.1))
    ]
    lines = fill("1", runs)
    assert not any(cell.best for line in lines for cell in line.cells.values())
    assert "; clean or union no better than guessing: PGD RANDOM, PGD MAX; *" in render("Table 1", lines, "text")
    lines = fill("1", [*runs, evaluated(tmp_path / "avg", {"method": "avg"}, (0.11, 0.11, 0.11), classes=10)])
    assert [line.label for line in lines if line.cells["union"].best] == ["PGD AVG"]


@pytest.mark.parametrize(
    ("form", "bold"),
    [("text", "*40.0"), ("markdown", "**40.0**"), ("latex", r"\textbf{40.0}"), ("html", "<b>40.0</b>")],
)
def test_every_format_shows_ours_the_papers_and_what_is_missing(tmp_path: Path, form: Any, bold: str) -> None:
    runs = [evaluated(tmp_path / f"{u}", {"method": m}, (0.5, 0.6, u)) for m, u in (("max", 0.4), ("avg", 0.3))]
    text = render("Table 1", fill("1", runs), form)
    assert f"{bold} / 38.5" in text
    missing = "-- / 38.6" if form == "latex" else "\N{EN DASH} / 38.6"
    assert missing in text
    assert "ImageNet-100" in text
    assert re.search(r"runs: vit.base.patch16.224 on cifar10, 200 examples, suite apgd", text.replace("\\", ""))
    assert {"text": "CIFAR-10\n", "markdown": "| *CIFAR-10* |", "latex": r"\midrule", "html": "<caption>"}[form] in text


def test_names_are_text_in_every_format(tmp_path: Path) -> None:
    name = "<b>a</b>|b*c_d\\{e}$f&"
    run = given(tmp_path / "a", {})
    for file in run.rglob("*.json"):
        file.write_text(file.read_text().replace("net.pt", json.dumps(name)[1:-1]))
    lines = fill("1", [run])
    label = {
        "text": name,
        "markdown": r"| &lt;b>a&lt;/b>\|b\*c_d\\{e}\$f&amp; |",
        "latex": r"$<$b$>$a$<$/b$>$\textbar{}b*c\_d\textbackslash{}\{e\}\$f\& &",
        "html": "<td>&lt;b&gt;a&lt;/b&gt;|b*c_d\\{e}$f&amp;</td>",
    }
    for form, text in label.items():
        assert text in render("Table 1", lines, form), form  # type: ignore[arg-type]


def test_mistakes_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no table '7'.*Valid: 1, 2, 3"):
        fill("7", [])
    run = evaluated(tmp_path / "a", {"experts": {"kind": "low-rank", "rank": 3}}, (0.5, 0.5, 0.4))
    with pytest.raises(UserError, match="matches no row of table 1"):
        fill("1", [run])
    with pytest.raises(UserError, match="there is no"):
        fill("1", [tmp_path / "nothing"])
    with pytest.raises(UserError, match=r"a has no finished evaluation with a column of table 2; .*--suite unseen,"):
        fill("2", [evaluated(tmp_path / "b" / "a", {}, (0.5, 0.5, 0.4))])


def store_report(run: Path, names: tuple[str, ...], matrix: np.ndarray, settings: dict[str, Any]) -> None:
    """Put an evaluation into a run's folder."""
    n, settings = len(matrix), {"model": {}, **settings}
    report = Report(matrix, names, np.zeros(n, np.int64), np.arange(n), settings)
    folder = run / "evaluation" / f"{report.suite}-{n}"
    folder.mkdir()
    np.savez(folder / "matrix.npz", **report.arrays())
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "result.json").write_text(json.dumps(report.to_json()))


def test_table_2_reads_the_unseen_suites_columns_by_its_own_names(tmp_path: Path) -> None:
    run = evaluated(tmp_path / "a", {}, (0.5, 0.5, 0.3))
    stored = {"suite": {"kind": "unseen"}, "data": {"sha256": "same"}, "provenance": {"routing": "learned"}}
    matrix = np.ones((40, 4), dtype=bool)
    matrix[10:, 1], matrix[20:, 2], matrix[30:, 3] = False, False, False
    store_report(run, ("clean", "sparsefool", "ppgd", "gma"), matrix, stored)
    line = line_of(fill("2", [run]), "PGD RANDOM")
    assert line.gain is None, "no union, no difference in union"
    cells = line.cells
    assert {name: cell.values for name, cell in cells.items() if cell.values} == {
        "L0": (0.25,), "PPGD": (0.5,), "GMA": (0.75,),
    }  # fmt: skip
    store_report(run, ("clean", "corruptions"), matrix[:, [0, 1]], stored | {"suite": {"kind": "corruptions"}})
    store_report(run, ("clean", "corruptions"), matrix[:20, [0, 2]], stored | {"suite": {"kind": "corruptions"}})
    lines = fill("2", [run])
    assert line_of(lines, "PGD RANDOM").cells["L0"].values == (0.25,)
    assert line_of(lines, "PGD RANDOM").cells["corruptions"].values == (0.25,), "another one, as many examples"
    assert "40 examples, suite unseen; " in sources(lines)
    assert "40 examples, suite corruptions" in sources(lines)
    lp = line_of([line for line in fill("1", [run]) if line.section == "CIFAR-10"], "PGD RANDOM")
    assert lp.cells["union"].values == (0.3,), "and Table 1 the other evaluation"
