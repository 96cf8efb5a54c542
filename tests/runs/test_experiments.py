"""Every config that comes with rome loads, takes a step, and says what the paper found."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.problems import rest_slow
from helpers.tiny_runs import same
from rome.attacks import AttackThreat
from rome.data import Cifar10, ImageFolder
from rome.models import build_model
from rome.report.cost import count, measure, updates
from rome.runs.config import Config, load
from rome.runs.experiments import files, folder, listing
from rome.threats import CIFAR10, DIGITS, IMAGENET

FILES = {str(file.relative_to(folder()).with_suffix("")): file for file in files()}
SETTINGS = functools.cache(load)
_OTHERS = ("digits/", "table1/small/", "scratch/", "beyond/", "gpu/", "own-data")
FULL = [name for name in FILES if not name.startswith(_OTHERS)]
"""The paper's own settings."""

ARCHITECTURES = ("deit-b", "swin-b")
TABLE1 = """
PGD RANDOM        86.7 52.3 68.8 40.3 53.8 38.6
PGD AVG           86.3 52.2 67.5 38.9 52.9 37.9
PGD MAX           85.1 46.6 66.8 40.1 51.2 38.5
PGD MSD           84.7 43.9 67.3 40.5 50.6 38.3
PGD MORE          82.6 44.3 42.4 33.7 40.1 31.1
PGD RoME+RANDOM   88.1 56.4 69.7 42.1 56.1 41.1
PGD RoME+MAX      85.4 48.2 68.2 43.1 53.2 42.3
APGD RANDOM       86.5 50.1 69.3 37.5 52.3 37.2
APGD MAX          81.7 45.5 65.3 42.6 51.1 41.4
APGD E-AT         83.2 50.3 68.9 40.6 53.3 39.7
APGD RAMP         82.2 47.1 63.5 43.4 51.3 42.5
APGD RoME+RANDOM  87.4 54.7 71.6 40.0 55.4 39.4
APGD RoME+MAX     82.5 48.9 67.3 44.2 53.5 43.7
"""
"""CIFAR-10: clean, L1, L2, Linf, average, union, as the paper prints them."""
ROWS = {
    f"{attack} {method}": list(map(float, numbers))
    for attack, method, *numbers in map(str.split, TABLE1.strip().splitlines())
}


def config_of(name: str) -> Config:
    return SETTINGS(FILES[name])


def tiny(config: Config) -> Config:
    """The same training on a model and a batch so small that an update takes a moment."""
    models: dict[str, dict[str, Any]] = {
        "swin": {
            "img_size": 32,
            "patch_size": 4,
            "args": {"window_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [1, 1]},
        },
        "vit": {"img_size": 32, "patch_size": 8, "args": {"embed_dim": 32, "depth": 2, "num_heads": 2}},
        "robustbench:Debenedetti": {
            "name": "xcit_nano_12_p16_224",
            "img_size": 32,
            "args": {"depth": 1, "cls_attn_layers": 1},
        },
        "robustbench:": {"name": "wide_resnet", "args": {"depth": 10, "width": 1}},
    }
    models["deit"] = models["vit"]
    change = next(
        (models[start] for start in models if config.model.name.startswith(start)), {"args": config.model.args}
    )
    if config.data.kind == "digits":
        change = {"img_size": config.model.img_size, "patch_size": config.model.patch_size, "args": config.model.args}
    model = config.model.model_copy(update={"weights": None, "pretrained": False, "num_classes": None, **change})
    method: dict[str, Any] = {"steps": 1} if "steps" in type(config.method).model_fields else {}
    if "features" in type(config.method).model_fields:
        method["features"] = ("self",)
    return config.model_copy(
        update={
            "model": model,
            "batch_size": 6,
            "accumulate": 1,
            "device": "cpu",
            "natural_epochs": 0,
            "epochs": 2,
            "method": config.method.model_copy(update=method),
            "attack": config.attack.model_copy(update={"steps": 1}),
        }
    )


def test_the_experiments_are_those_that_were_promised() -> None:
    plain, both = {"random", "max"}, {"random", "rome-random", "max", "rome-max"}
    methods = {"avg", "msd", "eat", "ramp", "pat", "vr", *plain}
    digits = {f"digits/{name}" for name in methods | {f"rome-{name}" for name in methods} | {"more"}}
    pgd = {f"table1/{name}-pgd" for name in {*both, "avg", "msd", "more"}}
    apgd = {f"table1/{name}-apgd" for name in {*both, "eat", "ramp"}}
    hundred = {name.replace("table1/", "table1/imagenet100/") for name in pgd | apgd}
    without_more = (pgd | apgd) - {"table1/more-pgd"}
    others = {name.replace("table1", f"tableA1/{arch}") for arch in ARCHITECTURES for name in without_more}
    small = {f"table1/small/{name}" for name in both}
    models, rome = ("vit-b", "wrn-28-10", "wrn-94-16", "xcit-s"), ("", "rome-")
    tuned = {f"fine-tuning/{model}/{r}{name}" for model in models for r in rome for name in ("eat", "max", "ramp")}
    assert digits | pgd | apgd | hundred | others | small | tuned <= set(FILES)
    assert {"alexnet/cifar10", "digits/cnn", "fine-tuning/vit-b/linf"} <= set(FILES)
    assert {f"fine-tuning/{model}/eat-per-example" for model in models} <= set(FILES)
    rows = {f"{name}-{attack}" for name in both for attack in ("pgd", "apgd")}
    literal = {f"literal/{place}{row}" for place in ("", "imagenet100/") for row in rows}
    assert literal | {"literal/ffn", "literal/inverse", "literal/wrn-28-10/rome-ramp"} <= set(FILES)
    assert {f"beyond/{name}" for name in {*both, "avg", "stadv", "recoloradv"}} | {"digits/random-stadv"} <= set(FILES)
    tables = {f"table{number}" for number in ("2", "4", "5", "6", "A2", "A3", "A4", "A5")}
    assert tables | {"fig3", "figA3"} <= {name.partition("/")[0] for name in FILES}
    assert not any(name.rpartition("/")[2].startswith("_") for name in FILES)


def test_a_name_says_what_is_in_the_file() -> None:
    for name, file in FILES.items():
        config, parts = config_of(name), file.stem.split("-")
        assert config.name == file.stem, name
        assert config.about, name
        named = name.partition("/")[0] in ("digits", "table1", "tableA1", "tableA2", "fine-tuning", "scratch", "table2")
        if named and "/study/" not in name:
            assert bool({"rome", "more", "moe"} & set(parts)) == (config.experts is not None), name
            alone = config.natural_epochs == config.epochs or parts == ["linf"]
            assert config.method.kind in parts or alone, name
        tuned = name.startswith(("fine-tuning/", "scratch/", "literal/wrn")) and parts != ["linf"]
        assert config.attack.kind == ("apgd" if "apgd" in parts or tuned else "pgd"), name
        budgets = DIGITS if name.startswith("digits/") else CIFAR10
        budgets = IMAGENET if isinstance(config.data, ImageFolder) else budgets
        balls = tuple(threat for threat in config.threats if not isinstance(threat, AttackThreat))
        own = {threat.attack.kind for threat in config.threats if isinstance(threat, AttackThreat)}
        if name.startswith("beyond/"):
            alone = {"stadv", "recoloradv"} & set(parts)
            assert own == (alone or {"stadv", "recoloradv"}), name
            assert balls == (() if alone else (CIFAR10["Linf"], CIFAR10["L2"])), name
        else:
            assert own == {"stadv"} & set(parts), name
            assert balls == (tuple(budgets) if parts != ["linf"] else (CIFAR10["Linf"],)), name


def stepping() -> list[str]:
    """Files that together hold every method on every backbone, with and without experts, every kind of experts, and
    every attack and threat with each kind of method. A DeiT is a ViT, both ResNets are one."""
    same = {"deit": "vit", "preact": "resnet"}
    chosen, seen = [], set[tuple[Any, ...]]()
    for name in FILES:
        config = config_of(name)
        method, experts, family = config.method.kind, config.experts, config.model.name.partition("_")[0]
        what: set[tuple[Any, ...]] = {
            (method, same.get(family, family), experts is not None),
            (method, config.attack.kind, *(getattr(threat, "attack", threat).kind for threat in config.threats)),
        }
        if experts is not None:
            kinds = {key: value["kind"] if isinstance(value, dict) else value for key, value in experts.dump().items()}
            what.add(tuple(str(kinds.get(key)) for key in ("kind", "gate", "regularizer", "layers", "projection")))
        if what - seen:
            chosen.append(name)
            seen |= what
    return chosen


@pytest.mark.parametrize("name", rest_slow(stepping(), 34))
def test_experiments_take_a_step(name: str) -> None:
    config = tiny(config_of(name))
    shape = (1, 8, 8) if config.data.kind == "digits" else (3, 32, 32)
    if config.model.name in ("resnet_18", "preact_resnet_18"):
        shape = (3, 8, 8)  # they are as wide as ever
    torch.manual_seed(0)
    model = build_model(config.model, config.experts, classes=10, shape=shape)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for update, _ in updates(config, model, shape, 10, torch.device("cpu")):
        update()
    after = model.state_dict()
    assert all(bool(value.isfinite().all()) for value in after.values())
    assert not same(before, after)
    learning = [key for key, value in model.named_parameters() if value.requires_grad]
    assert sum(not torch.equal(before[key], after[key]) for key in learning) > len(learning) / 2


def test_table_1_has_the_papers_numbers_in_the_right_file() -> None:
    papers = [config_of(name) for name in FILES if name.startswith("table1/") and "/i" not in name]
    for row, numbers in ROWS.items():
        (config,) = [config for config in papers if config.paper is not None and config.paper.row == row]
        assert config.paper is not None
        assert config.paper.table.startswith("Tables 1"), row
        names = ["clean", "L1", "L2", "Linf", "average", "union"]
        assert list(config.paper.numbers.items())[:6] == list(zip(names, numbers, strict=True)), row
        attack, method = row.split()
        assert config.attack.kind == attack.lower(), row
        assert config.method.kind == method.removeprefix("RoME+").lower().replace("-", ""), row
        assert (config.experts is not None) == (method.startswith("RoME+") or method == "MORE"), row


def test_the_papers_numbers_contradict_themselves_nowhere() -> None:
    """Average is the mean of the three, the union below each: a slip in copying would show."""
    papers = {name: config_of(name).paper for name in FULL}
    checked = 0
    for name, paper in papers.items():
        if paper is not None and {"average", "L1"} <= set(paper.numbers):
            values = [paper.numbers[key] for key in ("L1", "L2", "Linf")]
            assert np.mean(values) == pytest.approx(paper.numbers["average"], abs=0.11), name
            assert paper.numbers["union"] <= min(values), name
            checked += 1
    assert checked


def test_they_train_as_the_paper_trains() -> None:
    """5.1 and A1: optimizer, learning rates, epochs, batches, patches, steps, and K=4 experts of rank 16."""
    for name in FULL:
        config = config_of(name)
        steps = [config.attack.steps_for(threat) for threat in config.threats] if not config.method.own_attack else []
        tuned = name.startswith(("fine-tuning/", "literal/wrn")) and not name.endswith("/linf")
        if not name.startswith(("fine-tuning/", "literal/wrn", "alexnet/")):
            assert config.precision == ("fp32" if name.startswith("literal/") else "bf16"), name
        if name.startswith("alexnet/"):
            continue
        if tuned:
            assert config.epochs == (1 if isinstance(config.data, ImageFolder) else 3), name
            assert steps == ([15, 5, 5] if isinstance(config.data, ImageFolder) else [10, 10, 10]), name
            factors = [round(config.schedule.factor(share), 6) for share in (0.1, 0.34, 0.5, 0.67, 1)]
            assert factors == [1, 0.1, 0.1, 0.01, 0.01], name
            continue
        assert config.optimizer.kind == "adamw", name
        factors = [config.schedule.factor(share) for share in (0.2, 0.8, 1)]
        assert factors == pytest.approx([1, 0.05, 0.001]) or "more" in name, name
        trained = (config.epochs, config.batch_size, config.optimizer.lr)
        if isinstance(config.data, Cifar10):
            assert trained == (40 if "more" in name else 20, 64, 1e-3), name
            assert (config.model.img_size, config.model.patch_size) == (32, 4), name
            expected = {"pgd": [10] if len(steps) == 1 else [20, 20, 10], "apgd": [15, 15, 15]}
        else:
            assert trained == (10 if "more" in name else 5, 128, 1e-4), name
            assert isinstance(config.data, ImageFolder), name
            expected = {"pgd": [40, 20, 10], "apgd": [15, 15, 15]}
        assert not steps or steps == expected[config.attack.kind], name
        assert config.evaluation.suite.kind == "autoattack", name


def test_the_papers_experts() -> None:
    """K=4, r=16 on QKV and output, lambda .1, s=4, b=2, K'=100 (5.1)."""
    for name in FULL:
        config = config_of(name)
        if "rome-" in name and config.experts is not None:
            dump, literal = config.experts.dump(), name.startswith("literal/")
            assert (dump["experts"], dump["rank"], dump["projection_dim"]) == (4, 16, 100)
            assert dump["projection"] == ("trainable" if literal else "frozen")
            assert dump["regularizer"]["mean_over"] == ("blocks" if literal else "layers")
            assert dump["alpha"] == (1 if "/wrn" in name and literal else None)  # loralib's default, on convolutions
            assert list(dump["layers"] or ("qkv", "proj")) == ["qkv", "proj"]
            assert (dump["gate"]["kind"], dump["gate"]["s"], dump["gate"]["b"]) == ("dual-scale", 4.0, 2.0)
            assert (dump["regularizer"]["kind"], dump["regularizer"]["weight"]) == ("diversification", 0.1)


def test_comparisons_differ_in_what_they_compare_alone() -> None:
    """A RoME config and its baseline differ in the experts and nothing else that is trained."""
    for name in FILES:
        if "rome-" in name and name.replace("rome-", "") in FILES:
            free = {"name": "", "about": "", "paper": None, "experts": None}
            ours, baseline = config_of(name), config_of(name.replace("rome-", ""))
            assert ours.model_copy(update=free) == baseline.model_copy(update=free), name


LITERAL = {
    "model": {"name": "vit_base_patch16_224.augreg_in1k"},
    "precision": "fp32",
    "method": {"per": "batch"},
    "evaluation": {"routing": "inverse-unscaled"},
    "experts": {"projection": "trainable", "start": "random", "alpha": 1, "regularizer": {"mean_over": "blocks"}},
}
"""What the paper says to the letter and the rows of its tables do otherwise."""


def test_the_literal_configs_differ_from_the_papers_rows_in_what_is_literal() -> None:
    def compare(one: dict[str, Any], other: dict[str, Any], literal: dict[str, Any]) -> int:
        assert one.keys() == other.keys()
        changed = 0
        for key in one:
            if one[key] == other[key] or (key in ("name", "about") and literal is LITERAL):
                continue
            if isinstance(literal.get(key), dict):
                changed += compare(one[key], other[key], literal[key])
            else:
                assert one[key] == literal[key], key
                changed += 1
        return changed

    for name in FILES:
        if name.startswith("literal/"):
            origins = ("table1", "table4", "table5", "fine-tuning")
            rows = [name.replace("literal", origin).replace("-per-batch", "") for origin in origins]
            found, expected = (config_of(one).model_dump(mode="json") for one in (name, next(filter(FILES.get, rows))))
            assert compare(found, expected, LITERAL) >= (2 if "rome" not in name else 3), name


def test_the_listing_names_every_file_and_the_papers_numbers() -> None:
    rows = dict(listing())
    assert [Path(path).name for path in rows] == [file.name for file in files()]
    text = next(text for path, text in rows.items() if path.endswith("table1/rome-max-pgd.yaml"))
    assert "RoME+MAX" in text
    assert "clean 85.4, L1 48.2, L2 68.2, Linf 43.1, average 53.2, union 42.3" in text


@pytest.mark.parametrize(
    ("pattern", "millions"),
    [
        ("imagenet100/random-pgd", {"random-pgd": 85.88}),
        ("fine-tuning/wrn-28-10/*eat.yaml", {"eat": 36.48, "rome-eat": 46.52}),
        ("xcit-s/ramp", {"ramp": 26.25}),
    ],
)
def test_parameters_need_neither_images_nor_robustbench(
    pattern: str, millions: dict[str, float], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Published sizes: ViT-B/16 85.88M with 100 classes, WRN-28-10 36.48M, XCiT-S12/16 26.25M; only what is
    asked for is counted. Beside a convolution of n to m channels RoME has K r c (c n + c m) parameters and gates."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "robustbench", None)
    assert {path.stem: round(count(load(path))["parameters"] / 1e6, 2) for path in files(pattern)} == millions


@pytest.mark.slow
def test_parameters_of_table_6() -> None:
    counted = {path.stem: measure(load(path), timing=False)["parameters"] for path in files("table6")}
    millions = {name: round(number / 1e6, 2) for name, number in counted.items()}
    assert millions == {"random": 85.15, "rome": 88.85, "moe-ffn": 255.2, "more": 340.6}
