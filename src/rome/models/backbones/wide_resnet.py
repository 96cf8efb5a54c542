"""Wide ResNets (Zagoruyko and Komodakis 2016, arXiv:1605.07146) of DeepMind and RobustBench, and that of TRADES."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from rome.models.backbones.common import (
    CIFAR10_STATISTICS,
    Backbone,
    Pool,
    conv1x1,
    conv3x3,
    groups,
    make_activation,
)


class WideBlock(nn.Module):
    """x' + conv(act(bn(conv(a)))) with a = act(bn(x)); x' is x, or a 1x1 convolution of a where channels change.

    A stride of 2 pads right and below only, as TensorFlow's ``SAME`` does for even sizes.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(in_channels)
        self.conv_0 = conv3x3(in_channels, out_channels, stride, padding=1 if stride == 1 else 0)
        self.batchnorm_1 = nn.BatchNorm2d(out_channels)
        self.conv_1 = conv3x3(out_channels, out_channels)
        self.shortcut = conv1x1(in_channels, out_channels, stride) if in_channels != out_channels else None
        self.act, self.stride = make_activation(activation), stride

    def forward(self, x: Tensor) -> Tensor:
        active = self.act(self.batchnorm_0(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        residual = self.conv_0(active if self.stride == 1 else F.pad(active, (0, 1, 0, 1)))
        return kept + self.conv_1(self.act(self.batchnorm_1(residual)))


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


def wide_resnet(
    *, depth: int, width: int, num_classes: int = 10, in_chans: int = 3, activation: str = "silu"
) -> Backbone:
    """Wide ResNet of any depth (6n + 4) and width, such as ``args: {depth: 34, width: 20}``; SiLU by default.

    Expects CIFAR-10's normalisation. Names of weights are those of RobustBench's ``DMWideResNet``
    (``model_zoo/architectures/dm_wide_resnet.py``; first in deepmind-research, ``adversarial_robustness/pytorch``), so
    its checkpoints load: ``init_conv``, ``layer.0.block.0.conv_0``, ``batchnorm``, ``logits``.
    """
    blocks, channels = _sizes(depth, width)
    parts = OrderedDict[str, nn.Module](
        init_conv=conv3x3(in_chans, channels[0]),
        layer=nn.Sequential(*_inside("block", groups(partial(WideBlock, activation=activation), blocks, channels))),
        batchnorm=nn.BatchNorm2d(channels[3]),
        act=make_activation(activation),
        pool=Pool(),
        logits=nn.Linear(channels[3], num_classes),
    )
    return Backbone(parts, CIFAR10_STATISTICS)


def wide_resnet_28_10(*, num_classes: int = 10, in_chans: int = 3, activation: str = "silu") -> Backbone:
    """WRN-28-10 with SiLU, as RobustBench's Gowal2020Uncovering_28_10_extra; 36,479,194 parameters, 10 classes."""
    return wide_resnet(depth=28, width=10, num_classes=num_classes, in_chans=in_chans, activation=activation)


def wide_resnet_94_16(*, num_classes: int = 10, in_chans: int = 3, activation: str = "silu") -> Backbone:
    """WRN-94-16 with SiLU, as RobustBench's Bartoldson2024Adversarial_WRN-94-16; 365,915,610 parameters."""
    return wide_resnet(depth=94, width=16, num_classes=num_classes, in_chans=in_chans, activation=activation)


def wide_resnet_trades(*, depth: int = 34, width: int = 10, num_classes: int = 10, in_chans: int = 3) -> Backbone:
    """Wide ResNet of TRADES (Zhang et al. 2019, arXiv:1901.08573), AWP, MART, RST and others; 46,160,474 parameters.

    It differs from :func:`wide_resnet` in ReLU, in padding on all sides and in taking images in [0, 1] as they are, so
    the weights of one do not serve the other. Names of weights are those of TRADES' ``models/wideresnet.py``:
    ``conv1``, ``block1.layer.0.conv1``, ``bn1``, ``fc``. Published checkpoints hold more (:attr:`Backbone.unused`):
    TRADES builds a ``sub_block1`` and never calls it.
    """
    blocks, channels = _sizes(depth, width)
    trades = groups(TradesBlock, blocks, channels)  # made one by one, behind the first convolution
    parts = OrderedDict[str, nn.Module](
        conv1=conv3x3(in_chans, channels[0]),
        **{f"block{number}": part for number, part in enumerate(_inside("layer", trades), start=1)},
        bn1=nn.BatchNorm2d(channels[3]),
        act=nn.ReLU(),
        pool=Pool(),
        fc=nn.Linear(channels[3], num_classes),
    )
    network = Backbone(parts)
    network.unused = ("sub_block1.",)
    return network


def _sizes(depth: int, width: int) -> tuple[int, list[int]]:
    """Blocks in each of three groups, and channels behind the stem and the groups."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"a Wide ResNet's depth is 6n + 4 (10, 16, 22, 28, ...), not {depth}")
    return (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]


def _inside(name: str, made: Iterable[nn.Sequential]) -> Iterator[nn.Sequential]:
    """Each group under the name that weights have there."""
    return (nn.Sequential(OrderedDict({name: blocks})) for blocks in made)
