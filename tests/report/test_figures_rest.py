"""Figs. 7, 8 and A3, Table 6, accuracies by class: hand-made cases whose numbers are known."""

from __future__ import annotations

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from helpers.small_models import grow, small_cnn
from helpers.tiny_runs import TINY, tiny, write_yaml
from rome.core.errors import UserError
from rome.evaluation.evaluate import Report
from rome.experts import Global, Local, add_experts
from rome.experts.gates import Gate
from rome.experts.token_maps import grid_of
from rome.models import create_model, save_model
from rome.report.columns import by_class
from rome.report.figures import RegionMaps, Sensitivity, TrainingTime, sensitivity, write_figures
from rome.report.figures.base import Options
from rome.report.figures.regions import attacked_within, boxes
from rome.report.figures.style import RUNS, side, signed, styles_of
from rome.report.subject import short
from rome.report.tables import cost_table
from rome.report.tables.cost_table import fill_costs, named_configs
from rome.report.tables.paper_rows import TABLES
from rome.report.tables.paper_tables import fill
from rome.report.tables.table_formats import render
from rome.runs.config import Config, load
from rome.runs.experiments import folder
from rome.runs.folder import Run
from rome.threats import LpBall

DIGITS = {"L1": LpBall(norm="L1", eps=1.0), "L2": LpBall(norm="L2", eps=0.35), "Linf": LpBall(norm="Linf", eps=0.1)}


def vit(patch_size: int = 2, gate: Gate | None = None, experts: int = 3) -> nn.Module:
    """On digits, with experts as after some training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_model(
            "vit_tiny_patch16_224",
            num_classes=10,
            img_size=8,
            patch_size=patch_size,
            in_chans=1,
            embed_dim=16,
            depth=2,
            num_heads=2,
            mean=(0.3,),
            std=(0.4,),
        )
        add_experts(model, experts=experts, rank=2, layers=("qkv", "proj"), gate=gate)
    return grow(model).eval()


def subject(model: nn.Module, name: str = "run", threats: Any = None, **settings: Any) -> Any:
    """What a figure sees of a run."""
    config = tiny(**settings)
    split = config.data.open("test")
    chosen = DIGITS if threats is None else threats
    return SimpleNamespace(
        name=name, model=model, split=split, threats=chosen, device=torch.device("cpu"), config=config
    )


# Fig. 7: regions


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_regions_part_the_image(count: int) -> None:
    seen = torch.zeros(9, 11, dtype=torch.int)
    found = boxes(count, 9, 11)
    for top, bottom, left, right in found:
        seen[top:bottom, left:right] += 1
    assert len(found) == count
    assert bool((seen == 1).all())


def test_four_regions_are_quadrants_in_reading_order() -> None:
    assert boxes(4, 8, 6) == [(0, 4, 0, 3), (0, 4, 3, 6), (4, 8, 0, 3), (4, 8, 3, 6)]


def test_an_attacked_region_is_the_only_one_that_changes_and_gets_its_share_of_the_budget() -> None:
    """A quarter of the area: a quarter of eps in L1, half of it in L2, all of it in Linf; and all of that is used."""
    model, (x, y) = vit(), subject(vit()).split.first(1)
    found = attacked_within(model, x, y, DIGITS, (0, 4, 2, 6))
    outside = torch.ones(8, 8, dtype=torch.bool)
    outside[0:4, 2:6] = False
    for name, share in (("L1", 0.25), ("L2", 0.5), ("Linf", 1.0)):
        assert torch.equal(found[name][0, 0][outside], x[0, 0][outside])
        size = float(DIGITS[name].size(found[name], x))
        assert 0.8 * share * DIGITS[name].eps < size <= share * DIGITS[name].eps * 1.0001, name
        with torch.no_grad():
            before, after = (nn.functional.cross_entropy(model(image), y) for image in (x, found[name]))
        assert after > before


def test_without_a_perturbation_threats_differ_by_content_alone() -> None:
    """Radius 0: the pictured regions differ, as their content does; over all arrangements no threat differs."""
    nothing = {name: LpBall(norm=name, eps=0) for name in DIGITS}
    data = RegionMaps().measure([subject(vit(), threats=nothing)], Options(n=8))
    (run,) = data["runs"]
    assert [pair["distance_all_arrangements"] for pair in run["apart"]] == pytest.approx([0] * 6, abs=1e-5)
    assert max(pair["distance"] for pair in run["apart"]) > 0.01
    for region in run["regions"]:
        assert region["gates"] == pytest.approx(region["gates_unperturbed"], abs=1e-5)


def test_a_map_holds_the_gates_of_the_composed_image() -> None:
    """Each region's mean is that of the map's places inside; weights of a place sum to 1; the picture is composed."""
    model = vit()
    data = json.loads(json.dumps(RegionMaps().measure([subject(model)], Options(n=8, layer="qkv", image=3))))
    (run,) = data["runs"]
    assert run["layer"] == "backbone.blocks.1.attn.qkv"
    maps = np.array(run["maps"])
    assert maps.shape == (3, 4, 4)
    assert maps.sum(axis=0) == pytest.approx(np.ones((4, 4)), abs=1e-4)
    for region, (rows, columns) in zip(run["regions"], itertools.product((0, 2), (0, 2)), strict=True):
        mean = maps[:, rows : rows + 2, columns : columns + 2].mean(axis=(1, 2))
        assert region["gates"] == pytest.approx(mean.tolist(), abs=1e-4)
    by_name = {region["name"]: region["gates"] for region in run["regions"]}
    for pair in run["apart"]:
        distance = np.linalg.norm(np.subtract(by_name[pair["a"]], by_name[pair["b"]]))
        assert pair["distance"] == pytest.approx(distance, abs=1e-4)
    x = subject(model).split.first(4)[0][3, 0]
    change = np.array(run["perturbation"])
    assert not change[:4, :4].any()  # natural
    assert np.abs(change[4:, 4:]).max() == pytest.approx(0.1, abs=1e-4)  # Linf
    assert np.array(run["pixels"])[..., 0] / 255 == pytest.approx(x.numpy() + change, abs=0.003)
    rows = RegionMaps().rows(data)
    assert len(rows) == 3 * 16
    assert {row["region"] for row in rows if row["row"] < 2 and row["column"] >= 2} == {"L1"}
    assert RegionMaps().draw(data).get_size_inches()[0] == 6.75


def test_runs_without_a_map_are_left_out_with_the_reason() -> None:
    from rome.experts import Global

    plain = create_model("vit_tiny_patch16_224", num_classes=10, img_size=8, patch_size=2, in_chans=1).eval()
    image_level = subject(vit(gate=Global()), "global")
    runs = [subject(plain, "plain"), image_level, subject(vit(gate=Local()), "local")]
    data = RegionMaps().measure(runs, Options(n=8))
    assert [run["name"] for run in data["runs"]] == ["local"]
    assert data["left_out"]["plain"] == "it has no experts"
    assert "for the whole image at once, so there is no map" in data["left_out"]["global"]
    with pytest.raises(UserError, match=r"plain: it has no experts; global: layer .* no map"):
        RegionMaps().measure(runs[:2], Options(n=8))
    with pytest.raises(UserError, match=r"no layer's name contains 'mlp'; the layers are backbone.blocks.0"):
        RegionMaps().measure([runs[2]], Options(n=8, layer="mlp"))
    with pytest.raises(UserError, match="there is no test image 40; choose from 0 to 39"):
        RegionMaps().measure([runs[2]], Options(n=8, image=40))
    five = {**DIGITS, "more": LpBall(norm="Linf", eps=0.1)}
    with pytest.raises(UserError, match="map of 2x2 is too coarse for 5 regions"):
        RegionMaps().measure([subject(vit(patch_size=4), threats=five)], Options(n=8))


@pytest.mark.parametrize(("size", "window"), [(32, 4), (28, 4), (24, 3)], ids=["even", "padded", "three"])
def test_windows_go_back_where_they_were_cut(size: int, window: int) -> None:
    """What Swin's second, shifted block hands its attention, if every token holds its own number."""
    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=size,
        window_size=window,
        embed_dim=16,
        depths=(2,),
        num_heads=(1,),
        num_classes=10,
    )
    side = size // 4
    block = model.layers[0].blocks[1]
    caught: list[Tensor] = []
    hook = block.attn.register_forward_pre_hook(lambda module, given: caught.append(given[0]))
    numbers = torch.arange(1.0, side**2 + 1).view(1, side, side, 1).expand(-1, -1, -1, 16)  # 0 is padding
    block._attn(numbers)
    hook.remove()
    tokens = caught[0][..., 0].flatten()
    add_experts(model, experts=2, rank=2, layers=("qkv",))
    grid = grid_of(model, "layers.0.blocks.1.attn.qkv", side**2, (size, size))
    spread = grid.spread(tokens[tokens > 0].view(1, -1, 1))
    assert torch.equal(spread[0, 0], numbers[0, :, :, 0])


def test_grids_of_patches_and_of_convolutions() -> None:
    grid = grid_of(vit(), "backbone.blocks.0.attn.qkv", 17, (8, 8))
    assert (grid.rows, grid.columns) == (4, 4)
    assert grid.order.tolist() == list(range(1, 17))  # without the class token
    network = add_experts(small_cnn(), experts=2, rank=2)
    name = next(name for name, module in network.named_modules() if hasattr(module, "sink"))
    grid = grid_of(network, name, 18, (12, 24))
    assert (grid.rows, grid.columns) == (3, 6)
    values = torch.arange(18.0).view(1, 18, 1)
    assert torch.equal(grid.spread(values)[0, 0], torch.arange(18.0).view(3, 6))
    with pytest.raises(UserError, match=r"the 15 tokens of layer .* do not form a grid over images of 8x8"):
        grid_of(network, name, 15, (8, 8))


# Fig. 8: training time


def validated(seconds: float, union: float) -> dict[str, Any]:
    robust = {"L1": union + 0.1, "L2": union}
    return {"event": "validation", "epoch": 1, "seconds": seconds, "clean": 0.9, "robust": robust, "union": union}


def logged(name: str, *log: dict[str, Any], experts: bool = True) -> Any:
    config = tiny() if experts else tiny(experts=None)
    return SimpleNamespace(name=name, config=config, run=SimpleNamespace(log=lambda: list(log)))


def test_curves_are_the_validations_and_say_when_the_others_peak_was_reached() -> None:
    ours = logged("ours", validated(10, 0.1), validated(20, 0.4), validated(30, 0.5))
    base = logged("base", validated(8, 0.2), validated(16, 0.35), validated(24, 0.3), experts=False)
    data = TrainingTime().measure([ours, base], Options())
    assert [[(p["seconds"], p["value"]) for p in run["points"]] for run in data["runs"]] == [
        [(10, 0.1), (20, 0.4), (30, 0.5)],
        [(8, 0.2), (16, 0.35), (24, 0.3)],
    ]
    assert data["reached"] == {"of": "base", "union": 0.35, "seconds": {"ours": 20, "base": 16}}
    first = TrainingTime().rows(data)[0]
    assert first["quantity"] == "union, held-out images"
    assert first["robust_L1"] == pytest.approx(0.2)


def test_a_union_under_other_threats_is_no_curve_beside_the_first() -> None:
    plain, other = (logged(name, validated(1, 0.2), validated(2, 0.5)) for name in ("plain", "other"))
    other.config = tiny(threats="cifar10")
    data = TrainingTime().measure([plain, other], Options())
    assert [run["name"] for run in data["runs"]] == ["plain"]
    assert data["left_out"] == {"other": "its validation has different data, threats or settings from that of plain"}


def test_names_of_runs_are_text_in_legends_and_beside_panels() -> None:
    names = ["_base", "$x^2$", r"a $\frac{"]
    canvas = TrainingTime().draw(TrainingTime().measure([logged(name, validated(1, 0.2)) for name in names], Options()))
    canvas.text(0, 0, side("one $a_1$ name"))
    canvas.draw_without_rendering()  # a formula that is none would raise
    drawn = [text.get_text() for text in [*canvas.legends[0].get_texts(), *canvas.texts]]
    assert [text.replace(r"\$", "$") for text in drawn] == [*names, "best union of _base", "one $a_1$ name"]
    assert not any("$" in text.replace(r"\$", "") for text in drawn)


def test_a_run_without_validation_shows_training_accuracy_and_says_so() -> None:
    natural = {"event": "epoch", "epoch": 1, "seconds": 5, "accuracy": {"clean": 0.9}}
    epoch = {"event": "epoch", "epoch": 2, "seconds": 9, "accuracy": {"L1": 0.3, "Linf": 0.5}}
    data = TrainingTime().measure([logged("old", natural, epoch), logged("new", validated(1, 0.2))], Options())
    assert [run["quantity"] for run in data["runs"]] == [
        "mean over threats, training images",
        "union, held-out images",
    ]
    assert [(p["seconds"], p["value"]) for p in data["runs"][0]["points"]] == [(9, pytest.approx(0.4))]
    labels = [text.get_text() for text in TrainingTime().draw(data).legends[0].get_texts()]
    assert labels == ["old (dashed: training accuracy)", "new"]
    with pytest.raises(UserError, match="log of empty has no finished epoch"):
        TrainingTime().measure([logged("empty")], Options())


# Fig. A3: sensitivity


def swept(monkeypatch: pytest.MonkeyPatch, *runs: tuple[dict[str, Any], float]) -> list[Any]:
    """Evaluated runs with these changes and unions."""
    made = [
        SimpleNamespace(config=tiny(**changes), report=SimpleNamespace(union=union, unions={}, suite="apgd", n=20))
        for changes, union in runs
    ]
    monkeypatch.setattr(sensitivity, "gather", lambda folders: made)
    return [SimpleNamespace(run=SimpleNamespace(folder=Path(str(i)))) for i in range(len(made))]


def test_one_key_at_a_time_gives_a_panel_each_and_the_base_is_in_both(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = swept(
        monkeypatch,
        ({}, 0.4),
        ({"seed": 1}, 0.5),
        ({"experts__rank": 8}, 0.3),
        ({"experts__experts": 3}, 0.2),
        ({"experts__experts": 3, "seed": 1}, 0.4),
    )
    data = Sensitivity().measure(runs, Options())
    assert [panel["key"] for panel in data["panels"]] == ["experts.experts", "experts.rank"]
    points = {panel["key"]: panel["curves"][0]["points"] for panel in data["panels"]}
    assert [len(panel["curves"]) for panel in data["panels"]] == [1, 1]
    assert [(p["value"], p["unions"]) for p in points["experts.experts"]] == [(2, [0.4, 0.5]), (3, [0.2, 0.4])]
    assert points["experts.experts"][1]["mean"] == pytest.approx(0.3)
    assert points["experts.experts"][1]["deviation"] == pytest.approx(0.02**0.5)
    assert [(p["value"], p["deviation"]) for p in points["experts.rank"]] == [(2, pytest.approx(0.005**0.5)), (8, None)]
    assert len(Sensitivity().rows(data)) == 4
    assert len(Sensitivity().draw(data).axes) == 2


def test_beside_other_attacks_the_union_is_that_of_the_balls(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = swept(monkeypatch, ({}, 0.4), ({"experts__rank": 8}, 0.3))
    for i, run in enumerate(sensitivity.gather([])):
        run.report.unions = {"lp": 0.6 + i / 10}
    (panel,) = Sensitivity().measure(runs, Options())["panels"]
    assert [point["mean"] for point in panel["curves"][0]["points"]] == [0.6, 0.7]


def test_a_grid_has_a_curve_for_every_other_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = swept(
        monkeypatch,
        *(({"experts__rank": rank, "method": method}, rank / 100) for rank in (2, 4) for method in ("max", "avg")),
    )
    (panel,) = Sensitivity().measure(runs, Options())["panels"]  # the method is no number
    assert panel["key"] == "experts.rank"
    assert {curve["others"]["method.kind"] for curve in panel["curves"]} == {"max", "avg"}
    assert [[p["mean"] for p in curve["points"]] for curve in panel["curves"]] == [[0.02, 0.04]] * 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{}, {"seed": 1}], "differ in no setting"),
        ([{}, {"method": "max"}], r"differ in method.kind.*no two of them in a single number"),
        ([{}, {"experts__rank": 4, "batch_size": 6}], "no two of them in a single number"),
    ],
)
def test_runs_that_are_no_sweep(changes: list[dict[str, Any]], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = swept(monkeypatch, *((change, 0.5) for change in changes))
    with pytest.raises(UserError, match=words):
        Sensitivity().measure(runs, Options())


def test_a_run_that_a_figure_leaves_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = []
    for name, gate in (("local", Local()), ("global", Global())):
        run = Run(tmp_path / name)
        config = tiny(model__patch_size=2, experts__experts=3, experts__gate=gate.dump(), name=name)
        run.prepare(config, resume=False, overwrite=False)
        save_model(vit(gate=gate), run.model_file, config=config.dump())
        folders.append(run.folder)
    write_figures(folders, tmp_path / "out", only=["fig7"], formats=["svg"])
    assert "fig7: global left out: layer backbone.blocks.1.attn.proj weights its experts" in capsys.readouterr().err
    drawn = (tmp_path / "out/fig7.svg").read_text()
    assert "local" in drawn
    assert "blocks.1.attn.proj" in drawn


def test_runs_and_threats_have_no_colour_in_common() -> None:
    threats = [look.colour for look in styles_of(["natural", *DIGITS, "a", "b", "c"]).values()]
    assert len({*threats, *RUNS}) == len(threats) + len(RUNS) == 14


def test_numbers_and_layers_are_written_short() -> None:
    assert [signed(value) for value in (-0.004, -0.006, 0.25)] == ["0.00", "\N{MINUS SIGN}0.01", "0.25"]
    assert [short(name) for name in ("backbone", "backbone.blocks.1.mlp", "layer4")] == [
        "the whole model",
        "blocks.1.mlp",
        "layer4",
    ]


def test_figures_of_a_run_are_written_with_their_data(tmp_path: Path) -> None:
    """From the folder of a run to files; a figure without data is left out unless it was asked for."""
    run = Run(tmp_path / "run")
    config = tiny(model__patch_size=2, experts__experts=3)
    model = vit()
    run.prepare(config, resume=False, overwrite=False)
    save_model(model, run.model_file, config=config.dump())
    lines = [{**validated(5.0, 0.2), "update": 5}, {**validated(9.0, 0.3), "update": 10}]
    run.log_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    written = write_figures([run.folder], tmp_path / "out", only=["fig7", "fig8"], formats=["svg"])
    assert [file.name for file in written] == ["fig7.svg", "fig8.svg"]
    assert "gate weight" in written[0].read_text()
    assert (tmp_path / "out/fig8.csv").read_text().count("\n") == 3
    with pytest.raises(UserError, match="figA3: "):
        write_figures([run.folder], tmp_path / "out", only=["figA3"])
    with pytest.raises(UserError, match="unknown device 'gpu0'; valid: auto, cuda, mps, cpu"):
        write_figures([run.folder], tmp_path / "out", device="gpu0")
    with pytest.raises(UserError, match=r"no figure 'fig2'\. Did you mean 'figA2'") as raised:
        write_figures([run.folder], tmp_path / "out", only=["fig2"])
    assert str(raised.value).count("fig5") == 1, "the names are told once"


# Table 6 and the others


def config_of(name: str, **changes: Any) -> Config:
    return load(folder() / f"{name}.yaml", [f"{key}={value}" for key, value in changes.items()])


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Costs by method and experts instead of measurements; the order in which they were asked for."""
    asked: list[str] = []

    def compare(configs: list[Config], *, repeats: int, timing: bool) -> list[dict[str, Any]]:
        facts = []
        for config in configs:
            rome = config.experts is not None
            asked.append("rome" if rome else "random")
            facts.append(
                {"name": config.name, "parameters": 2_000_000 + rome * 500_000, "macs": 3e9, "device": "cpu",
                 "batch_size": config.batch_size, "seconds_per_update": 2.0 + rome, "latency_ms": 1.0,
                 "latency_batch": config.batch_size, "latency_one_ms": 4.0, "latency_one_ratio": [1.0, 1.0, 1.0],
                 "update_ratio": [1 + 0.6 * rome, 1.0, 2.0], "latency_ratio": [1.0, 1.0, 1.0]}
            )  # fmt: skip
        return facts if timing else [{k: v for k, v in f.items() if k in ("name", "parameters", "macs")} for f in facts]

    monkeypatch.setattr(cost_table, "compare", compare)
    return asked


def test_table_6_measures_what_is_named_with_random_first(measured: list[str]) -> None:
    lines, about = fill_costs([config_of("digits/rome-random"), config_of("digits/random")])
    assert measured == ["random", "rome"]
    assert not any(line.measured for line in lines[:4]), "beside the paper's ViT-B"
    assert [line.section for line in lines[4:]] == [
        "Own runs: vit_tiny_patch16_224 on digits (L1 1, L2 0.35, Linf 0.1)"
    ] * 2
    papers = {line.label: line.cells for line in lines[:4]}
    cells = {line.label: line.cells for line in lines[4:]}
    assert cells["Ours"]["parameters_M"].values == (2.5,)
    assert cells["Ours"]["parameters_M"].ratio == pytest.approx(1.25)
    assert cells["Ours"]["seconds_per_update"].ratio == 1.6  # the median over rounds, not 3 / 2
    assert papers["Ours"]["seconds_per_update"].paper_ratio == pytest.approx(3.56 / 3.05)
    assert [cells[row]["seconds_per_update"].best for row in ("RANDOM", "Ours")] == [True, False]
    assert not cells["RANDOM"]["GMACs"].best, "both have the same"
    text = render("Table 6", lines, "text", about=about)
    assert re.search(r"Ours .* 3 \(1.60x\) ", text)
    assert re.search(r"MORE\s+– / 340.6 \(4.00x\)", text)  # noqa: RUF001
    assert "vit_tiny_patch16_224 on digits, updates of 32 images, latency per image in batches of 32, cpu" in text
    assert re.search(r"latency \(ms/img\)\s+of one image \(ms\)", text)


def test_table_6_without_random_has_no_ratios_and_without_timing_no_seconds(measured: list[str]) -> None:
    lines, _ = fill_costs([config_of("digits/rome-random")], timing=False)
    cells = lines[-1].cells
    assert np.isnan(cells["parameters_M"].ratio)
    assert cells["seconds_per_update"].values == ()


def test_table_6_refuses_what_cannot_be_compared(measured: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max matches no row of table 6"):
        fill_costs([config_of("digits/max")])
    with pytest.raises(UserError, match=r"different batch_size .*random 32, rome-random 16.*batch_size=\.\.\."):
        fill_costs([config_of("digits/random"), config_of("digits/rome-random", batch_size=16)])
    with pytest.raises(UserError, match="different attack cannot be compared"):
        fill_costs([config_of("digits/random"), config_of("digits/rome-random", **{"attack.steps": 3})])
    file = write_yaml(tmp_path / "tiny.yaml", TINY)
    Run(tmp_path / "run").prepare(tiny(name="kept"), resume=False, overwrite=False)
    found = named_configs([str(file), str(tmp_path / "run"), "batch_size=6"])
    assert [(config.name, config.batch_size) for config in found] == [("tiny", 6), ("kept", 6)]


class Cells(HTMLParser):
    """Numbers of cells of each row; every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[int] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        if tag == "tr":
            self.rows.append(0)
        if tag in ("td", "th"):
            self.rows[-1] += int(dict(attrs).get("colspan") or 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("number", TABLES)
def test_every_table_is_whole_in_every_format(number: str) -> None:
    """As many cells in each row as in the head; nothing in LaTeX that would not compile; dashes where runs miss."""
    lines = fill_costs([])[0] if number == "6" else fill(number, [])
    width = 1 + len(lines[0].cells)
    assert set(Cells(render("Table", lines, "html")).rows) == {width}
    markdown = [line for line in render("Table", lines, "markdown").splitlines() if line.startswith("|")]
    assert {line.count("|") for line in markdown} == {width + 1}
    package, latex = render("Table", lines, "latex").split("\n", 1)
    assert package == r"% \usepackage{booktabs,graphicx}"
    body = [line for line in latex.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert {line.count("&") - line.count(r"\&") for line in body} == {width - 1}
    fitting = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"  # never wider than the text
    assert latex.count(fitting) == 1
    latex = latex.replace(fitting, "{")
    assert not re.search(r"(?<!\\)[%#$_^~<>]", re.sub(r"\$(\\pm|<|>|\\ell_\w|\\ell_\\infty)\$", "", latex))
    assert latex.isascii()
    assert latex.count("{") == latex.count("}")
    assert render("Table", lines, "text").count("–") == len(lines) * (width - 1)  # noqa: RUF001


# By class


def report(labels: list[int], clean: list[int], robust: list[int]) -> Report:
    matrix = np.array([clean, robust], dtype=bool).T
    return Report(matrix, ("clean", "L2"), np.array(labels), np.arange(len(labels)), {"suite": {"kind": "apgd"}})


def test_by_class_counts_each_class_alone() -> None:
    labels = [2, 0, 2, 2, 0]
    one = report(labels, [1, 1, 1, 0, 1], [1, 0, 0, 1, 1])  # wrong without attack is wrong
    other = report(labels, [1, 1, 1, 1, 1], [1, 1, 1, 1, 1])
    zero, two = by_class([one, other], ["cat", "dog", "fox"])
    assert (zero.name, zero.n, two.name, two.n) == ("cat", 2, "fox", 3)
    assert zero.shares == [(1.0, 0.5), (1.0, 1.0)]
    assert two.shares == [pytest.approx((2 / 3, 1 / 3)), (1.0, 1.0)]
    assert [line.name for line in by_class([one])] == ["0", "2"]


def test_of_many_classes_the_hardest_are_shown_in_order() -> None:
    labels = list(range(30)) * 2
    robust = [int(label < 5 or label > 20) for label in labels[:30]] + [0] * 30
    found = by_class([report(labels, [1] * 60, robust)])
    assert len(found) == 20
    assert {str(label) for label in range(5, 21)} <= {line.name for line in found}
    assert [int(line.name) for line in found] == sorted(int(line.name) for line in found)
