"""``rome check``: what a config amounts to, costs and lacks; what it passes can be trained, and it writes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.tiny_runs import STEPS, changed, tiny, write_yaml
from rome.methods import Method
from rome.report.check import check
from rome.runs.config import parse


@pytest.fixture(autouse=True)
def _quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory takes a second to count, and has tests of its own."""
    if "memory" not in request.node.name:
        sizes = dict.fromkeys(("state", "attack", "update", "training", "evaluation"), 10**6)
        monkeypatch.setattr("rome.report.check.peak_memory", lambda config: sizes)


@pytest.fixture
def rome(rome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``rome ARGUMENTS`` in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return rome


def test_what_it_prints_is_the_resolved_config_and_its_cost(rome: Any, tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "some.yaml", changed())
    ended = rome("check", file, "attack.steps=3")
    assert (ended.code, ended.err) == (0, "")
    config = parse(yaml.safe_load(ended.out))
    assert config == tiny(name="some", attack={"kind": "pgd", "steps": 3})
    assert f"# update: 12 examples, {3 + 1} forward and {3 + 1} backward passes each" in ended.out
    assert "# evaluation: 20 images, up to " in ended.out
    assert "no rate was measured" in ended.out
    assert f"# training: 64 examples, 2 epochs, {2 * STEPS:,} updates" in ended.out
    facts = json.loads(rome("check", file, "--json").out)
    assert facts["missing"] == facts["remarks"] == []
    model = check(config).cost
    assert {key: facts["cost"][key] for key in ("parameters", "macs")} == {k: model[k] for k in ("parameters", "macs")}
    assert [path.name for path in tmp_path.iterdir()] == ["some.yaml"], "nothing is written"


def test_everything_that_is_missing_is_said_at_once(rome: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rome.runs.loggers.base.find_spec", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    changes = {
        "data": {"kind": "cifar10", "path": "nowhere"}, "device": "cuda", "loggers": ["wandb", "csv"],
        "model": {**changed()["model"], "img_size": 32, "weights": "lost.safetensors"},
    }  # fmt: skip
    ended = rome("check", write_yaml(tmp_path / "some.yaml", {**changed(), **changes}))
    assert ended.code == 2
    first, *rest = ended.err.strip().splitlines()
    assert first == "error: this config cannot be trained here:"
    for line, words in zip(rest, ["rome-robust[wandb]", "no CUDA device", "lost.safetensors", "nowhere"], strict=True):
        assert words in line
    assert "GMACs" in ended.out, "what can be counted without them is"


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"batch_size": 65}, "batch_size 65 exceeds the 64 training examples"),
    ({"validation": {"n": 64}}, "validation.n=64 takes all 64 training examples"),
    ({"model": {**changed()["model"], "name": "no_such_vit"}}, "unknown model 'no_such_vit'"),
    ({"experts": {"kind": "low-rank", "layers": ["nothing"]}}, "nothing"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_what_training_would_refuse_is_refused(changes: dict[str, Any], message: str) -> None:
    (line,) = check(tiny(**changes)).missing
    assert message in line


def test_weights_that_do_not_fit_are_found(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(3, 5)}, tmp_path / "other.safetensors")
    (line,) = check(tiny(model={**changed()["model"], "weights": str(tmp_path / "other.safetensors")})).missing
    assert "other.safetensors" in line


def test_what_training_would_download_is_a_remark_and_is_not_downloaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    found = check(tiny(data={"kind": "cifar10", "download": True}, model={"name": "resnet18", "pretrained": True}))
    assert found.missing == []
    assert [("cifar10" in line, "downloads" in line) for line in found.remarks] == [(False, True), (True, True)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in check(tiny(model={"name": "resnet18", "pretrained": True})).missing[0]


def test_what_does_not_fit_a_gpu_is_said_with_what_to_change(rome: Any, tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "some.yaml", changed(method="max"))
    ended = rome("check", file, "--memory", 0.0005)
    assert ended.code == 2
    for what in ("set attack_batch_size, such as 6", "activation_checkpointing=true", "accumulate=2"):
        assert what in ended.err
    assert "an evaluation takes 1 MB: lower evaluation.batch_size (20)" in ended.out
    assert rome("check", file, "--memory", 1).code == 0


def test_memory_that_cannot_be_counted_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def looks(self: Method, context: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        return float(x.sum())

    monkeypatch.setattr(type(tiny().method), "loss", looks)
    found = check(tiny())
    assert "memory" not in found.cost
    assert found.missing == []
    assert "memory: not counted" in found.remarks[0]
