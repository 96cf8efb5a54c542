"""ResNet-18 for small images (He et al. 2016, arXiv:1512.03385, with the 3x3 stem that is usual for CIFAR)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from rome.models.backbones.common import IDENTITY, Normalization, conv1x1, conv3x3, pooled, stage


class BasicBlock(nn.Module):
    """relu(x' + bn(conv(relu(bn(conv(x)))))), where x' is x, or bn(1x1 conv(x)) where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            self.shortcut.extend([conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels)])

    def forward(self, x: Tensor) -> Tensor:
        residual = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (self.shortcut(x) + residual).relu()


class ResNet(nn.Module):
    """Four stages of basic blocks at w, 2w, 4w, 8w channels, halving the image before the last three; no max pooling.

    Takes images in [0, 1] as they are. Names of weights are those of the ResNet-18 that AutoAttack's repository
    (fra31/auto-attack, ``examples``) and RobustBench use: ``conv1``, ``layer1.0.bn2``, ``layer2.0.shortcut.0``,
    ``linear``.
    """

    normalization: ClassVar[Normalization] = IDENTITY

    def __init__(self, blocks: tuple[int, int, int, int], *, num_classes: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_chans, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = stage(BasicBlock, blocks[0], width, width, 1)
        self.layer2 = stage(BasicBlock, blocks[1], width, 2 * width, 2)
        self.layer3 = stage(BasicBlock, blocks[2], 2 * width, 4 * width, 2)
        self.layer4 = stage(BasicBlock, blocks[3], 4 * width, 8 * width, 2)
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.bn1(self.conv1(x)).relu()
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            maps = layer(maps)
        return self.linear(pooled(maps))


def resnet_18(*, num_classes: int = 10, in_chans: int = 3, width: int = 64) -> ResNet:
    """ResNet-18 for small images: 3x3 stem, no max pooling, no normalisation of the input.

    11,173,962 parameters with 10 classes. ``weights: pyautoattack`` loads the ones that pyautoattack ships.
    """
    return ResNet((2, 2, 2, 2), num_classes=num_classes, in_chans=in_chans, width=width)
