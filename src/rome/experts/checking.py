"""Checks that a model calls its experts, and that each row of the gates' input is an image."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.core.trial import failure, without_side_effects
from rome.experts.recording import expert_layers, record_gates

SIZES = (224, 32, 64, 128, 256, 384, 96, 28, 16, 8)
"""Image sides in pixels to try on a model that declares none."""


def check_experts(model: nn.Module, images: Tensor | None = None) -> None:
    """Check by a forward pass that every layer with experts runs, and that each row of its input is an image.

    Args:
        images: two or more, (B, C, H, W). None tries zeros of the size that the model declares and of common sizes if
            the model has a convolution; if it accepts none of them, its first own forward pass is checked.

    Raises:
        UserError: the check fails, or the model does not accept these images.
    """
    for batch in trial_images(model) if images is None else [images]:
        try:
            return _check_pass(model, batch)
        except Exception as error:  # a model may raise anything on images of the wrong size
            if images is not None or isinstance(error, UserError):
                raise failure(error, model, batch) from error
    FirstPassCheck(model)


def _check_pass(model: nn.Module, images: Tensor) -> None:
    with without_side_effects(model), record_gates(model) as recorder:
        model(images)
        recorder.check(len(images))


class FirstPassCheck:
    """A hook that checks two images of a model's first forward pass and then removes itself.

    It is in no state dict, and is copied and pickled with the model. A pass under torch.compile or torch.export is not
    checked.
    """

    def __init__(self, model: nn.Module) -> None:
        self.handle = model.register_forward_pre_hook(self.check, with_kwargs=True)

    def check(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        """Check the pass, even while its gates are being recorded.

        If experts were added twice, two hooks wait. The second removes itself during the check by the first, and torch
        then calls it without ``kwargs``.

        Raises:
            UserError: a layer does not run, or rows of its input are not images.
        """
        images = next((each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)), None)
        sinks = {layer: layer.sink for layer in expert_layers(model).values()}
        if images is None or not sinks or torch.compiler.is_compiling():
            return
        self.handle.remove()
        try:
            for layer in sinks:  # the gates of the pass itself may be recorded
                layer.sink = None
            _check_pass(model, images[:2])
        except BaseException:
            FirstPassCheck(model)
            raise
        finally:
            for layer, sink in sinks.items():
                layer.sink = sink


def trial_images(model: nn.Module) -> Iterator[Tensor]:
    """Yield two zero images of each likely size, the declared sizes first; nothing for models without a convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        return
    attends = any(isinstance(layer, nn.Linear) for layer in expert_layers(model).values())
    common = SIZES if attends else sorted(SIZES, key=(224).__eq__)  # a CNN for small images is slow on large ones
    for height, width in dict.fromkeys([*_declared_sizes(model), *((size, size) for size in common)]):
        yield first.weight.new_zeros(2, first.in_channels, height, width)


def _declared_sizes(model: nn.Module) -> Iterator[tuple[int, int]]:
    """Yield the image sizes that modules declare: patch embeddings, torchvision's ViT, timm's models."""
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None) or {}
        for size in (getattr(module, "img_size", None), getattr(module, "image_size", None), config.get("input_size")):
            sides = (size, size) if isinstance(size, int) else size
            if isinstance(sides, (tuple, list)) and len(sides) >= 2 and all(isinstance(side, int) for side in sides):
                yield sides[-2], sides[-1]
