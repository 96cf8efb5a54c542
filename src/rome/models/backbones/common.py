"""What the backbones share: normalisations, activations, convolutions, stages, the mean over positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn


class Normalization(NamedTuple):
    """Mean and standard deviation of each channel that a backbone's input is expected to be normalised with."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IDENTITY = Normalization((0.0,), (1.0,))
CIFAR10_STATISTICS = Normalization((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
IMAGENET_STATISTICS = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "softplus": nn.Softplus}


def make_activation(name: str) -> nn.Module:
    """A new module: relu, silu (x sigmoid(x), also called Swish) or softplus (log(1 + exp(x)), beta = 1).

    Raises:
        ValueError: another name.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, *, padding: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias: a normalisation follows."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def stage(
    block: Callable[[int, int, int], nn.Module], blocks: int, in_channels: int, out_channels: int, stride: int
) -> nn.Sequential:
    """So many blocks; ``block(in_channels, out_channels, stride)`` makes one, and the first has the stride."""
    rest = (block(out_channels, out_channels, 1) for _ in range(blocks - 1))
    return nn.Sequential(block(in_channels, out_channels, stride), *rest)


def pooled(maps: Tensor) -> Tensor:
    """The mean over positions, (B, C, H, W) to (B, C): any image size, and at 32 pixels what fixed windows give."""
    return maps.mean((2, 3))
