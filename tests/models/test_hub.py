"""Models of the Hub, read by its own client from a stand-in: what is loaded, what is asked for, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
from torch import Tensor

import rome
from helpers.hub import READER, StandIn, connect, serving
from helpers.problems import case
from helpers.small_models import grow
from rome.core.errors import UserError
from rome.core.trust import code_in
from rome.models import ModelSettings, create_model, load_model, load_weights, save_model, weights_file
from rome.models.files import copy_with
from rome.models.hub import pinned

VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with serving() as standing_in:
        connect(standing_in, monkeypatch, tmp_path / "cache")
        yield standing_in


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def vit(seed: int = 0, **settings: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create_model("vit_tiny_patch16_224", num_classes=5, **VIT, **settings).eval()


def saved(model: Any, folder: Path) -> dict[str, bytes]:
    save_model(model, folder / "model.safetensors")
    return {"model.safetensors": (folder / "model.safetensors").read_bytes()}


def refused(source: str, **options: Any) -> str:
    with pytest.raises(UserError) as error:
        load_model(source, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_with_experts_computes_what_was_saved(hub: StandIn, tmp_path: Path, x: Tensor) -> None:
    model = grow(rome.add_experts(vit(), experts=2, rank=2)).eval()
    hub.add("alice/net", saved(model, tmp_path))
    assert torch.equal(load_model("hf://alice/net")(x), model(x))


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: StandIn, tmp_path: Path, x: Tensor) -> None:
    old, new = vit(seed=1), vit(seed=2)
    repo = hub.add("alice/net", saved(old, tmp_path))
    first = repo.branches["main"]
    repo.tags["v1"] = first
    assert pinned("hf://alice/net") == f"hf://alice/net@{first}"
    repo.commit("main", saved(new, tmp_path))
    assert torch.equal(load_model("hf://alice/net")(x), new(x))
    for revision in ("v1", first):
        assert torch.equal(load_model(f"hf://alice/net@{revision}")(x), old(x))
    both = ModelSettings(name="hf://alice/net@v1", weights="hf://alice/net").pinned()
    assert (both.name, both.weights) == (f"hf://alice/net@{first}", f"hf://alice/net@{repo.branches['main']}")
    elsewhere = ModelSettings(name="resnet_18", weights="net.pt")
    assert elsewhere.pinned() == elsewhere


def test_what_was_fetched_once_needs_no_hub(
    hub: StandIn, tmp_path: Path, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = vit()
    repo = hub.add("alice/net", saved(model, tmp_path))
    load_model("hf://alice/net")
    before = len(hub.calls)
    load_model(f"hf://alice/net@{repo.branches['main']}")
    assert len(hub.calls) == before, "a commit that is cached is not asked for"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(load_model("hf://alice/net")(x), model(x))
    assert len(hub.calls) == before
    assert "alice/other is not in the cache" in (said := refused("hf://alice/other"))
    assert "HF_HUB_OFFLINE" in said
    assert len(hub.calls) == before


def test_each_refusal_is_one_line_that_says_what_to_do(
    hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = saved(vit(), tmp_path)
    hub.add("bob/closed", files)
    hub.add("bob/gated", files, private=False, gated=True)
    hub.add("bob/pickled", {"pytorch_model.bin": b"\x80"}, private=False)
    hub.add("bob/foreign", {"model.safetensors": save({"w": torch.zeros(1)})}, private=False)
    hub.add("bob/broken", {"model.safetensors": b"nothing"}, private=False)
    hub.add("bob/net", files, private=False)
    expected = {
        "hf://bob/nothing": "no such repository",
        "hf://bob/closed": "it is private: check the name, or log in",
        "hf://bob/gated": f"is gated: ask for access at {hub.url}/bob/gated",
        "hf://bob/net@v9": "no revision v9",
        "hf://bob/pickled": "has no model.safetensors",
        "hf://bob/foreign": "was not saved by rome",
        "hf://bob/broken": "is not a readable safetensors file",
        "hf://net": "give USER/NAME",
        "hf://bob/net@": "give USER/NAME",
        "hf://a/b/c": "give USER/NAME",
        "hf://": "give USER/NAME",
    }
    for source, said in expected.items():
        with case(source):
            assert said in refused(source)
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "no such repository" in refused("hf://bob/closed")
    assert not [call for call in hub.calls if ".bin" in call], "a pickle is never fetched"


def test_a_file_of_the_hub_names_no_code(hub: StandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ROME_STATE_HOME", str(tmp_path / "mine"))
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef net(num_classes):\n    return nn.Linear(8, num_classes)\n"
    )
    files = saved(create_model("mine.py:net", num_classes=5), tmp_path)
    hub.add("alice/net", files)
    load_model("hf://alice/net")  # these very bytes were written here
    monkeypatch.setenv("ROME_STATE_HOME", str(tmp_path / "others"))
    monkeypatch.setattr("rome.core.trust._written", set())
    assert "would run code: model: mine.py:net" in refused("hf://alice/net")
    load_model("hf://alice/net", trust_code=True)


def test_a_config_in_a_file_may_name_weights_of_the_hub_but_no_model() -> None:
    """Weights are data; a model would be built as its own metadata says."""
    assert code_in({"config": {"model": {"name": "hf://evil/net"}}}) == ["model: hf://evil/net"]
    assert code_in({"config": {"model": {"name": "resnet18", "weights": "hf://bob/net"}}}) == []


def test_weights_to_start_from_bring_timms_normalisation(hub: StandIn, x: Tensor) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT).eval()
    config = json.dumps({"pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}}).encode()
    hub.add("bob/net", {"model.safetensors": save(theirs.state_dict()), "config.json": config}, private=False)
    model = vit()
    said = load_weights(model, "hf://bob/net")
    assert said == ["normalisation of hf://bob/net: mean 0.1, 0.2, 0.3, std 0.5, 0.6, 0.7"]
    normalised = (x - torch.tensor([0.1, 0.2, 0.3]).view(-1, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(-1, 1, 1)
    assert torch.equal(model(x), theirs(normalised))
    assert torch.equal(vit(weights="hf://bob/net", mean=(0.0,), std=(1.0,))(x), theirs(x)), "the own one stays"


def test_a_bare_file_is_timms_and_ours(tmp_path: Path, x: Tensor) -> None:
    """Tensors under timm's names alone, and the same model all the same, built or loaded into one of ours."""
    model = vit(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    save_model(model, tmp_path / "whole.safetensors")
    bare = tmp_path / "model.safetensors"
    copy_with(lambda metadata: metadata, tmp_path / "whole.safetensors", bare, bare=True)
    for loaded in (load_model(bare), load_model(bare, vit(seed=3)), load_model(str(tmp_path))):
        assert torch.equal(loaded(x), model(x))
    backbone = load_model(bare, timm.create_model("vit_tiny_patch16_224", num_classes=5, **VIT))
    assert torch.equal(backbone((x - model.mean) / model.std), model(x))
    assert weights_file(tmp_path) == bare


def test_a_name_on_the_hub_is_no_architecture() -> None:
    with pytest.raises(UserError, match=r"rome\.load_model\('hf://alice/net'\) loads it"):
        create_model("hf://alice/net", num_classes=5)
