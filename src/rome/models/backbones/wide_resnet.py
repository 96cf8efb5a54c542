"""Wide ResNets (Zagoruyko and Komodakis 2016, arXiv:1605.07146) as DeepMind and RobustBench build them."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from rome.models.backbones.common import (
    CIFAR10_STATISTICS,
    IDENTITY,
    Normalization,
    conv1x1,
    conv3x3,
    make_activation,
    pooled,
    stage,
)


class WideBlock(nn.Module):
    """x' + conv(act(bn(conv(a)))) with a = act(bn(x)); x' is x, or a 1x1 convolution of a where channels change.

    A stride of 2 pads right and below only, as TensorFlow's ``SAME`` does for even sizes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.relu_0 = make_activation(activation)
        self.conv_0 = conv3x3(in_channels, out_channels, stride, padding=1 if stride == 1 else 0)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.relu_1 = make_activation(activation)
        self.conv_1 = conv3x3(out_channels, out_channels)
        self.shortcut = conv1x1(in_channels, out_channels, stride) if in_channels != out_channels else None
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu_0(self.batchnorm_0(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        residual = self.conv_0(active if self.stride == 1 else F.pad(active, (0, 1, 0, 1)))
        return kept + self.conv_1(self.relu_1(self.batchnorm_1(residual)))


def sizes(depth: int, width: int) -> tuple[int, list[int]]:
    """Blocks in each of three groups, and channels behind the stem and the groups."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"a Wide ResNet's depth is 6n + 4 (10, 16, 22, 28, ...), not {depth}")
    return (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]


def group(name: str, blocks: nn.Sequential) -> nn.Sequential:
    """Blocks of one width, under the name that weights have there."""
    return nn.Sequential(OrderedDict({name: blocks}))


class WideResNet(nn.Module):
    """Stem of 16 channels, three groups of (depth - 4)/6 blocks at 16w, 32w, 64w channels, batch norm, mean, linear.

    Expects CIFAR-10's normalisation, which :class:`rome.models.Classifier` puts in front. Names of weights are those
    of RobustBench's ``DMWideResNet`` (``model_zoo/architectures/dm_wide_resnet.py``; first in deepmind-research,
    ``adversarial_robustness/pytorch``), so its checkpoints load: ``init_conv``, ``layer.0.block.0.conv_0``,
    ``batchnorm``, ``logits``.
    """

    normalization: ClassVar[Normalization] = CIFAR10_STATISTICS

    def __init__(self, depth: int, width: int, *, num_classes: int, in_chans: int, activation: str) -> None:
        super().__init__()
        blocks, channels = sizes(depth, width)
        self.init_conv = conv3x3(in_chans, channels[0])
        block = partial(WideBlock, activation=activation)
        self.layer = nn.Sequential(
            *(group("block", stage(block, blocks, channels[i], channels[i + 1], min(i + 1, 2))) for i in range(3))
        )
        self.batchnorm = nn.BatchNorm2d(channels[3])
        self.relu = make_activation(activation)
        self.logits = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(pooled(self.relu(self.batchnorm(self.layer(self.init_conv(x))))))


class TradesBlock(nn.Module):
    """As :class:`WideBlock`, with ReLU and a stride of 2 that pads on all sides."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.convShortcut = conv1x1(in_channels, out_channels, stride) if in_channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        kept = x if self.convShortcut is None else self.convShortcut(active)
        return kept + self.conv2(F.relu(self.bn2(self.conv1(active))))


class TradesWideResNet(nn.Module):
    """The Wide ResNet of TRADES (Zhang et al. 2019, arXiv:1901.08573), and with it of AWP, MART, RST and others.

    It differs from :class:`WideResNet` in ReLU, in padding on all sides and in taking images in [0, 1] as they are, so
    the weights of one do not serve the other. Names of weights are those of TRADES' ``models/wideresnet.py``:
    ``conv1``, ``block1.layer.0.conv1``, ``bn1``, ``fc``.
    """

    normalization: ClassVar[Normalization] = IDENTITY
    unused: ClassVar[tuple[str, ...]] = ("sub_block1.",)
    """Tensors that published checkpoints hold beside: TRADES builds these layers and never calls them."""

    def __init__(self, depth: int, width: int, *, num_classes: int, in_chans: int) -> None:
        super().__init__()
        blocks, channels = sizes(depth, width)
        self.conv1 = conv3x3(in_chans, channels[0])
        self.block1 = group("layer", stage(TradesBlock, blocks, channels[0], channels[1], 1))
        self.block2 = group("layer", stage(TradesBlock, blocks, channels[1], channels[2], 2))
        self.block3 = group("layer", stage(TradesBlock, blocks, channels[2], channels[3], 2))
        self.bn1 = nn.BatchNorm2d(channels[3])
        self.fc = nn.Linear(channels[3], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(pooled(F.relu(self.bn1(maps))))


def wide_resnet_trades(
    *, depth: int = 34, width: int = 10, num_classes: int = 10, in_chans: int = 3
) -> TradesWideResNet:
    """Wide ResNet of TRADES and its followers, WRN-34-10 by default; 46,160,474 parameters, 10 classes."""
    return TradesWideResNet(depth, width, num_classes=num_classes, in_chans=in_chans)


def wide_resnet(
    *, depth: int, width: int, num_classes: int = 10, in_chans: int = 3, activation: str = "silu"
) -> WideResNet:
    """Wide ResNet of any depth (6n + 4) and width, such as ``args: {depth: 34, width: 20}``; SiLU by default."""
    return WideResNet(depth, width, num_classes=num_classes, in_chans=in_chans, activation=activation)


def wide_resnet_28_10(*, num_classes: int = 10, in_chans: int = 3, activation: str = "silu") -> WideResNet:
    """WRN-28-10 with SiLU, as RobustBench's Gowal2020Uncovering_28_10_extra; 36,479,194 parameters, 10 classes."""
    return wide_resnet(depth=28, width=10, num_classes=num_classes, in_chans=in_chans, activation=activation)


def wide_resnet_94_16(*, num_classes: int = 10, in_chans: int = 3, activation: str = "silu") -> WideResNet:
    """WRN-94-16 with SiLU, as RobustBench's Bartoldson2024Adversarial_WRN-94-16; 365,915,610 parameters."""
    return wide_resnet(depth=94, width=16, num_classes=num_classes, in_chans=in_chans, activation=activation)
