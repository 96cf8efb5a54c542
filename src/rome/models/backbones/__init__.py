"""Backbones of our own: normalised images to logits. ``rome.create_model`` and ``model.name`` know them by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from rome.models.backbones.alexnet import AlexNet, alexnet_cifar
from rome.models.backbones.common import IDENTITY, Normalization
from rome.models.backbones.preact_resnet import PreActResNet, preact_resnet_18
from rome.models.backbones.resnet import ResNet, resnet_18
from rome.models.backbones.wide_resnet import (
    WideResNet,
    wide_resnet,
    wide_resnet_28_10,
    wide_resnet_94_16,
    wide_resnet_trades,
)

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (
        alexnet_cifar,
        preact_resnet_18,
        resnet_18,
        wide_resnet,
        wide_resnet_28_10,
        wide_resnet_94_16,
        wide_resnet_trades,
    )
}
"""Builders by name. Each takes ``num_classes``, ``in_chans`` and its own arguments; what it builds says in
``normalization`` which normalisation it expects."""
