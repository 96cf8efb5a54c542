"""Backbones: published sizes, the names that others' checkpoints have, and what a literal reading of them computes."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.data import Cifar10
from rome.models import create_model
from rome.models.backbones import BACKBONES, wide_resnet
from rome.models.backbones.alexnet import FEATURE_LAYERS
from rome.models.loading import weights_file
from rome.report.cost import macs

TINY: dict[str, dict[str, Any]] = {
    "resnet_18": {"width": 4},
    "preact_resnet_18": {"width": 4},
    "wide_resnet": {"depth": 16, "width": 2},
    "wide_resnet_trades": {"depth": 16, "width": 2},
    "alexnet_cifar": {},
}


def shaken(name: str, **args: Any) -> nn.Module:
    """A backbone in float64 whose batch norms are far from their start, in evaluation mode."""
    torch.manual_seed(0)
    model = BACKBONES[name](**TINY[name] | args)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, -1, 2)
            nn.init.normal_(module.bias, std=0.3)
    return model.double().eval()


def images(n: int = 2, size: int = 32) -> Tensor:
    return torch.rand(n, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) - 0.3


# Sizes


@pytest.mark.parametrize(
    ("name", "args", "parameters", "gmacs"),
    [
        ("resnet_18", {}, 11_173_962, 0.56),
        ("preact_resnet_18", {}, 11_172_170, 0.56),
        ("wide_resnet_28_10", {}, 36_479_194, 5.24),
        ("wide_resnet_94_16", {}, 365_915_610, None),
        ("wide_resnet_trades", {}, 46_160_474, None),
        ("alexnet_cifar", {}, 23_272_266, None),
        ("vit_base_patch16_224", {"img_size": 32, "patch_size": 4}, 85_152_010, 5.60),
        ("deit_base_patch16_224", {"img_size": 32, "patch_size": 4}, 85_152_010, 5.60),
        ("swin_base_patch4_window7_224", {"img_size": 32, "window_size": 4}, 86_693_762, None),
    ],
)
def test_sizes_are_the_published_ones(name: str, args: dict[str, Any], parameters: int, gmacs: float | None) -> None:
    """ResNet-18 as in kuangliu/pytorch-cifar, PreActResNet-18 as in E-AT, WRN-28-10 as in its paper (36.5M),
    WRN-94-16 as in Bartoldson et al. 2024 (366M), WRN-34-10 as in TRADES without
    the layers it never calls, ViT-B and Swin-B as in the paper (85.15M, 86.69M)."""
    with torch.device("meta"):
        model = create_model(name, num_classes=10, **args).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    if gmacs is not None:
        assert macs(model, (3, 32, 32)) / 1e9 == pytest.approx(gmacs, abs=0.005)


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 4), (28, 10), (94, 16)])
def test_a_wide_resnets_size_in_closed_form(depth: int, width: int) -> None:
    count, inside, size, products = 27 * 16, 16, 32, 32**2 * 27 * 16
    for group, out in enumerate((16 * width, 32 * width, 64 * width)):
        size //= 1 if group == 0 else 2
        for _ in range((depth - 4) // 6):
            shortcut = inside * out if inside != out else 0
            weights = 9 * inside * out + 9 * out * out + shortcut
            count += weights + 2 * inside + 2 * out
            products += size**2 * weights
            inside = out
    count += 2 * inside + 10 * inside + 10
    with torch.device("meta"):
        model = wide_resnet(depth=depth, width=width).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert macs(model, (3, 32, 32)) == products + 10 * inside


# Names and computation: each function below reads a state dict by the names of the source it cites


class Read(dict[str, Tensor]):
    """A state dict that remembers which entries were used."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.state_dict())
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        self.used.add(name)
        return super().__getitem__(name)

    def bn(self, x: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            self[f"{name}.{part}"].view(1, -1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]


def resnet(s: Read, x: Tensor) -> Tensor:
    """fra31/auto-attack, examples/resnet.py."""
    x = F.relu(s.bn(F.conv2d(x, s["conv1.weight"], padding=1), "bn1"))
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = F.relu(s.bn(F.conv2d(x, s[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn1"))
            out = s.bn(F.conv2d(out, s[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
            if stride == 2:
                x = s.bn(F.conv2d(x, s[f"{at}.shortcut.0.weight"], stride=2), f"{at}.shortcut.1")
            x = F.relu(out + x)
    return s.linear(F.avg_pool2d(x, 4).flatten(1), "linear")


def preact_resnet(s: Read, x: Tensor, act: Any = F.softplus) -> Tensor:
    """fra31/robust-finetuning, model_zoo/fast_models.py: the shortcut reads the activated input, the end is ReLU."""
    x = F.conv2d(x, s["conv1.weight"], padding=1)
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = act(s.bn(x, f"{at}.bn1"))
            if stride == 2:
                x = F.conv2d(out, s[f"{at}.shortcut.0.weight"], stride=2)
            out = F.conv2d(out, s[f"{at}.conv1.weight"], stride=stride, padding=1)
            x = x + F.conv2d(act(s.bn(out, f"{at}.bn2")), s[f"{at}.conv2.weight"], padding=1)
    return s.linear(F.avg_pool2d(F.relu(s.bn(x, "bn")), 4).flatten(1), "linear")


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def dm_wide_resnet(s: Read, x: Tensor, act: Any = swish) -> Tensor:
    """RobustBench, model_zoo/architectures/dm_wide_resnet.py, after its normalisation."""
    x = F.conv2d(x, s["init_conv.weight"], padding=1)
    for group in range(3):
        for block in range(2):
            at, stride = f"layer.{group}.block.{block}", 2 if group and block == 0 else 1
            out = act(s.bn(x, f"{at}.batchnorm_0"))
            if block == 0:
                x = F.conv2d(out, s[f"{at}.shortcut.weight"], stride=stride)
            padded = F.pad(out, (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1))
            out = act(s.bn(F.conv2d(padded, s[f"{at}.conv_0.weight"], stride=stride), f"{at}.batchnorm_1"))
            x = x + F.conv2d(out, s[f"{at}.conv_1.weight"], padding=1)
    return s.linear(F.avg_pool2d(act(s.bn(x, "batchnorm")), 8).flatten(1), "logits")


def trades_wide_resnet(s: Read, x: Tensor) -> Tensor:
    """yaodongyu/TRADES, models/wideresnet.py, without dropout."""
    x = F.conv2d(x, s["conv1.weight"], padding=1)
    for group in range(3):
        for block in range(2):
            at, stride = f"block{group + 1}.layer.{block}", 2 if group and block == 0 else 1
            out = F.relu(s.bn(x, f"{at}.bn1"))
            if block == 0:
                x = F.conv2d(out, s[f"{at}.convShortcut.weight"], stride=stride)
            out = F.relu(s.bn(F.conv2d(out, s[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn2"))
            x = x + F.conv2d(out, s[f"{at}.conv2.weight"], padding=1)
    return s.linear(F.avg_pool2d(F.relu(s.bn(x, "bn1")), 8).flatten(1), "fc")


def alexnet(s: Read, x: Tensor) -> Tensor:
    """cassidylaidlaw/perceptual-advex, perceptual_advex/models.py, CifarAlexNet in evaluation mode."""
    for number, stride, pool in ((0, 2, True), (3, 1, True), (6, 1, False), (8, 1, False), (10, 1, True)):
        at = f"features.{number}"
        x = F.relu(F.conv2d(x, s[f"{at}.weight"], s[f"{at}.bias"], stride=stride, padding=1))
        x = F.max_pool2d(x, 2) if pool else x
    x = x.reshape(len(x), 256 * 2 * 2)
    return s.linear(F.relu(s.linear(F.relu(s.linear(x, "classifier.1")), "classifier.4")), "classifier.6")


@pytest.mark.parametrize(
    ("name", "args", "literal"),
    [
        ("resnet_18", {}, resnet),
        ("preact_resnet_18", {}, preact_resnet),
        ("preact_resnet_18", {"activation": "relu"}, lambda s, x: preact_resnet(s, x, F.relu)),
        ("wide_resnet", {}, dm_wide_resnet),
        ("wide_resnet", {"activation": "relu"}, lambda s, x: dm_wide_resnet(s, x, F.relu)),
        ("wide_resnet_trades", {}, trades_wide_resnet),
        ("alexnet_cifar", {}, alexnet),
    ],
    ids=["resnet", "preact softplus", "preact relu", "wide silu", "wide relu", "wide trades", "alexnet"],
)
def test_a_backbone_computes_what_its_source_does_from_the_sources_names(
    name: str, args: dict[str, Any], literal: Any
) -> None:
    model, x = shaken(name, **args), images()
    state = Read(model)
    with torch.no_grad():
        expected, found = literal(state, x), model(x)
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert state.used == {entry for entry in state if not entry.endswith("num_batches_tracked")}


def test_resnet_18_is_pyautoattacks_and_takes_its_weights() -> None:
    file = weights_file("pyautoattack")
    spec = importlib.util.spec_from_file_location("pyautoattack_resnet", file.with_name("resnet.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.ResNet18()
    theirs.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    ours = create_model("resnet_18", num_classes=10, weights="pyautoattack").eval()
    assert {f"backbone.{name}" for name in theirs.state_dict()} == set(ours.state_dict()) - {"mean", "std"}
    x = images(4).float().clamp(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs.eval()(x))


@pytest.mark.slow
@pytest.mark.skipif("ROME_CIFAR10" not in os.environ, reason="set ROME_CIFAR10 to a folder with CIFAR-10")
def test_pyautoattacks_weights_know_cifar10() -> None:
    """Even of images that went through JPEG, 86 of 100 are told right; a wrong layer or normalisation costs most."""
    x, y = Cifar10(path=os.environ["ROME_CIFAR10"], test_limit=500).open("test").first(500)
    model = create_model("resnet_18", num_classes=10, weights="pyautoattack").eval()
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in x.split(100)]) == y
    assert right.float().mean() > 0.8


def test_alexnets_features_are_the_five_relus() -> None:
    model = create_model("alexnet_cifar", num_classes=10)
    seen: dict[str, Tensor] = {}
    for name in FEATURE_LAYERS:
        module = model.backbone.get_submodule(name)
        assert isinstance(module, nn.ReLU)
        module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: out, name + " in": args[0]}))
    x = images(2).float().clamp(0, 1)
    model.eval()(x)
    sizes = [(64, 16, 16), (192, 8, 8), (384, 4, 4), (256, 4, 4), (256, 4, 4)]
    assert [tuple(seen[name].shape[1:]) for name in FEATURE_LAYERS] == sizes
    for name in FEATURE_LAYERS:  # neither was overwritten by a later layer
        assert torch.equal(seen[name], seen[name + " in"].relu())
        assert (seen[name + " in"] < 0).any()


# As models


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("resnet_18", (0, 0, 0), (1, 1, 1)),
        ("preact_resnet_18", (0, 0, 0), (1, 1, 1)),
        ("wide_resnet", (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)),
        ("wide_resnet_trades", (0, 0, 0), (1, 1, 1)),
        ("alexnet_cifar", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_a_model_normalises_as_its_source_does(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with torch.device("meta"):
        recipe = create_model(name, num_classes=10, **TINY[name]).recipe
    assert recipe is not None
    assert recipe["mean"] == pytest.approx(mean)
    assert recipe["std"] == pytest.approx(std)


@pytest.mark.parametrize("name", ["resnet_18", "preact_resnet_18", "wide_resnet", "wide_resnet_trades"])
def test_other_sizes_channels_and_classes(name: str) -> None:
    model = create_model(name, num_classes=7, in_chans=1, **TINY[name]).eval()
    for size in (8, 40):
        assert model(torch.rand(2, 1, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_learns(name: str) -> None:
    model = BACKBONES[name](**TINY[name])
    F.cross_entropy(model(images(8).float()), torch.arange(8)).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, parameter_name


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("wide_resnet", {"depth": 27, "width": 10}, r"a Wide ResNet's depth is 6n \+ 4 \(10, 16, .*not 27"),
        ("wide_resnet", {"depth": 4, "width": 10}, "not 4"),
        ("wide_resnet", {"depth": 28}, r"cannot be built with .*depth=28.*width"),
        ("wide_resnet_28_10", {"activation": "swish"}, "unknown activation 'swish'; choose relu, silu, softplus"),
        ("preact_resnet_18", {"activation": "gelu"}, "unknown activation 'gelu'"),
        ("resnet_18", {"img_size": 32}, "cannot be built with img_size=32"),
        ("resnet_18", {"pretrained": True}, r"model\.pretrained is for timm's models, not resnet_18; .*model\.weights"),
        ("preact_resnet18", {}, "unknown model 'preact_resnet18'. Did you mean 'preact_resnet_18'"),
        ("wide_resnet_28_1", {}, "unknown model 'wide_resnet_28_1'. Did you mean 'wide_resnet_28_10'"),
    ],
    ids=str,
)
def test_a_mistake_is_explained(name: str, args: dict[str, Any], message: str) -> None:
    with torch.device("meta"), pytest.raises(UserError, match=message):
        create_model(name, num_classes=10, **args)
