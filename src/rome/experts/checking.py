"""Whether a model runs its experts, and whether what their gates see are images."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.core.trial import failure, tried
from rome.experts.gated import Sink
from rome.experts.recording import GateRecorder, expert_layers, record_gates

SIZES = (224, 32, 64, 128, 256, 384, 96, 28, 16, 8)
"""Sides of images, in pixels, to try on a model that does not say its own."""


def check_experts(model: nn.Module, images: Tensor | None = None) -> None:
    """See by a forward pass that every layer with experts runs, and that each row of its input is an image.

    Args:
        images: two or more (B, C, H, W). None takes zeros of the size that the model names, or of a usual one where it
            begins with a convolution; where it takes none of them, its first forward pass is looked at.

    Raises:
        UserError: they do not, or the model does not take these images.
    """
    for batch in usual_images(model) if images is None else [images]:
        with tried(model), record_gates(model) as recorder:
            try:
                model(batch)
            except Exception as error:  # whatever it raises at images of another size
                if images is None and not isinstance(error, UserError):
                    continue
                raise failure(error, model, batch) from error
            recorder.check(len(batch))
            return
    FirstPass().watch(model)


def usual_images(model: nn.Module) -> Iterator[Tensor]:
    """Two images of each size that may be the model's, first the one that it names; none without a convolution."""
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None:
        return
    named = [_sides(size) for module in model.modules() for size in _sizes(module)]
    attends = any(isinstance(layer, nn.Linear) for layer in expert_layers(model).values())
    usual = SIZES if attends else sorted(SIZES, key=(224).__eq__)  # convolutions of small images take large ones long
    for height, width in dict.fromkeys([*filter(None, named), *((size, size) for size in usual)]):
        yield first.weight.new_zeros(2, first.in_channels, height, width)


def _sizes(module: nn.Module) -> Iterator[Any]:
    """What a module says of the size of its images: patch embeddings, torchvision's ViT, timm's models."""
    yield getattr(module, "img_size", None)
    yield getattr(module, "image_size", None)
    yield (getattr(module, "pretrained_cfg", None) or {}).get("input_size")


def _sides(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, (tuple, list)) and len(size) >= 2 and all(isinstance(side, int) for side in size):
        return size[-2], size[-1]
    return None


class FirstPass:
    """Looks at the first forward pass of a model, then goes. Part of no state dict; copied and pickled with the model.

    A pass that becomes a program (torch.compile, torch.export) is not looked at.
    """

    def __init__(self) -> None:
        self.hooks: tuple[int, ...] = ()
        self.sink: Sink | None = None
        """Where the pass under way is recorded."""
        self.shared = False
        """Whether :func:`record_gates` or another first pass records it there, too."""
        self.start = 0

    def watch(self, model: nn.Module) -> None:
        """Look at the model's next forward pass."""
        handles = (
            model.register_forward_pre_hook(self.before),
            model.register_forward_hook(self.after, always_call=True),
        )
        self.hooks = tuple(handle.id for handle in handles)

    def before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        layers = list(expert_layers(model).values())
        if torch.compiler.is_compiling() or not layers:
            return
        sink = layers[0].sink
        self.shared, self.sink = sink is not None, sink or Sink()
        self.start = len(self.sink.records)
        for layer in layers:
            layer.sink = self.sink

    def after(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raises:
        UserError: a layer did not run, or sees other things than images.
        """
        if self.sink is None:
            return
        layers, records, self.sink = expert_layers(model), self.sink.records[self.start :], None
        if not self.shared:
            for layer in layers.values():
                layer.sink = None
        if output is None:  # the pass broke off
            return
        for table in (model._forward_pre_hooks, model._forward_hooks, model._forward_hooks_always_called):
            for hook in self.hooks:
                table.pop(hook, None)
        recorder = GateRecorder({layer: name for name, layer in layers.items()}, Sink(records))
        recorder.check(len(args[0]) if args and isinstance(args[0], Tensor) else None)
