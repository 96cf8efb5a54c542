"""ResNet-18 for small images (He et al. 2016, arXiv:1512.03385, with the 3x3 stem that is usual for CIFAR), and its
pre-activation form (He et al. 2016, arXiv:1603.05027) as used in multi-norm training (E-AT, RAMP).

Both have four groups of two blocks with w, 2w, 4w and 8w channels and no max pooling, and take unnormalised images in
[0, 1].
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from rome.models.backbones.common import Backbone, Pool, conv1x1, conv3x3, groups, make_activation


class BasicBlock(nn.Module):
    """relu(x' + bn(conv(relu(bn(conv(x)))))), where x' is x, or bn(1x1 conv(x)) if the shape changes."""

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


class PreActBlock(nn.Module):
    """x' + conv(act(bn(conv(a)))) with a = act(bn(x)); x' is x, or a 1x1 convolution of a if the shape changes."""

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


def resnet_18(*, num_classes: int = 10, in_chans: int = 3, width: int = 64) -> Backbone:
    """ResNet-18 for small images: 3x3 stem, no max pooling, no normalisation of the input.

    11,173,962 parameters with 10 classes. The names of the weights (``conv1``, ``layer1.0.bn2``,
    ``layer2.0.shortcut.0``, ``linear``) are those of the ResNet-18 in AutoAttack's repository (fra31/auto-attack,
    ``examples``) and in RobustBench. ``weights: pyautoattack`` loads the weights that come with pyautoattack.
    """
    parts = OrderedDict[str, nn.Module](
        conv1=conv3x3(in_chans, width),
        bn1=nn.BatchNorm2d(width),
        act=nn.ReLU(),
        **_layers(BasicBlock, width),
        pool=Pool(),
        linear=nn.Linear(8 * width, num_classes),
    )
    return Backbone(parts)


def preact_resnet_18(
    *, num_classes: int = 10, in_chans: int = 3, width: int = 64, activation: str = "softplus"
) -> Backbone:
    """Pre-activation ResNet-18 of E-AT and RAMP: softplus (or relu) in the blocks, no normalisation of the input.

    11,172,170 parameters with 10 classes. The last activation is ReLU whatever the blocks use, as in E-AT
    (fra31/robust-finetuning, ``model_zoo/fast_models.py``). The names of the weights (``layer1.0.bn1``,
    ``layer2.0.shortcut.0``, ``bn``, ``linear``) are E-AT's too.
    """
    parts = OrderedDict[str, nn.Module](
        conv1=conv3x3(in_chans, width),
        **_layers(partial(PreActBlock, activation=activation), width),
        bn=nn.BatchNorm2d(8 * width),
        act=nn.ReLU(),
        pool=Pool(),
        linear=nn.Linear(8 * width, num_classes),
    )
    return Backbone(parts)


def _layers(block: Callable[[int, int, int], nn.Module], width: int) -> dict[str, nn.Module]:
    made = groups(block, 2, [width, width, 2 * width, 4 * width, 8 * width])
    return {f"layer{number}": layer for number, layer in enumerate(made, start=1)}
