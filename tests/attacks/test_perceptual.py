"""Features and perceptual distance: by hand, against a literal computation, and nothing left on the network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from helpers.problems import recorded
from helpers.small_models import cnn, hooks
from rome.attacks.perceptual.features import (
    ALL,
    Features,
    Perception,
    distance,
    distances,
    feature_layers,
    loaded,
    measure,
)
from rome.core.errors import UserError
from rome.models import create_model, save_model
from rome.threats import Perceptual, Threat


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def literal(activations: list[Tensor]) -> Tensor:
    """phi of one image from its activations (C, H, W), position by position."""
    parts = []
    for activation in activations:
        _, height, width = activation.shape
        for i in range(height):
            for j in range(width):
                column = activation[:, i, j]
                parts.append(column / (column.square().sum().sqrt() + 1e-10) / math.sqrt(height * width))
    return torch.cat(parts)


# The distance


def test_the_distance_of_a_case_by_hand() -> None:
    """Two positions, two channels: (3, 4) and (5, 0) against (0, 2) and (1, 0).

    Scaled to length 1: (0.6, 0.8), (1, 0) and (0, 1), (1, 0). The squared difference 0.36 + 0.04 is divided by 2
    positions; the second layer is twice the first, which changes nothing, and counts once more.
    """
    network = nn.Sequential(nn.Identity(), nn.Conv2d(2, 2, 1, bias=False), nn.Flatten())
    nn.init.zeros_(network[1].weight)
    network[1].weight.data[[0, 1], [0, 1]] = 2.0
    one = torch.tensor([[3.0, 5.0], [4.0, 0.0]]).view(1, 2, 1, 2)
    other = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).view(1, 2, 1, 2)
    for layers, expected in ((("0",), math.sqrt(0.2)), (("0", "1"), math.sqrt(0.4))):
        features = Features(network, layers)
        assert distance(features.phi(one), features.phi(other)).item() == pytest.approx(expected, rel=1e-6)


def test_features_are_those_of_a_literal_computation(images: Tensor) -> None:
    model = cnn()
    _, phi = Features(model)(images)
    first = model.backbone[1](model.backbone[0]((images - 0.5) / 0.25))
    second = model.backbone[3](model.backbone[2](first))
    expected = [literal([first[i], second[i]]) for i in range(4)]
    torch.testing.assert_close(phi.square().sum(1), torch.stack(expected).square().sum(1))
    for i in range(4):  # the order of coordinates is free, distances are not
        for j in range(4):
            d = (expected[i] - expected[j]).square().sum().sqrt()
            torch.testing.assert_close(distance(phi[i : i + 1], phi[j : j + 1])[0], d)


def test_a_batch_has_the_distance_of_each_pair_and_no_sum_over_them(images: Tensor) -> None:
    model, threat = cnn(), Perceptual(bound=1)
    together = measure(threat, model, images.flip(0), images)
    alone = [measure(threat, model, one[None], other[None]) for one, other in zip(images.flip(0), images, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone))
    assert len(set(together[:2].tolist())) == 2


def test_a_position_where_nothing_is_active_has_no_direction_and_no_infinite_gradient() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Flatten())
    nn.init.constant_(network[0].weight, 1.0)
    nn.init.constant_(network[0].bias, -0.5)  # black pixels give 0 in all channels
    x = torch.tensor([0.0, 0.9]).view(1, 1, 1, 2).requires_grad_()
    _, phi = Features(network, ("1",))(x)
    assert phi.view(2, 2)[:, 0].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(phi.sum(), x)
    assert gradient.isfinite().all()
    assert gradient[..., 0] == 0


def test_half_precision_activations_are_compared_in_float32(images: Tensor) -> None:
    model = cnn().float()
    with torch.autocast("cpu", torch.bfloat16):
        _, reduced = Features(model)(images.float())
    assert reduced.dtype == torch.float32
    _, phi = Features(model)(images.float())
    assert not torch.equal(reduced, phi)
    torch.testing.assert_close(reduced, phi, atol=0.02, rtol=0)


def test_measure_takes_the_model_or_the_network_of_the_file(images: Tensor, tmp_path: Path) -> None:
    model = cnn(0)
    network = create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8), patch_size=1)
    save_model(network, tmp_path / "small" / "model.safetensors")
    moved = (images + 0.1 * torch.rand_like(images)).clamp(0, 1)
    found = measure(Perceptual(bound=1), model, moved, images)
    torch.testing.assert_close(found, distance(Features(model).phi(moved), Features(model).phi(images)))
    moved, images = moved.float(), images.float()
    found = measure(Perceptual(bound=1, features=str(tmp_path / "small")), model, moved, images)
    seen = Features(network.eval())
    torch.testing.assert_close(found, distance(seen.phi(moved), seen.phi(images)).detach())
    assert (found > 0.01).all()


# Which layers


def names(model: str, **settings: object) -> tuple[str, ...]:
    return feature_layers(create_model(model, num_classes=3, **settings))


def test_each_kind_of_backbone_has_its_layers() -> None:
    quarters = ("blocks.2", "blocks.5", "blocks.8", "blocks.11")
    vit = {"embed_dim": 12, "num_heads": 2, "img_size": 32}
    assert names("vit_tiny_patch16_224", **vit) == quarters
    assert names("vit_tiny_patch16_224", **vit, depth=3) == ("blocks.0", "blocks.1", "blocks.2")
    assert names("vit_tiny_patch16_224", **vit, depth=1) == ("blocks.0",)
    assert names("deit_tiny_distilled_patch16_224", **vit) == quarters
    assert names("xcit_nano_12_p16_224", embed_dim=16, num_heads=2, img_size=32) == quarters
    assert names("resnet18") == ("layer1", "layer2", "layer3", "layer4")
    assert names("convnext_atto") == ("stages.0", "stages.1", "stages.2", "stages.3")
    assert names("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(2, 2), embed_dim=8) == (
        "layers.0",
        "layers.1",
    )
    assert feature_layers(cnn()) == ("1", "3")


def test_torchvisions_alexnet_is_seen_at_its_relus_although_they_work_in_place() -> None:
    """The network of images of 224 pixels."""
    with torch.device("meta"):
        network = torchvision.models.alexnet()
    network.classifier = nn.Flatten()  # the rest is large and not looked at
    network.to_empty(device="cpu")
    g = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g) / math.sqrt(parameter[0].numel())
    images = torch.rand(2, 3, 64, 64, generator=g)
    features = Features(network.eval().requires_grad_(False))
    assert features.layers == tuple(f"features.{number}" for number in (1, 4, 7, 9, 11))
    seen, maps = images, []
    for module in network.features:
        seen = module(seen.clone())
        if isinstance(module, nn.ReLU):
            maps.append(seen.clone())
    assert len(maps) == 5
    one, other = (literal([each[i] for each in maps]) for i in (0, 1))
    phi = features.phi(images)
    torch.testing.assert_close(distance(phi[:1], phi[1:])[0], (one - other).norm())
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(distance(*features.phi(leaf).split(1)), leaf)
    assert gradient.abs().amax() > 0


def test_layers_that_cannot_be_told_are_asked_for() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten())
    with pytest.raises(UserError, match=r"Sequential are unknown; name them .* Its modules are 0, 1, 2"):
        Features(plain)
    assert Features(plain, ("1",)).layers == ("1",)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "xcit_nano_12_p16_224"])
def test_tokens_count_without_those_that_are_no_patch(model: str) -> None:
    net = create_model(model, num_classes=3, img_size=32, patch_size=16, embed_dim=16, num_heads=2, depth=4).eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs: list[Tensor] = []
        handle = net.backbone.blocks[2].register_forward_hook(lambda module, args, out: outputs.append(out))
        net(x)
        handle.remove()
        patches = outputs[0][:, -4:]  # 2x2, last
        maps = patches.transpose(1, 2).reshape(2, 16, 2, 2)
        expected = torch.stack([literal([image]) for image in maps])
        torch.testing.assert_close(Features(net, ("blocks.2",)).phi(x), expected)


def test_channels_last_is_understood() -> None:
    net = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, depths=(1, 1), num_heads=(2, 2), embed_dim=8)
    net.eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = Features(net)
        with features.recording() as found:
            net(x)
        last = net.forward_features(x)  # the last stage, then a norm
        assert features.joined(found).shape == (2, 8 * 8 * 8 + 4 * 4 * 16)
        assert last.shape == (2, 4, 4, 16)
        torch.testing.assert_close(found["layers.1"].view(2, 16, 16).norm(dim=2), torch.full((2, 16), 0.25))


# One forward, and nothing stays


def test_logits_and_features_come_from_one_forward_and_nothing_stays(images: Tensor) -> None:
    model = cnn()
    features = Features(model)
    with recorded(model) as calls:
        logits, phi = features(images)
    assert len(calls.forwards) == 1
    assert torch.equal(logits, model(images))
    assert torch.equal(phi, features.phi(images))
    assert hooks(model) == 0


def test_features_alone_end_at_the_last_layer(images: Tensor) -> None:
    model = cnn()
    ran: list[int] = []
    handles = [
        module.register_forward_hook(lambda module, args, out, i=i: ran.append(i))
        for i, module in enumerate(model.backbone)
    ]
    Features(model).phi(images)
    assert ran == [0, 1, 2, 3], "neither flattened nor classified"
    for handle in handles:
        handle.remove()
    assert hooks(model) == 0


def test_hooks_are_gone_after_an_error(images: Tensor) -> None:
    model = cnn()
    with pytest.raises(RuntimeError):
        Features(model)(images[:, :, :5, :5])
    assert hooks(model) == 0


def test_features_follow_gradients_only_where_asked(images: Tensor) -> None:
    model = cnn()
    x = images.clone().requires_grad_()
    assert Features(model)(x)[1].requires_grad
    with torch.no_grad():
        assert not Features(model).phi(x).requires_grad


def test_a_compiled_model_has_the_same_features(images: Tensor) -> None:
    model = cnn()
    _, expected = Features(model)(images)
    whole = torch.compile(model, backend="eager")
    model.compile(backend="eager")
    model(images)  # compiled without hooks
    for compiled in (model, whole):
        _, phi = Features(compiled)(images)
        assert torch.equal(phi, expected)
        assert torch.equal(Features(compiled).phi(images), expected)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("9",), "Sequential has no layer '9'"),
        (("relu",), "runs more than once"),
        (("never",), "did not run"),
        (("pair",), r"layer pair gives tuple, not images \(B, C, H, W\)"),
    ],
)
def test_layers_that_do_not_serve_are_refused(layers: tuple[str, ...], message: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu, self.never = nn.ReLU(), nn.ReLU()
            self.pair = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.pair(self.relu(x).mean(2).transpose(1, 2))[0]).flatten(1)

    with pytest.raises(UserError, match=message):
        Features(Odd() if layers != ("9",) else nn.Sequential(nn.ReLU()), layers)(torch.rand(2, 3, 4, 4))


def test_only_a_module_has_layers() -> None:
    with pytest.raises(UserError, match="not of a function"):
        Features(lambda x: x)


# Several networks in one batch


def test_a_mixed_batch_is_seen_by_each_network_where_it_measures(images: Tensor) -> None:
    model, network = cnn(0), cnn(1)
    fixed = Perceptual(bound=1, features="net").measured_by(network)
    seen = Perception(model, [(Perceptual(bound=1), slice(0, 3)), (fixed, slice(3, 4))])
    with recorded(model) as own, recorded(network) as other:
        logits, phi = seen(images)
        assert [len(batch) for batch in own.forwards] == [4]
        assert [len(batch) for batch in other.forwards] == []  # it stops before its end
        alone = seen.features(images)
    assert torch.equal(logits, model(images))
    for part, again in zip(phi, alone, strict=True):
        torch.testing.assert_close(part, again)
    torch.testing.assert_close(phi[0], Features(model).phi(images[:3]))
    torch.testing.assert_close(phi[1], Features(network).phi(images[3:]))
    origin = seen.features(images.flip(0))
    assert torch.equal(distances(phi, origin), torch.cat([distance(a, b) for a, b in zip(phi, origin, strict=True)]))


def test_a_network_that_does_not_take_the_images_is_named(images: Tensor) -> None:
    narrow = nn.Sequential(nn.Conv2d(7, 2, 1), nn.ReLU()).double()
    fixed = Perceptual(bound=1, features="runs/narrow", layers=("1",)).measured_by(narrow)
    with pytest.raises(UserError, match="network of LPIPS-narrow does not take 4 images of 3x8x8: "):
        Perception(cnn(), [(fixed, ALL)]).features(images)


# The threat


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ("self", "LPIPS-self"),
        ("runs/alexnet", "LPIPS-alexnet"),
        ("runs/alexnet/", "LPIPS-alexnet"),
        ("runs/alexnet/model.safetensors", "LPIPS-alexnet"),
        ("nets/alexnet-v1.2", "LPIPS-alexnet-v1.2"),
        ("nets/small.safetensors", "LPIPS-small"),
        ("model.safetensors", "LPIPS-model"),
    ],
)
def test_a_threat_is_called_after_its_network(features: str, name: str) -> None:
    assert Perceptual(bound=0.5, features=features).name == name


def test_a_perceptual_threat_is_plain_data(images: Tensor) -> None:
    threat = Perceptual(bound="1/2", features="runs/alexnet", layers=("features.1",))
    dump = {"kind": "perceptual", "bound": 0.5, "features": "runs/alexnet", "layers": ["features.1"]}
    assert threat.dump() == threat.measured_by(cnn()).dump() == dump
    assert Threat.model_validate(dump) == threat
    for wrong in (-1, float("nan"), None):
        with pytest.raises(UserError, match="bound"):
            Perceptual(bound=wrong)


def test_alone_it_checks_the_box(images: Tensor) -> None:
    threat = Perceptual(bound=0.0)
    images[1, 0, 0, 0], images[2, 0, 0, 0], images[3, 0, 0, 0] = 1.01, float("nan"), 1.0
    assert threat.contains(images, torch.zeros_like(images)).tolist() == [True, False, False, True]
    assert threat.project(images[:2], images[:2]).amax() == 1.0
    with pytest.raises(UserError, match=r"LPIPS-self cannot measure without a network: .*features\.measure"):
        threat.size(images, images)


def test_a_network_in_hand_leaves_the_threat_as_it_was() -> None:
    threat, network = Perceptual(bound=1, features="net"), cnn()
    held = threat.measured_by(network)
    assert held.network is network
    assert threat.network is None
    assert loaded(Perceptual(bound=1), "cpu").network is None  # self: the attacked model


def test_a_network_is_read_frozen_and_in_evaluation_mode(tmp_path: Path) -> None:
    network = create_model("convnext_atto", num_classes=5, depths=(1, 1, 1, 1), dims=(4, 8, 8, 8))
    save_model(network, tmp_path / "small.safetensors")
    read = loaded(Perceptual(bound=1, features=str(tmp_path / "small.safetensors")), "cpu").network
    assert read is not None
    assert not any(module.training for module in read.modules())
    assert not any(parameter.requires_grad for parameter in read.parameters())
    with pytest.raises(UserError, match="there is no model at"):
        loaded(Perceptual(bound=1, features=str(tmp_path / "nowhere")), "cpu")


def test_the_alexnet_of_the_paper_measures_at_its_relus() -> None:
    backbones = pytest.importorskip("rome.models.backbones")
    network = backbones.alexnet_cifar()
    found = [network.get_submodule(name) for name in feature_layers(network)]
    assert [type(module) for module in found] == [nn.ReLU] * 5
    x = torch.rand(2, 3, 32, 32)
    sizes = 16**2 * 64 + 8**2 * 192 + 4**2 * (384 + 256 + 256)
    assert Features(network.eval()).phi(x).shape == (2, sizes)
