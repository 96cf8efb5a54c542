"""The dry run names every layer once, with experts or without, and adds up to what the model costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from helpers.tiny_runs import tiny
from rome.core.errors import UserError
from rome.models import build_model
from rome.report.cost import measure, plan
from rome.runs.config import Config

OWN = """
from torch import nn

def net(num_classes, width=12):
    features = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten())
    blocks = nn.Sequential(*(nn.Sequential(nn.Linear(64 if i == 0 else width, width), nn.ReLU()) for i in range(3)))
    return nn.Sequential(features, blocks, nn.Linear(width, num_classes))
"""


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "own.py").write_text(OWN)
    return {"name": f"{tmp_path / 'own.py'}:net"}


def linear(d_in: int, d_out: int, experts: int = 2, rank: int = 2) -> int:
    """Parameters beside a Linear layer: A, B, two gates with bias, the projection to 100 with bias."""
    return rank * experts * (d_in + d_out) + 2 * (d_in + 1) * experts + (experts + 1) * 100


def every_layer(config: Config) -> dict[str, list[int]]:
    shape, classes = config.data.form()
    plain = build_model(config.model, None, classes=classes, shape=shape)
    return {n: list(m.weight.shape) for n, m in plain.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}


def test_a_vits_layers_in_closed_form() -> None:
    found = plan(tiny())
    late = 1 / (1 + math.exp(2))
    assert [
        (row["name"], row["type"], row["shape"], row["block"], pytest.approx(row["beta"]), row["added"])
        for row in found["layers"]
    ] == [
        ("backbone.blocks.0.attn.qkv", "Linear", [48, 16], 1, 0.5, linear(16, 48)),
        ("backbone.blocks.0.attn.proj", "Linear", [16, 16], 1, 0.5, linear(16, 16)),
        ("backbone.blocks.1.attn.qkv", "Linear", [48, 16], 2, late, linear(16, 48)),
        ("backbone.blocks.1.attn.proj", "Linear", [16, 16], 2, late, linear(16, 16)),
    ]
    assert found["others"][0] == {"name": "backbone.patch_embed.proj", "type": "Conv2d", "shape": [16, 1, 4, 4]}
    assert [row["name"].rpartition(".")[2] for row in found["others"][1:]] == ["fc1", "fc2", "fc1", "fc2", "head"]
    assert found["added"] == 2 * (linear(16, 48) + linear(16, 16))
    facts = measure(tiny(), timing=False)
    assert (found["added"], found["parameters"]) == (facts["experts"], facts["parameters"])


@pytest.mark.parametrize("layers", [["1.*.0"], ["2"], ["1.0.0", "2"]], ids=str)
def test_every_layer_of_an_own_model_is_named_once(own: dict[str, Any], layers: list[str]) -> None:
    config = tiny(model=own, experts={"experts": 2, "rank": 2, "layers": layers})
    found = plan(config)
    rows = {row["name"]: row["shape"] for row in (*found["layers"], *found["others"])}
    assert rows == every_layer(config)
    assert len(rows) == len(found["layers"]) + len(found["others"])
    assert len(found["layers"]) == (3 if layers == ["1.*.0"] else len(layers))
    assert all(row["added"] == linear(row["shape"][1], row["shape"][0]) for row in found["layers"])
    assert found["added"] == sum(row["added"] for row in found["layers"])


def test_without_experts_all_layers_are_without() -> None:
    config = tiny(experts=None, model={"name": "wide_resnet", "args": {"depth": 10, "width": 1}})
    found = plan(config)
    assert (found["layers"], found["added"]) == ([], 0)
    assert {row["name"]: row["shape"] for row in found["others"]} == every_layer(config)


def test_weights_to_start_from_are_not_needed() -> None:
    config = tiny(model__pretrained=True, model__weights="nowhere.pt", model__drop_head=True)
    assert plan(config) == plan(tiny())


def test_what_training_would_refuse_is_refused(own: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"neither fused attention .* it has layers ending in 0, 2"):
        plan(tiny(model=own))
