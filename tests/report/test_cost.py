"""What a config costs, against the paper's Table 6 and against counting by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from helpers.problems import rest_slow
from helpers.replay import Replay
from helpers.tiny_runs import tiny
from rome.cli.app import main
from rome.core.graphs import Graphs
from rome.models import Classifier
from rome.report import cost
from rome.report.cost import macs, measure, parameters
from rome.runs import optim
from rome.runs.experiments import folder


@pytest.mark.parametrize(
    ("name", "expected", "gmacs"),
    rest_slow([("rome-random-pgd", 88_850_602, "5.84"), ("random-pgd", 85_152_010, "5.60")], 1),
)
def test_vit_b_costs_what_the_paper_says(
    name: str, expected: int, gmacs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Table 6: 85.15 and 88.85 million parameters, 5.61 and 5.84 G (the paper's 5.61 counts norms too)."""
    monkeypatch.setattr("rome.report.cost.peak_memory", lambda config: {"training": 1})
    with pytest.raises(SystemExit) as ended:
        main(["cost", str(folder() / "table1" / f"{name}.yaml"), "--no-timing", "--json"])
    assert ended.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == expected
    assert facts["memory"] == {"training": 1}
    assert facts["parameters"] - facts["experts"] == 85_152_010
    assert f"{facts['macs'] / 1e9:.2f}" == gmacs
    # each of the 24 frozen projections is a Linear(4, 100)
    assert facts["parameters"] - facts["trainable"] == (24 * 500 if facts["experts"] else 0)


TOKENS, WIDTH, DEPTH = 5, 16, 2
"""An 8x8 image in patches of 4, and the class token."""


@pytest.mark.parametrize(("experts", "rank"), [(0, 0), (2, 2), (3, 4)])
def test_multiply_accumulates_and_parameters_in_closed_form(experts: int, rank: int) -> None:
    d, t = WIDTH, TOKENS
    block = t * d * 3 * d + 2 * t * t * d + t * d * d + 2 * t * d * 4 * d
    macs = 4 * 16 * d + DEPTH * block + d * 10
    added = 0
    for d_out in (3 * d, d) if experts else ():
        codes, scores = experts * rank, 2 * experts
        macs += DEPTH * (t * d * (codes + scores) + t * codes * d_out)
        # A, B, two gates with bias, the projection with bias
        added += DEPTH * (codes * d + d_out * codes + 2 * (d * experts + experts) + experts * 100 + 100)
    config = tiny(experts={"experts": experts, "rank": rank} if experts else None)
    facts = measure(config, timing=False)
    assert facts["macs"] == macs
    assert facts["experts"] == added
    assert facts["parameters"] == measure(tiny(experts=None), timing=False)["parameters"] + added
    assert set(facts) == {"name", "parameters", "trainable", "experts", "macs"}


def test_parameters_that_do_not_train_are_told_apart() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    model[0].requires_grad_(False)
    total = 4 * 27 + 4 + 8 + 4 * 36 * 5 + 5
    assert parameters(model) == {"parameters": total, "trainable": total - 112, "experts": 0}
    assert macs(model.eval(), (3, 8, 8)) == 36 * 4 * 27 + 4 * 36 * 5


def test_pretrained_and_starting_weights_are_not_needed() -> None:
    facts = measure(tiny(model__pretrained=True, model__weights="nowhere.safetensors"), timing=False)
    assert facts["parameters"] == measure(tiny(), timing=False)["parameters"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 2},
        {"method": "max", "precision": "bf16"},
        {"method": {"kind": "msd", "steps": 2}},
        {"method": "eat", "accumulate": 2},
        {"method": "ramp", "precision": "bf16"},
        {"method": {"kind": "ramp", "trades": 6}, "accumulate": 2, "experts": None},
    ],
)
def test_timing_runs_whole_updates(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from rome.methods import Method

    batches: list[tuple[int, ...]] = []
    method = tiny(**changes).method
    loss = type(method).loss

    def spy(self: Method, setting: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        batches.append(tuple(x.shape))
        return loss(self, setting, x, y)

    monkeypatch.setattr(type(method), "loss", spy)
    config = tiny(**changes)
    facts = measure(config, repeats=2)
    assert config == tiny(**changes), "the config's method has learnt nothing"
    parts = changes.get("accumulate", 1)
    assert batches == [(12 // parts, 1, 8, 8)] * (3 * parts), "one to warm up and two to time"
    assert facts["seconds_per_update"] > 0
    assert facts["latency_ms"] > 0
    assert facts["latency_one_ms"] > 0
    assert facts["latency_batch"] == 12 // parts
    assert facts["batch_size"] == 12


def test_latency_is_a_batchs_by_its_images_beside_that_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands still but while the model runs, a second for every pass and one for every image."""
    now, sizes = [0.0], set()
    forward = Classifier.forward

    def spy(self: Classifier, x: torch.Tensor) -> torch.Tensor:
        now[0] += 1 + len(x)
        sizes.add(len(x))
        return forward(self, x)

    monkeypatch.setattr(Classifier, "forward", spy)
    monkeypatch.setattr("rome.report.cost.time.perf_counter", lambda: now[0])
    facts = measure(tiny(batch_size=12, accumulate=2), repeats=1)
    assert {1, 6} <= sizes
    assert facts["latency_one_ms"] == pytest.approx(2000)
    assert facts["latency_ms"] == pytest.approx(1000 * 7 / 6)


def test_precision_and_compilation_are_those_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    seen: set[str] = set()
    forward = Classifier.forward

    def spy(self: Classifier, x: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_float32_matmul_precision())
        return forward(self, x)

    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    monkeypatch.setattr(Classifier, "forward", spy)
    before = torch.get_float32_matmul_precision()
    measure(tiny(compile=True, precision="tf32"), repeats=1)
    assert len(compiled) == 2  # the two blocks
    assert "high" in seen
    assert torch.get_float32_matmul_precision() == before
    measure(tiny(), repeats=1)
    assert len(compiled) == 2  # the two blocks


def test_updates_are_replayed_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = Replay()
    monkeypatch.setattr(optim, "fuses", lambda model: True)
    monkeypatch.setattr(cost, "graphs_for", lambda config, device: Graphs(capture=replay))
    facts = measure(tiny(experts=None), repeats=2)
    assert replay.captures == 1
    assert replay.replays == 1 + cost.CAPTURES + 2 - 2  # one to compare; the first two updates are not replayed
    assert facts["seconds_per_update"] > 0
