"""rome's own backbones, from normalised images to logits. ``rome.create_model`` and ``model.name`` take their names."""

from __future__ import annotations

from collections.abc import Callable

from rome.models.backbones.alexnet import alexnet_cifar
from rome.models.backbones.common import IDENTITY, Backbone, Normalization
from rome.models.backbones.resnet import preact_resnet_18, resnet_18
from rome.models.backbones.wide_resnet import wide_resnet, wide_resnet_28_10, wide_resnet_94_16, wide_resnet_trades

_BUILDERS: tuple[Callable[..., Backbone], ...] = (
    alexnet_cifar,
    preact_resnet_18,
    resnet_18,
    wide_resnet,
    wide_resnet_28_10,
    wide_resnet_94_16,
    wide_resnet_trades,
)
BACKBONES = {builder.__name__: builder for builder in _BUILDERS}
"""Builders by name. Each takes ``num_classes``, ``in_chans`` and its own arguments, and returns a module whose
attribute ``normalization`` is the normalisation it expects."""
