"""Parts shared by the backbones: normalisations, activations, convolutions, groups of blocks, and their base class."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor, nn


class Normalization(NamedTuple):
    """Per-channel mean and standard deviation with which a backbone expects its input to be normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IDENTITY = Normalization((0.0,), (1.0,))
CIFAR10_STATISTICS = Normalization((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
IMAGENET_STATISTICS = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "silu": nn.SiLU, "softplus": nn.Softplus}


def make_activation(name: str) -> nn.Module:
    """Return a new activation module: relu, silu (x sigmoid(x), also called Swish) or softplus (log(1 + exp(x))).

    Raises:
        ValueError: the name is none of these.
    """
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; choose {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]()


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, *, padding: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias, for use before a normalisation."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding, bias=False)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)


def groups(
    block: Callable[[int, int, int], nn.Module], blocks: int, channels: Sequence[int]
) -> Iterator[nn.Sequential]:
    """Yield groups of ``blocks`` blocks each; group i maps ``channels[i]`` to ``channels[i + 1]`` channels.

    ``block(in_channels, out_channels, stride)`` builds one block. All groups but the first begin with a stride of 2.
    """
    for group, (inputs, outputs) in enumerate(pairwise(channels)):
        rest = (block(outputs, outputs, 1) for _ in range(blocks - 1))
        yield nn.Sequential(block(inputs, outputs, 2 if group else 1), *rest)


class Pool(nn.Module):
    """Global average pooling, (B, C, H, W) to (B, C), for any image size; at 32 pixels, equal to fixed windows."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.mean((2, 3))


class Backbone(nn.Sequential):
    """A sequence of parts, named as in the published checkpoints."""

    feature_layers: tuple[str, ...] = ()
    """Modules whose outputs are the perceptual features; if empty, see :mod:`rome.attacks.perceptual.features`."""
    unused: tuple[str, ...] = ()
    """Prefixes of names in published checkpoints that the network does not need."""

    def __init__(self, parts: OrderedDict[str, nn.Module], normalization: Normalization = IDENTITY) -> None:
        super().__init__(parts)
        self.normalization = normalization
