"""Passes of updates and evaluations in closed form, and hours that were measured or are not named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from helpers.problems import case, rest_slow
from helpers.tiny_runs import changed, tiny
from rome.attacks import APGD, Attack
from rome.attacks.lp.autoattack import APGDCE, APGDT, Square
from rome.methods import Method
from rome.report import passes
from rome.report.check import check
from rome.report.passes import RATES, Passes, hours, of_evaluation, of_update
from rome.runs.config import Config, load
from rome.runs.experiments import folder
from rome.threats import CIFAR10


def test_passes_of_an_update_are_counted_for_every_method() -> None:
    """PGD of s steps takes s forwards and backwards, and training one; AVG does both for each of three threats."""
    assert of_update(tiny(attack={"kind": "pgd", "steps": 5})) == Passes(6, 5, 1)
    assert of_update(tiny(attack={"kind": "apgd", "steps": 5})) == Passes(7, 5, 1), "APGD looks at its end too"
    assert of_update(tiny(method="avg", attack={"kind": "pgd", "steps": 5})) == Passes(18, 15, 3)
    again = of_update(tiny(method="avg", attack={"kind": "pgd", "steps": 5}, activation_checkpointing=True))
    assert again == Passes(21, 15, 3), "blocks are computed once more"
    assert again.work == 21 + 15 + 2 * 3
    for kind, method in Method.members().items():
        if method.__module__.startswith("rome."):
            with case(kind):
                experts = {"kind": "more"} if method.own_experts else None
                features = {"features": "self"} if "features" in method.model_fields else {}
                settings = changed(experts=experts, method={"kind": kind, **features})
                found = of_update(Config.model_validate(settings))
                assert found is not None
                assert found.forward > 1 <= found.whole


ATTACKS: list[tuple[Attack, str]] = [
    (APGDCE(iterations=40), "Linf"), (Square(queries=60), "Linf"), (APGDCE(iterations=40), "L1"),
    (APGDT(iterations=40, targets=2), "L2"), (APGD(steps=30), "L2"),
]  # fmt: skip


@pytest.mark.parametrize(("attack", "norm"), rest_slow(ATTACKS, 2))
def test_passes_of_an_attack_are_those_that_it_makes(attack: Attack, norm: str) -> None:
    threat = CIFAR10[norm]
    counted = passes._of_attack(attack.model_dump_json(), threat.model_dump_json(), 10)
    assert counted == passes._run(attack, threat, 10)
    assert counted.forward >= attack.steps_for(threat)


def test_an_evaluation_is_the_sum_of_its_attacks(monkeypatch: pytest.MonkeyPatch) -> None:
    suite: dict[str, Any] = {"kind": "apgd", "iterations": 7}
    found = of_evaluation(tiny(evaluation={"suite": suite, "n": 20}, threats=[{"norm": "L2", "eps": 0.5}]), 10)
    assert found is not None
    assert found.backward == 8 + 9 * 8, "one start and 7 iterations, then towards each of 9 classes"
    assert not found.whole
    absent = {"suite": {"kind": "unseen", "features": "nowhere"}, "n": 20}
    assert of_evaluation(tiny(evaluation=absent), 10) is None


def test_arithmetic_of_training_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = dict.fromkeys(("state", "attack", "update", "training", "evaluation"), 1)
    monkeypatch.setattr("rome.report.check.peak_memory", lambda config: sizes)
    config = tiny(epochs=2, natural_epochs=1, attack={"kind": "pgd", "steps": 5})
    cost = check(config).cost
    assert cost["training_flops"] == 2 * cost["macs"] * 12 * 5 * ((6 + 5 + 2) + (1 + 2))
    evaluation = cost["evaluation"]
    assert cost["evaluation_flops"] == 2 * cost["macs"] * 20 * (evaluation["forward"] + evaluation["backward"])
    assert cost["training_hours"] is None


def test_hours_are_those_of_the_measured_rates_or_none() -> None:
    results = (Path(__file__).parents[2] / "docs" / "results.md").read_text(encoding="utf-8")
    for size, row in (("base", "ViT-B"), ("small", "ViT-S"), ("tiny", "ViT-Ti")):
        found = re.findall(
            rf"^\| {row} \| (?:64|192) \|.*?\((\d+)(?: TFLOP/s)?\) \|[^|]*?\((\d+)\)", results, re.MULTILINE
        )
        rates = [int(rate) for both in found for rate in both]
        assert (len(rates), (min(rates), max(rates))) == (4, RATES[size])
    config = load(folder() / "table1" / "rome-random-pgd.yaml")
    assert hours(config, 211e12 * 3600) == (211 / 250, 1)
    for change in ({"precision": "fp32"}, {"precision": "tf32"}, {"experts": None, "model": {"name": "resnet_18"}}):
        others = config.model_copy(update=change) if "model" not in change else tiny()
        assert hours(others, 1e15) is None


@pytest.mark.slow
def test_a_list_of_experiments_names_their_costs(rome: Any) -> None:
    ended = rome("list", "experiments", "digits/rome-random", "--cost")
    assert ended.code == 0
    row = next(line for line in ended.out.splitlines() if line.startswith("experiments/digits/rome-random.yaml"))
    assert "0.2321 M" in row or "0.232 M" in row
    assert row.count("FLOP") == 2
    assert "nothing was measured for other models" in " ".join(ended.out.split())
    assert rome("list", "models", "--cost").code == 2
