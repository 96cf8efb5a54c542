"""Every config that comes with rome loads, trains, and says what the paper found."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rome.config import load
from rome.data import Cifar10
from rome.experiments import files, folder, listing
from rome.models import build_model
from rome.threats import CIFAR10, DIGITS
from rome.train import train
from tiny_runs import same, updates, weights

FILES = {str(file.relative_to(folder()).with_suffix("")): file for file in files()}

TABLE1 = """
PGD RANDOM        86.7 52.3 68.8 40.3 53.8 38.6
PGD AVG           86.3 52.2 67.5 38.9 52.9 37.9
PGD MAX           85.1 46.6 66.8 40.1 51.2 38.5
PGD MORE          82.6 44.3 42.4 33.7 40.1 31.1
PGD RoME+RANDOM   88.1 56.4 69.7 42.1 56.1 41.1
PGD RoME+MAX      85.4 48.2 68.2 43.1 53.2 42.3
APGD RANDOM       86.5 50.1 69.3 37.5 52.3 37.2
APGD MAX          81.7 45.5 65.3 42.6 51.1 41.4
APGD RoME+RANDOM  87.4 54.7 71.6 40.0 55.4 39.4
APGD RoME+MAX     82.5 48.9 67.3 44.2 53.5 43.7
"""
"""CIFAR-10: clean, L1, L2, Linf, average, union, as the paper prints them."""
ROWS = {
    f"{attack} {method}": list(map(float, numbers))
    for attack, method, *numbers in map(str.split, TABLE1.strip().splitlines())
}


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the Hub's CIFAR-10, with 24 images of noise in each split."""
    path = tmp_path_factory.mktemp("cifar10")
    chance = np.random.default_rng(0)

    def png() -> bytes:
        file = io.BytesIO()
        Image.fromarray(chance.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        return file.getvalue()

    for split in ("train", "test"):
        table = pa.table({"img": [{"bytes": png()} for _ in range(24)], "label": [i % 10 for i in range(24)]})
        pq.write_table(table, path / f"{split}-0.parquet")
    return path


def test_the_experiments_are_those_that_were_promised() -> None:
    methods = {"random", "rome-random", "max", "rome-max"}
    digits = {f"digits/{name}" for name in {*methods, "avg", "more"}}
    pgd = {f"table1/{name}-pgd" for name in {*methods, "avg", "more"}}
    apgd = {f"table1/{name}-apgd" for name in methods}
    small = {f"table1/small/{name}" for name in methods}
    perceptual = {f"digits/{name}" for name in ("cnn", "pat", "vr", "rome-pat", "rome-vr")} | {"alexnet/cifar10"}
    assert digits | pgd | apgd | small | perceptual <= set(FILES)
    assert not any(name.rpartition("/")[2].startswith("_") for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_name_says_what_is_in_the_file(name: str) -> None:
    config = load(FILES[name])
    parts = config.name.split("-")
    assert config.name == FILES[name].stem
    assert ("rome" in parts or "more" in parts) == (config.experts is not None)
    assert config.method.kind in parts or config.natural_epochs == config.epochs
    assert config.attack.kind == ("apgd" if "apgd" in parts else "pgd")
    assert config.threats == tuple(DIGITS if name.startswith("digits/") else CIFAR10)
    assert config.about


@pytest.mark.parametrize("name", FILES)
def test_every_experiment_takes_a_step(name: str, cifar10: Path, tmp_path: Path) -> None:
    if name.startswith("alexnet/"):
        pytest.importorskip("rome.backbones")
    given = load(FILES[name])
    overrides = ["epochs=1", "natural_epochs=0", "batch_size=12", "data.train_limit=12", "device=cpu"]
    overrides += ["model.pretrained=false", "model.weights=null", "attack.steps=2"]
    if given.model.name.startswith("vit"):
        overrides.append("model.args={embed_dim: 24, depth: 1, num_heads: 2}")
    if given.data.kind == "cifar10":
        overrides.append(f"data.path={cifar10}")
    if load(FILES[name]).method.kind == "more":
        overrides += ["epochs=2"]  # of its experts, of their gate
    if given.method.own_attack == "fast-lpa":
        overrides.append("method.features=self")  # the other network would have to be trained first
    config = load(FILES[name], overrides)
    run = train(config, tmp_path / "run")
    for line in updates(run.log()):
        assert np.isfinite(line["loss"])
        assert ("regularizer" in line) == (config.experts is not None and config.experts.regularizer is not None)
    split = config.data.open("train")
    start = build_model(config.model, config.experts, classes=len(split.classes), shape=split.shape)
    assert not same(weights(run.folder), dict(start.state_dict()))


@pytest.mark.parametrize("row", ROWS)
def test_table_1_has_the_papers_numbers_in_the_right_file(row: str) -> None:
    (config,) = [config for config in map(load, files()) if config.paper is not None and config.paper.row == row]
    assert config.paper is not None
    assert config.paper.table == "Table 1"
    assert list(config.paper.numbers.items()) == list(
        zip(["clean", "L1", "L2", "Linf", "average", "union"], ROWS[row], strict=True)
    )
    attack, method = row.split()
    assert config.attack.kind == attack.lower()
    assert config.method.kind == method.removeprefix("RoME+").lower()
    assert (config.experts is not None) == (method == "MORE" or method.startswith("RoME+"))


def test_no_other_config_claims_a_row_of_the_paper() -> None:
    claimed = [config.paper.row for config in map(load, files()) if config.paper is not None]
    assert sorted(claimed) == sorted(ROWS)


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("table1/") and "small" not in name])
def test_table_1_is_trained_as_the_paper_trains(name: str) -> None:
    """5.1: AdamW, 1e-3, 20 epochs (MORE: twice), batch 64; PGD 20/20/10 and APGD; K=4 experts of rank 16 on QKV and
    output."""
    config = load(FILES[name])
    assert isinstance(config.data, Cifar10)
    stages = config.method.stages(range(config.epochs))
    assert [len(stage) for stage in stages] == [20] * (2 if config.method.kind == "more" else 1)
    for stage in stages:  # warm-up to 1 at a fifth, .05 at four fifths, .001 at the end, in each of them
        factors = [config.schedule.factor((stage.start + epoch) / config.epochs) for epoch in (4, 16, 20)]
        assert factors == pytest.approx([1, 0.05, 0.001])
    assert (config.natural_epochs, config.batch_size, config.accumulate) == (0, 64, 1)
    assert (config.optimizer.kind, config.optimizer.lr) == ("adamw", 1e-3)
    assert (config.model.img_size, config.model.patch_size, config.model.pretrained) == (32, 4, True)
    assert config.model.name.startswith("vit_base_patch16_224")
    assert config.evaluation.suite.kind == "autoattack"
    if config.attack.kind == "pgd":
        assert [config.attack.steps_for(threat) for threat in CIFAR10] == [20, 20, 10]
    if config.experts is not None and config.experts.kind == "more":
        assert config.experts.dump() == {"kind": "more", "regularizer": None, "experts": 3}
    elif config.experts is not None:
        dump = config.experts.dump()
        assert (dump["experts"], dump["rank"], list(dump["layers"])) == (4, 16, ["qkv", "proj"])
        gate = {"kind": "dual-scale", "s": 4.0, "b": 2.0, "coefficient": "adaptive", "pool": "mean"}
        assert dump["gate"] == gate
        assert (dump["regularizer"]["weight"], dump["projection_dim"], dump["projection"]) == (0.1, 100, "frozen")


def test_comparisons_differ_in_what_they_compare_alone() -> None:
    """A RoME config and its baseline differ in the experts and nothing else that is trained."""
    for name, file in FILES.items():
        baseline = FILES.get(name.replace("rome-", ""))
        if "rome-" in name and baseline is not None:
            free = {"name": "", "about": "", "paper": None, "experts": None}
            assert load(file).model_copy(update=free) == load(baseline).model_copy(update=free), name


def test_the_listing_names_every_file_and_the_papers_numbers() -> None:
    rows = dict(listing())
    assert [Path(path).name for path in rows] == [file.name for file in files()]
    text = next(text for path, text in rows.items() if path.endswith("table1/rome-max-pgd.yaml"))
    assert "RoME+MAX" in text
    assert "clean 85.4, L1 48.2, L2 68.2, Linf 43.1, average 53.2, union 42.3" in text
