"""The schema of configs: as the code is, true of every experiment, and false of what is mistyped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.problems import case
from rome.attacks import Attack
from rome.attacks.suites import Suite
from rome.core.component import Component
from rome.core.plain_data import parse_yaml
from rome.data import Data
from rome.experts import Experts, Gate, Regularizer
from rome.methods import Method
from rome.runs.config import Config
from rome.runs.experiments import folder
from rome.runs.loggers import Logger
from rome.runs.optim import Optimizer
from rome.runs.schema import schema
from rome.threats import Threat

FAMILIES: list[type[Component]] = [
    Attack, Method, Experts, Gate, Regularizer, Data, Suite, Threat, Logger, Optimizer
]  # fmt: skip


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return schema()


@pytest.fixture(scope="module")
def validator(made: dict[str, Any]) -> Any:
    draft7 = pytest.importorskip("jsonschema").Draft7Validator
    draft7.check_schema(made)
    return draft7(made)


def mistakes(validator: Any, text: str) -> Iterator[str]:
    """Of a file with data and a model, and this in it."""
    data = {"data": "digits", "model": {"name": "resnet18"}, **parse_yaml(text)}
    return (error.message for error in validator.iter_errors(data))


def test_the_file_beside_the_experiments_is_up_to_date(made: dict[str, Any]) -> None:
    written = json.loads((folder() / "schema.json").read_text(encoding="utf-8"))
    assert written == made, "write it anew: rome schema --out experiments/schema.json"


def test_every_setting_of_every_component_is_there_and_its_default_too(made: dict[str, Any]) -> None:
    assert list(made["properties"]) == ["extends", *Config.model_fields]
    for family in FAMILIES:
        for kind, member in family.members().items():
            if not member.__module__.startswith("rome."):
                continue  # of another test
            with case(f"{family.__name__} {kind}"):
                found = made["definitions"][f"{family.__name__}.{kind}"]
                assert list(found["properties"]) == ["kind", *member.model_fields]
                assert found["description"].startswith(member.summary()[:40].replace("``", "`"))
    assert made["definitions"]["Attack.pgd"]["properties"]["percentile"]["default"] == 99
    assert made["definitions"]["Experts.low-rank"]["properties"]["gate"]["default"] == "dual-scale"
    assert "radius" in made["definitions"]["Threat.lp"]["properties"]["eps"]["description"]
    undescribed = [key for key, value in made["properties"].items() if "description" not in value]
    assert not undescribed


def test_every_experiment_names_the_schema_and_keeps_to_it(validator: Any) -> None:
    files = sorted(folder().rglob("*.yaml"))
    assert len(files) > 250
    for file in files:
        with case(str(file)):
            text = file.read_text(encoding="utf-8")
            start, _, name = text.partition("\n")[0].partition("$schema=")
            assert start == "# yaml-language-server: "
            assert (file.parent / name).resolve() == folder() / "schema.json"
            data = parse_yaml(text)
            if file.name.startswith("_"):  # a part of others
                data.setdefault("extends", "another")
            assert [error.message for error in validator.iter_errors(data)] == []


RIGHT = """
attack: apgd
attack: {kind: pgd, steps: {L1: 20, Linf: 10}}
attack: {steps: 5}
threats: cifar10
threats: [{norm: linf, eps: 8/255}, {kind: attack, attack: {kind: stadv, steps: 10}}]
optimizer: {kind: sgd, lr: 1e-3, momentum: 0}
experts: null
experts: low-rank
experts: {kind: low-rank, layers: qkv, gate: local, regularizer: {kind: diversification, weight: 1/2}}
evaluation: {suite: "apgd,unseen", batch_size: auto}
evaluation: {suite: [apgd, {kind: corruptions, types: [fog]}]}
loggers: csv
loggers: [tensorboard, {kind: wandb, tags: [a, b]}]
loggers: []
validation: {n: 100}
"""
WRONG = """
epohcs: 3
epochs: 0
epochs: many
device: gpu
attack: pdg
attack: {kind: pdg}
attack: {stpes: 3}
attack: {kind: pgd, stpes: 3}
attack: {kind: apgd, random_start: true}
threats: cifar
threats: [{norm: L3, eps: 1}]
threats: [{norm: linf, eps: 8 of 255}]
threats: [{norm: linf, eps: -1}]
threats: [{kind: attack, attack: {kind: stdv}}]
optimizer: {lr: 0}
optimizer: {kind: sgd, betas: [0.9, 0.99]}
optimizer: {betas: [0.9]}
experts: {kind: low-rank, rank: 0}
experts: {kind: low-rank, gate: {kind: dual-sclae}}
evaluation: {suite: [apgd, unsen]}
loggers: [wandbb]
validation: {epochs: 3}
model: {nmae: x}
"""


def test_what_configs_may_say_is_valid_and_what_they_may_not_is_not(validator: Any) -> None:
    for text in filter(None, RIGHT.split("\n")):
        with case(text):
            assert list(mistakes(validator, text)) == []
    for text in filter(None, WRONG.split("\n")):
        with case(text):
            assert list(mistakes(validator, text))
    assert validator.is_valid({"extends": "other.yaml"})
    assert not validator.is_valid({"data": "digits"})


def test_components_of_ones_own_are_in_a_schema_that_imports_them(
    made: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rooms_logger.py").write_text(
        "from rome.runs.loggers.csv import Csv\n\n\nclass Blackboard(Csv):\n"
        '    """Chalk."""\n\n    kind = "toy-blackboard"\n    colour: str = "white"\n    """Of the chalk."""\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = schema(["my_rooms_logger"])["definitions"]
    assert found["Logger.toy-blackboard"]["properties"]["colour"] == {
        "type": "string", "description": "Of the chalk.", "default": "white"
    }  # fmt: skip
    assert "Logger.toy-blackboard" not in made["definitions"]


def test_a_users_settings_do_not_replace_those_of_rome_with_the_same_name(
    made: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_evaluation.py").write_text(
        "from rome.core.component import Settings\n\n\nclass Evaluation(Settings):\n    colour: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert schema(["my_evaluation"])["definitions"]["Evaluation"] == made["definitions"]["Evaluation"]
