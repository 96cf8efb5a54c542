"""Pre-activation ResNet-18 as multi-norm training uses it (He et al. 2016, arXiv:1603.05027; E-AT, RAMP)."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from torch import Tensor, nn

from rome.models.backbones.common import IDENTITY, Normalization, conv1x1, conv3x3, make_activation, pooled, stage


class PreActBlock(nn.Module):
    """x' + conv(act(bn(conv(a)))) with a = act(bn(x)); x' is x, or a 1x1 convolution of a where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, activation: str) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        changes = stride != 1 or in_channels != out_channels
        self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride)) if changes else None
        self.act = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        active = self.act(self.bn1(x))
        kept = x if self.shortcut is None else self.shortcut(active)
        return kept + self.conv2(self.act(self.bn2(self.conv1(active))))


class PreActResNet(nn.Module):
    """Four stages of pre-activation blocks at w, 2w, 4w, 8w channels, then batch norm, ReLU, mean, linear.

    Takes images in [0, 1] as they are. The last activation is ReLU whatever the blocks use, as in E-AT
    (fra31/robust-finetuning, ``model_zoo/fast_models.py``), whose names the weights have: ``layer1.0.bn1``,
    ``layer2.0.shortcut.0``, ``bn``, ``linear``.
    """

    normalization: ClassVar[Normalization] = IDENTITY

    def __init__(
        self, blocks: tuple[int, int, int, int], *, num_classes: int, in_chans: int, width: int, activation: str
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_chans, width)
        block = partial(PreActBlock, activation=activation)
        self.layer1 = stage(block, blocks[0], width, width, 1)
        self.layer2 = stage(block, blocks[1], width, 2 * width, 2)
        self.layer3 = stage(block, blocks[2], 2 * width, 4 * width, 2)
        self.layer4 = stage(block, blocks[3], 4 * width, 8 * width, 2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv1(x)
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = layer(maps)
        return self.linear(pooled(self.bn(maps).relu()))


def preact_resnet_18(
    *, num_classes: int = 10, in_chans: int = 3, width: int = 64, activation: str = "softplus"
) -> PreActResNet:
    """Pre-activation ResNet-18 of E-AT and RAMP: softplus (or relu) in the blocks, no normalisation of the input.

    11,172,170 parameters with 10 classes.
    """
    return PreActResNet((2, 2, 2, 2), num_classes=num_classes, in_chans=in_chans, width=width, activation=activation)
