"""Small models of every family, random numbers for them, and experts as after some training."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.experts import MixtureLayer, expert_layers
from rome.models.classifier import Classifier

THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))
"""Of every process that a test starts: other sums would make another model."""

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grow(model: nn.Module) -> nn.Module:
    """Experts as after some training: every parameter of theirs drawn anew, so that none is 0 or equals another."""
    g = torch.Generator().manual_seed(0)
    for layer in expert_layers(model).values():
        for name, parameter in layer.named_parameters():
            if name not in layer.shared and "projection" not in name:
                scale = 2.0 if name.startswith("gate") else 0.5
                parameter.data = scale * torch.randn(parameter.shape, generator=g).to(parameter)
    return model


def gates_at(layer: MixtureLayer, h: Tensor) -> Tensor:
    """Gate weights (B, T, K) for tokens (B, T, d); tests/test_gating.py pins what gates do."""
    return layer.gate(h @ layer.gate.rows().t()).weights


def drawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Matrices and filters drawn anew, uniformly with variance 1 / inputs, and no bias: the same bits on every kind of
    CPU, which torch.randn does not give."""
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            weight = 2 * torch.rand(parameter.shape, generator=draws, dtype=torch.float64) - 1
            parameter.data = (weight * math.sqrt(3 / weight[0].numel())).to(parameter)
        elif name.endswith("bias"):
            parameter.data = torch.zeros_like(parameter)
    return model


def knowing(model: nn.Module, head: nn.Linear, x: Tensor, y: Tensor, *, ridge: float = 30) -> nn.Module:
    """The model with its head fitted to images and labels by ridge regression on what the head sees: a closed form,
    computed in float64, where training would make another model with every kind of CPU and number of threads."""
    seen: list[Tensor] = []
    with head.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].double())), torch.no_grad():
        model.eval()(x)
        features = F.pad(seen[0], (0, 1), value=1.0)
        squares = features.t() @ features + ridge * torch.eye(features.shape[1], dtype=torch.float64)
        targets = F.one_hot(y, head.out_features).double()
        solved = 10 * torch.linalg.solve(squares, features.t() @ targets).t()
        head.weight.copy_(solved[:, :-1])
        head.bias.copy_(solved[:, -1])
    return model


class Line(nn.Module):
    """Images of one pixel p, logits (0, (p - 1/2) / 2). The features (cos p, sin p) make the perceptual distance of two
    images 2 sin(|p - p'| / 2), which is |p - p'| up to |p - p'|^3 / 24."""

    feature_layers = ("circle",)

    def __init__(self) -> None:
        super().__init__()
        self.circle = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        self.circle(torch.cat([x.cos(), x.sin()], dim=1))
        return F.pad((x.flatten(1) - 0.5) / 2, (1, 0))


def timm_model(name: str, **args: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **(TINY | args))


def plain_swin() -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(1, 1)
    )


def images(count: int = 3, size: tuple[int, int] = (32, 32)) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class SmallCNN(nn.Module):
    """Stem, a residual block with a 1x1 shortcut, a depthwise convolution, a head: 8x8 images of one channel."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.block = nn.ModuleList([nn.ModuleDict(self._block())])
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Linear(6, num_classes)

    @staticmethod
    def _block() -> dict[str, nn.Module]:
        return {
            "conv1": nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False),
            "norm": nn.BatchNorm2d(6),
            "conv2": nn.Conv2d(6, 6, 3, padding=1, bias=False),
            "shortcut": nn.Conv2d(4, 6, 1, stride=2, bias=False),
        }

    def forward(self, x: Tensor) -> Tensor:
        (block,) = self.block
        h = self.stem(x).relu()
        h = block["shortcut"](h) + block["conv2"](block["norm"](block["conv1"](h)).relu())
        return self.head(self.depthwise(h).relu().mean((2, 3)))


def small_cnn() -> SmallCNN:
    torch.manual_seed(0)
    return SmallCNN()


def tiny_vit(**changes: Any) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", **(TINY | changes))


def tiny_swin(*, window: int = 4, depths: tuple[int, ...] = (1, 1), dynamic: bool = False) -> nn.Module:
    return timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=32,
        window_size=window,
        embed_dim=8,
        depths=depths,
        num_heads=(1, 1),
        num_classes=10,
        strict_img_size=not dynamic,
    )


def cnn(seed: int = 0, classes: int = 5) -> nn.Module:
    """Two ReLU layers and a head for 3x8x8 images, float64; the backbone says which layers count."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(128, classes),
        )  # fmt: skip
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, std=0.3)
    backbone.feature_layers = ("1", "3")
    return Classifier(backbone, (0.5,) * 3, (0.25,) * 3).double().eval().requires_grad_(False)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def assert_computes_the_same(plain: nn.Module, adapted: nn.Module, images: Tensor) -> None:
    """Logits and input gradients of both are equal to the last bit, in either mode."""
    for training in (True, False):
        results = []
        for model in (plain.train(training), adapted.train(training)):
            x = images.clone().requires_grad_()
            logits = model(x)
            results.append((logits, *torch.autograd.grad(logits.square().sum(), x)))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other)
