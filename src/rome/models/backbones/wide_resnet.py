"""Wide ResNets (Zagoruyko and Komodakis 2016, arXiv:1605.07146) as in DeepMind's code, RobustBench and TRADES."""

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
    """x' + conv(act(bn(conv(a)))) with a = act(bn(x)); x' is x, or a 1x1 convolution of a if channels change.

    With a stride of 2, only the right and bottom edges are padded, as TensorFlow's ``SAME`` does for even sizes.
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
    """Like :class:`WideBlock`, with ReLU, and with padding on all sides also at a stride of 2."""

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

    Expects CIFAR-10's normalisation. The names of the weights (``init_conv``, ``layer.0.block.0.conv_0``,
    ``batchnorm``, ``logits``) are those of RobustBench's ``DMWideResNet``
    (``model_zoo/architectures/dm_wide_resnet.py``; first in deepmind-research, ``adversarial_robustness/pytorch``), so
    its checkpoints can be loaded.
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

    Unlike :func:`wide_resnet` it uses ReLU, pads on all sides, and takes unnormalised images in [0, 1], so the weights
    of one do not suit the other. The names of the weights (``conv1``, ``block1.layer.0.conv1``, ``bn1``, ``fc``) are
    those of TRADES' ``models/wideresnet.py``. Published checkpoints also hold a ``sub_block1``, which TRADES builds but
    never calls (:attr:`Backbone.unused`).
    """
    blocks, channels = _sizes(depth, width)
    trades = groups(TradesBlock, blocks, channels)  # lazily, so that the first convolution is initialised before them
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
    """Number of blocks in each of the three groups, and of channels after the stem and after each group."""
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"a Wide ResNet's depth is 6n + 4 (10, 16, 22, 28, ...), not {depth}")
    return (depth - 4) // 6, [16, 16 * width, 32 * width, 64 * width]


def _inside(name: str, made: Iterable[nn.Sequential]) -> Iterator[nn.Sequential]:
    """Wrap each group in a module in which it has the name used by the published weights."""
    return (nn.Sequential(OrderedDict({name: blocks})) for blocks in made)
