"""Models take images in [0, 1]; saving and loading is exact; what does not fit is named."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rome import __version__
from rome.core.device import placed
from rome.core.errors import UserError
from rome.evaluation.evaluate import hash_model
from rome.experts import DualScale, LowRank, add_experts, expert_layers
from rome.models import (
    Classifier,
    ModelSettings,
    build_model,
    create_model,
    load_experts,
    load_model,
    load_weights,
    read_tensors,
    save_experts,
    save_model,
)

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}

OWN = """
from torch import nn

class Means(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x.mean((2, 3))

def means(num_classes, factor=1.0):
    return Means(factor)

def sized(num_classes, img_size):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * img_size**2, num_classes))

def number(num_classes):
    return 3

constant = 5
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with functions that build models; ``means`` gives the mean of each channel as the network sees it."""
    file = tmp_path / "own.py"
    file.write_text(OWN)
    return file


def tiny(seed: int = 0, **changes: Any) -> Classifier:
    torch.manual_seed(seed)
    return create_model("vit_tiny_patch16_224", **({"num_classes": 10} | TINY | changes))


def grown(seed: int = 0) -> Classifier:
    """A small ViT whose experts are not at their start."""
    model = add_experts(tiny(seed), experts=3, rank=2)
    for layer in expert_layers(model).values():
        nn.init.normal_(layer.B)
    return model


def images(channels: int = 3) -> Tensor:
    return torch.rand(3, channels, 32, 32, generator=torch.Generator().manual_seed(0))


def same(one: nn.Module, other: nn.Module) -> bool:
    """Equal tensors under equal names, to the last bit."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Normalisation and building


def test_normalisation_is_inside(own: Path) -> None:
    model = create_model(f"{own}:means", num_classes=3, mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 2))
    x = images()
    expected = (x.mean((2, 3)) - torch.tensor([0.1, 0.2, 0.3])) / torch.tensor([0.5, 0.25, 2])
    torch.testing.assert_close(model(x), expected)


def test_normalisation_is_saved_but_not_trained(own: Path) -> None:
    model = create_model(f"{own}:means", num_classes=3)
    assert not list(model.parameters())
    assert set(model.state_dict()) == {"mean", "std"}


def test_a_timm_model_brings_its_own_normalisation() -> None:
    imagenet = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    model = create_model("resnet10t", num_classes=10)
    for buffer, values in zip((model.mean, model.std), imagenet, strict=True):
        torch.testing.assert_close(buffer, torch.tensor(values).view(1, 3, 1, 1))
    assert (tiny().mean == 0.5).all()  # ViT's
    x = images()
    normalised = (x - model.mean) / model.std
    assert torch.equal(model.eval()(x), model.backbone(normalised))


def test_one_channel_takes_the_mean_over_the_models_three() -> None:
    model = create_model("resnet10t", num_classes=10, in_chans=1)
    assert model.mean.flatten().tolist() == pytest.approx([(0.485 + 0.456 + 0.406) / 3])
    assert model.std.flatten().tolist() == pytest.approx([(0.229 + 0.224 + 0.225) / 3])
    assert model.eval()(images(1)).shape == (3, 10)


def test_own_models_default_to_one_half_and_one_value_serves_all_channels(own: Path) -> None:
    model = create_model(f"{own}:means", num_classes=3)
    assert model.mean.flatten().tolist() == model.std.flatten().tolist() == [0.5] * 3
    model = create_model(f"{own}:means", num_classes=3, mean=(0.25,), std=(2,))
    assert model.mean.flatten().tolist() == [0.25] * 3


def test_own_function_gets_sizes_and_arguments(own: Path) -> None:
    x = images()
    model = create_model(f"{own}:means", num_classes=3, mean=(0,), std=(1,), factor=4.0)
    torch.testing.assert_close(model(x), 4 * x.mean((2, 3)))
    assert create_model(f"{own}:sized", num_classes=7, img_size=32)(x).shape == (3, 7)


WITH_DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass
from torch import nn

@dataclass
class Size:
    width: int = {width}

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(192, Size().width), nn.Linear(Size().width, num_classes))
"""


@pytest.mark.parametrize("name", ["small_net", "json"])
def test_own_files_may_hold_dataclasses_and_share_a_name_with_a_module(tmp_path: Path, name: str) -> None:
    for place, width in (("a", 5), ("b", 6)):
        (tmp_path / place).mkdir()
        (tmp_path / place / f"{name}.py").write_text(WITH_DATACLASS.format(width=width))
    models = [create_model(f"{tmp_path / place}/{name}.py:net", num_classes=4) for place in "aba"]
    assert [model.backbone[1].out_features for model in models] == [5, 6, 5]
    assert sys.modules["json"] is json


def test_an_own_file_may_import_its_neighbours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any working directory; of two with neighbours of equal names each gets its own, and none an older one."""
    for place, width in (("a", 5), ("b", 6)):
        folder = tmp_path / place / "parts"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "sizes.py").write_text(f"width = {width}\n")
        (tmp_path / place / "neighbour_x.py").write_text("from parts.sizes import width\n")
        (tmp_path / place / "mine.py").write_text(
            "from torch import nn\nimport neighbour_x\n\ndef net(num_classes):\n"
            "    from parts import sizes\n    assert sizes.width == neighbour_x.width\n"
            "    return nn.Linear(sizes.width, num_classes)\n"
        )
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    widths = [create_model(f"{place}/mine.py:net", num_classes=4).backbone.in_features for place in "aba"]
    assert widths == [5, 6, 5]
    (tmp_path / "a" / "parts" / "sizes.py").write_text("width = 77\n")
    assert create_model(f"{tmp_path}/a/mine.py:net", num_classes=4).backbone.in_features == 77
    assert sys.path == path


def test_a_neighbour_that_another_module_shadows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "helper_x.py").write_text("width = 5\n")
    (tmp_path / "mine.py").write_text("import helper_x\nfrom torch import nn\nnet = lambda num_classes: nn.ReLU()\n")
    (tmp_path / "other.py").write_text("from torch import nn\nnet = lambda num_classes: nn.ReLU()\n")
    already = ModuleType("helper_x")
    monkeypatch.setitem(sys.modules, "helper_x", already)
    create_model(f"{tmp_path}/other.py:net", num_classes=4)  # does not ask for it
    with pytest.raises(
        UserError,
        match=r"the module helper_x in .* has the same name as another module, which is already imported; rename",
    ):
        create_model(f"{tmp_path}/mine.py:net", num_classes=4)
    assert sys.modules["helper_x"] is already


def test_an_own_file_that_fails_is_no_module(tmp_path: Path) -> None:
    before = set(sys.modules)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        create_model(f"{tmp_path}/broken.py:net", num_classes=4)
    assert not any("broken" in name for name in set(sys.modules) - before)


def test_a_function_of_an_installed_module_is_found_by_name() -> None:
    model = create_model("timm.models:vit_tiny_patch16_224", num_classes=4, depth=1, img_size=32)
    assert model(images()).shape == (3, 4)


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        ("vit_base_patch16_244", "vit_base_patch16_224"),
        ("vitt_base_patch16_224", "vit_base_patch16_224"),
        ("deit_tiny_patch16", "deit_tiny_patch16_224"),
    ],
)
def test_an_unknown_name_answers_with_the_nearest(given: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"unknown model '{given}'. Did you mean '{nearest}'") as error:
        create_model(given, num_classes=10)
    assert len(str(error.value)) < 600


def test_a_name_like_no_other_is_refused_too() -> None:
    with pytest.raises(UserError, match=r"unknown model '@@@'\. `rome list models`"):
        create_model("@@@", num_classes=10)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("vit_tiny_patch16_224", {"depht": 2}, r"vit_tiny_patch16_224 cannot be built with .*depht=2.*depht"),
        ("vit_tiny_patch16_224", {"embed_dim": 31}, r"cannot be built with .*embed_dim=31"),
        ("resnet10t", {"patch_size": 4}, r"cannot be built with patch_size=4"),
        ("{own}:means", {"width": 2}, r"cannot be built with .*width=2"),
        ("{own}:means", {"mean": (0.1, 0.2)}, r"model\.mean has 2 values but the images have 3 channels"),
        ("{own}:means", {"std": (0.1, 0.0, 1)}, r"model\.std must be positive"),
        ("{own}:number", {}, r"returned a int, not a torch module"),
        ("{own}:constant", {}, r"cannot be built"),
        ("{own}:absent", {}, "has no function 'absent'. Valid: Means, means"),
        ("{own}x.py:means", {}, r"cannot be imported.*No such file"),
        ("no.such.package:means", {}, r"cannot be imported.*no"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_explained(own: Path, name: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(name.format(own=own), num_classes=3, **args)


# A config's model


def settings(**changes: Any) -> ModelSettings:
    return ModelSettings(
        **({"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "args": small()} | changes)
    )


def small() -> dict[str, Any]:
    return {"embed_dim": 32, "depth": 1, "num_heads": 2}


def test_a_configs_model_takes_classes_and_channels_from_the_data() -> None:
    model = build_model(settings(), LowRank(rank=2), classes=7, shape=(1, 32, 32))
    assert model.training
    assert list(expert_layers(model)) == ["backbone.blocks.0.attn.qkv", "backbone.blocks.0.attn.proj"]
    assert model(images(1)).shape == (3, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 9}, r"num_classes is 9 but the data has 10"),
        ({"in_chans": 1}, r"in_chans is 1 but the data has 3"),
        ({"img_size": 64}, r"does not take 2 images of 3x32x32.*img_size"),
    ],
    ids=str,
)
def test_a_config_that_contradicts_the_data_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(settings(**changes), None, classes=10, shape=(3, 32, 32))


@pytest.mark.parametrize(
    "error", ["AttributeError", "ImportError", "pickle.UnpicklingError", "TypeError", "IndexError", "EOFError"]
)
@pytest.mark.parametrize("place", ["function", "forward"])
def test_whatever_own_code_raises_is_told_in_a_line(tmp_path: Path, error: str, place: str) -> None:
    (tmp_path / "mine.py").write_text(
        "import pickle\nfrom torch import nn\n\nclass Net(nn.Linear):\n    def forward(self, x):\n"
        f"        raise {error}('this went wrong')\n\ndef forward(num_classes):\n    return Net(1, num_classes)\n\n"
        f"def function(num_classes):\n    raise {error}('this went wrong')\n"
    )
    with pytest.raises(UserError, match=r"mine\.py:.*: this went wrong"):
        build_model(ModelSettings(name=f"{tmp_path}/mine.py:{place}"), None, classes=10, shape=(3, 8, 8))


def test_auxiliary_logits_in_training_mode_are_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "aux.py").write_text(
        "from torch import nn\n\nclass Net(nn.Linear):\n    def forward(self, x):\n"
        "        logits = super().forward(x.flatten(1))\n"
        "        return (logits, logits) if self.training else logits\n\n"
        "def net(num_classes):\n    return Net(64, num_classes)\n"
    )
    settings = ModelSettings(name=f"{tmp_path}/aux.py:net", mean=(0,), std=(1,))
    with pytest.raises(UserError, match=r"in training mode must return logits .* not a tuple"):
        build_model(settings, None, classes=10, shape=(1, 8, 8))


def test_outputs_must_be_one_logit_a_class(own: Path) -> None:
    with pytest.raises(UserError, match=r"outputs 3 classes, and the data has 10"):
        build_model(ModelSettings(name=f"{own}:means"), None, classes=10, shape=(3, 32, 32))


def test_outputs_must_be_a_tensor(tmp_path: Path) -> None:
    (tmp_path / "several.py").write_text(
        "from torch import nn\n\nclass Net(nn.Linear):\n    def forward(self, x):\n"
        "        return {'logits': super().forward(x.mean((2, 3)))}\n\n"
        "def net(num_classes):\n    return Net(3, num_classes)\n"
    )
    name = f"{tmp_path / 'several.py'}:net"
    with pytest.raises(UserError, match=r"must return logits \(2, classes >= 2\), not a dict.*\['logits'\]"):
        build_model(ModelSettings(name=name), None, classes=10, shape=(3, 32, 32))


def test_training_can_start_from_saved_weights_with_or_without_experts(tmp_path: Path) -> None:
    for source in (tiny(3, depth=1), add_experts(tiny(3, depth=1), rank=2)):
        save_model(source, tmp_path / "start.safetensors")
        weights = str(tmp_path / "start.safetensors")
        model = build_model(settings(weights=weights), LowRank(rank=2), classes=10, shape=(3, 32, 32))
        assert torch.equal(model.eval()(images()), source.eval()(images()))


# Saving and loading


def test_a_whole_model_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    for number, model in enumerate((tiny(), grown(), create_model("resnet10t", num_classes=5).train())):
        model(images())  # moves BatchNorm's statistics
        file = tmp_path / "deep" / f"{number}.safetensors"
        save_model(model, file)
        torch.manual_seed(99)
        loaded = load_model(file)
        assert same(loaded, model)
        assert not loaded.training
        assert torch.equal(loaded(images()), model.eval()(images()))
        assert [p.name for p in file.parent.iterdir() if "partial" in p.name] == []


def test_an_own_model_comes_back_from_its_function(own: Path, tmp_path: Path) -> None:
    model = create_model(f"{own}:sized", num_classes=4, img_size=32, mean=(0.1, 0.2, 0.3))
    save_model(model, tmp_path / "m.safetensors")
    assert same(load_model(tmp_path / "m.safetensors"), model)


def test_the_context_of_the_experts_comes_back_too(tmp_path: Path) -> None:
    gate = {"kind": "dual-scale", "s": 3, "b": 1}
    model = LowRank(experts=2, rank=3, gate=gate, layers="qkv", projection="trainable").inject(tiny())
    save_model(model, tmp_path / "m.safetensors")
    loaded = load_model(tmp_path / "m.safetensors")
    for name, layer in expert_layers(model).items():
        other = expert_layers(loaded)[name]
        assert (other.experts, other.rank, other.gate.beta) == (layer.experts, layer.rank, layer.gate.beta)
        assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in layer.parameters()]


def test_experts_alone_come_back_to_the_last_bit(tmp_path: Path) -> None:
    model, file = grown(), tmp_path / "experts.safetensors"
    save_experts(model, file)
    stored = load_file(file)
    assert stored
    assert not any(name.endswith(("qkv.weight", "proj.bias", "head.weight")) for name in stored)
    for target in (tiny(0), add_experts(tiny(0), experts=3, rank=2)):  # the same backbone, without and with experts
        assert same(load_experts(target, file), model)


def test_experts_belong_to_the_weights_they_were_saved_beside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, frozen, x = tmp_path / "e.safetensors", grown(0), images()
    save_experts(frozen, file)
    assert torch.equal(load_experts(tiny(0), file).eval()(x), frozen.eval()(x))
    assert capsys.readouterr().err == ""
    other = tiny(1)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    load_experts(other, file)  # trained beside frozen weights, they may stand beside others
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())
    assert "the model has other weights than the one that these experts were saved from" in capsys.readouterr().err
    moved = grown(0)
    with torch.no_grad():
        moved.backbone.head.bias += 1
    save_experts(moved, file)
    for target in (tiny(0), grown(0)):  # where they started
        start = {name: value.clone() for name, value in target.state_dict().items()}
        with pytest.raises(
            UserError, match="trained together with the model's other weights, and this model has different ones"
        ):
            load_experts(target, file)
        assert target.state_dict().keys() == start.keys()
        assert all(torch.equal(target.state_dict()[name], value) for name, value in start.items())
        load_experts(target, file, any_backbone=True)


def test_metadata_says_what_the_file_holds(tmp_path: Path) -> None:
    model = grown()
    save_model(model, tmp_path / "m.safetensors", config={"epochs": 20})
    save_experts(model, tmp_path / "e.safetensors")
    with safetensors.safe_open(tmp_path / "m.safetensors", "pt") as file:  # readable without rome
        metadata = json.loads(file.metadata()["rome"])
    assert metadata["format"] == "model"
    assert metadata["version"] == __version__
    assert metadata["config"] == {"epochs": 20}
    assert metadata["model"] == {
        "name": "vit_tiny_patch16_224", "num_classes": 10, "in_chans": 3, "mean": [0.5] * 3, "std": [0.5] * 3, **TINY
    }  # fmt: skip
    assert metadata["experts"] == [LowRank(experts=3, rank=2).dump()]
    assert read_tensors(tmp_path / "e.safetensors")[0]["format"] == "experts"


def test_a_run_folder_stands_for_its_model(tmp_path: Path) -> None:
    model = tiny()
    save_model(model, tmp_path / "model.safetensors")
    assert same(load_model(tmp_path), model)


def test_a_model_adapted_twice_is_loaded_as_it_was(tmp_path: Path) -> None:
    model = add_experts(add_experts(tiny(), layers="qkv", rank=2), layers=("fc1", "fc2"), rank=3, experts=2)
    for layer in expert_layers(model).values():
        nn.init.normal_(layer.B)
    x = torch.rand(2, 3, 32, 32)
    expected = model.eval()(x)
    save_model(model, tmp_path / "whole.safetensors")
    assert load_model(tmp_path / "whole.safetensors")(x).equal(expected)
    save_experts(model, tmp_path / "experts.safetensors")
    assert load_experts(tiny(), tmp_path / "experts.safetensors").eval()(x).equal(expected)


def test_a_file_loads_into_your_own_module(tmp_path: Path) -> None:
    def mlp() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, 10))

    source = add_experts(mlp(), layers=("1", "3"), rank=2)
    save_model(source, tmp_path / "m.safetensors")
    target = mlp()
    assert load_model(tmp_path / "m.safetensors", target) is target  # gets its experts first
    assert same(target, source)
    with pytest.raises(UserError, match=r"cannot be built from the file's metadata .*; pass the module"):
        load_model(tmp_path / "m.safetensors")


def changed(file: Path, **tensors: Tensor | None) -> Path:
    """The file with tensors replaced, added or (None) removed."""
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    merged = load_file(file) | {name.replace("__", "."): value for name, value in tensors.items()}
    new = file.with_name("changed.safetensors")
    save_file({name: value for name, value in merged.items() if value is not None}, new, metadata)
    return new


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"backbone__head__bias": None}, r"backbone\.head\.bias is missing in the file"),
        ({"backbone__tail": torch.zeros(2)}, r"backbone\.tail is not in the model"),
        ({"backbone__head__bias": torch.zeros(4)}, r"head\.bias is \(4,\) in the file, \(10,\) in the model"),
        ({f"extra{i}": torch.zeros(1) for i in range(5)}, r"extra0, extra1, extra2 and 2 more are not in the model"),
    ],
    ids=["missing", "unexpected", "other shape", "many"],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(
    tmp_path: Path, tensors: dict[str, Tensor | None], message: str
) -> None:
    save_model(tiny(0), tmp_path / "m.safetensors")
    file = changed(tmp_path / "m.safetensors", **tensors)
    target = tiny(1)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_model(file, target)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_starting_weights_must_cover_the_backbone(tmp_path: Path) -> None:
    save_model(tiny(0), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=r"backbone\.head\.bias is missing in the file"):
        load_weights(tiny(1), changed(tmp_path / "m.safetensors", backbone__head__bias=None))
    with pytest.raises(UserError, match=r"backbone\.head\.A is not in the model; it seems to have experts"):
        load_weights(tiny(1), changed(tmp_path / "m.safetensors", backbone__head__A=torch.zeros(1)))
    with pytest.raises(UserError, match=r"backbone\.blocks\.2\.attn\.qkv\.weight is not in the model"):
        load_weights(tiny(1), changed(tmp_path / "m.safetensors", backbone__blocks__2__attn__qkv__weight=torch.ones(1)))


def test_a_model_is_not_saved_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (".", tmp_path):
        with pytest.raises(UserError, match=r"cannot be written \(.*\): check the path"):
            save_model(tiny(0), folder)


def test_experts_of_another_size_are_refused(tmp_path: Path) -> None:
    save_experts(grown(), tmp_path / "e.safetensors")
    with pytest.raises(UserError, match=r"qkv\.A is \(6, 32\) in the file, \(12, 32\) in the model"):
        load_experts(add_experts(tiny(), experts=3, rank=4), tmp_path / "e.safetensors")


def test_a_model_without_experts_has_none_to_save(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no experts to save"):
        save_experts(tiny(), tmp_path / "e.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_whole_model_is_not_read_as_experts(tmp_path: Path) -> None:
    save_model(grown(), tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="holds a whole model, not only experts"):
        load_experts(tiny(), tmp_path / "m.safetensors")


def test_a_model_that_the_file_does_not_fit_stays_as_it_was(tmp_path: Path) -> None:
    save_model(grown(), tmp_path / "m.safetensors")
    save_experts(grown(), tmp_path / "e.safetensors")
    for load, file in ((load_model, "m"), (load_experts, "e")):
        other = create_model("vit_tiny_patch16_224", num_classes=7, img_size=16, patch_size=8, depth=1, embed_dim=96)
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(UserError, match="does not fit the model"):
            load(*((tmp_path / f"{file}.safetensors", other) if file == "m" else (other, tmp_path / "e.safetensors")))
        assert other.state_dict().keys() == before.keys()
        assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_recipe_that_json_cannot_hold_does_not_lose_the_weights(tmp_path: Path) -> None:
    model = create_model(
        "vit_tiny_patch16_224", num_classes=10, img_size=8, patch_size=4, depth=1, act_layer=torch.nn.ReLU
    )
    save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="pass the module to load it into"):
        load_model(tmp_path / "m.safetensors")
    load_model(tmp_path / "m.safetensors", model)


def test_experts_alone_are_not_a_model(tmp_path: Path) -> None:
    save_experts(grown(), tmp_path / "e.safetensors")
    with pytest.raises(UserError, match="holds only experts"):
        load_model(tmp_path / "e.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a model", b"\xff" * 64])
def test_a_corrupt_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors is not a readable safetensors file"):
        load_model(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_model(tiny(), file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a readable safetensors file"):
        load_model(file)


def test_a_folder_that_is_no_run_and_one_that_is_not_finished(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no model at .*model\.safetensors; give a finished run's folder"):
        load_model(tmp_path)
    (tmp_path / "last.pt").touch()
    with pytest.raises(UserError, match=r"not finished: rome train .* --resume"):
        load_model(tmp_path)


def test_saving_replaces_the_old_file_whole(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_model(tiny(0), file)
    with pytest.raises(TypeError):
        save_model(tiny(1), file, config={"bad": object()})
    assert same(load_model(file), tiny(0))
    save_model(tiny(1), file)
    assert same(load_model(file), tiny(1))
    assert list(tmp_path.iterdir()) == [file]


def test_a_model_on_a_cpu_keeps_channels_last_and_saves_what_it_always_did(tmp_path: Path) -> None:
    model = create_model("resnet_18", num_classes=10)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_model(model, tmp_path / "first.safetensors")
    model = placed(model, torch.device("cpu"))
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4 and parameter.shape[-1] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
    assert not any(weight.is_contiguous() for weight in weights[1:])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    save_model(model, tmp_path / "last.safetensors")
    assert (tmp_path / "first.safetensors").read_bytes() == (tmp_path / "last.safetensors").read_bytes()
    assert hash_model(model) == hash_model(
        create_model("resnet_18", num_classes=10, weights=tmp_path / "first.safetensors")
    )


def test_gates_of_other_settings_are_refused_though_their_weights_fit(tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    settings = [{"gate": DualScale(b=-2)}, {"regularizer": None}]  # the second changes no output
    for save, load in ((save_model, lambda model: load_model(file, model)), (save_experts, _experts_of(file))):
        save(LowRank(rank=2).inject(tiny()), file)
        other, same_function = (LowRank(rank=2, **each).inject(tiny()) for each in settings)
        with pytest.raises(UserError, match=r"holds experts with gate: .*'b': 2\.0.*the model's have .*'b': -2\.0"):
            load(other)
        assert load(same_function) is same_function


def _experts_of(file: Path) -> Any:
    return lambda model: load_experts(model, file)


@pytest.mark.parametrize(("channels", "placed_last"), [(2, False), (7, False), (8, True)])
def test_convolutions_that_onednn_writes_beyond_its_memory_for_keep_their_order(
    channels: int, placed_last: bool
) -> None:
    model = nn.Sequential(nn.Conv2d(3, channels, 3), nn.Conv2d(channels, 8, 1, stride=2))
    model = placed(model, torch.device("cpu"))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last) == placed_last
    images = torch.rand(12, 3, 10, 10)
    for _ in range(30):
        model(images).sum().backward()


def test_weights_can_be_read_by_whom_the_user_lets_read_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        save_model(tiny(), tmp_path / "model.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "model.safetensors").stat().st_mode) == 0o640
