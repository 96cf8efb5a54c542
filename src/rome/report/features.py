"""Features that a model's layers compute for clean and attacked images, read by hooks that are removed with a context.

Features are tokens (B, T, D): a transformer's patches in order, with windows put back together, or the positions of a
convolution's feature map row by row. Class and register tokens are left out, so that the first, middle and last token
are places in the image and the mean over tokens is a mean over the image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rome.attacks.perceptual.features import feature_layers
from rome.core.errors import UserError
from rome.experts import Layout, MixtureLayer, ModelMixture, expert_layers, layout_of
from rome.experts.gates import positions, select
from rome.experts.placement import channels_last
from rome.models.fitting import head_names
from rome.report.subject import over_groups

PLACES = ("first", "middle", "last", "global")
"""Where features are read: at single tokens, or averaged over all."""


class LayerOutput(NamedTuple):
    """The output of one layer in one forward pass, (B, T, D) each."""

    output: Tensor
    """Output with the experts, if the layer has any."""
    plain: Tensor | None
    """Output without the experts (:meth:`rome.experts.MixtureLayer.base_forward`); None for a layer without experts.

    For low-rank experts, adapters and convolutions this is the output of the adapted layer itself, such as W h + b; for
    feed-forward experts and whole networks (MORE), which replace the layer, it is that of the first expert.
    """


class Parts(NamedTuple):
    """Output of a layer with experts, averaged over tokens: (G, n, D) each, for G groups of the same n images."""

    backbone: np.ndarray
    """Output without the experts."""
    experts: np.ndarray
    """What the experts add, weighted by the gates; the whole output if they replace the layer."""
    output: np.ndarray
    """Output with the experts."""


def block_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules whose outputs are read, from first to last.

    The blocks of a vision transformer, else the stages that :func:`rome.attacks.perceptual.features.feature_layers`
    finds (ResNets, Wide ResNets, Swin ...), else every Linear and Conv2d layer except the classifier. For a mixture of
    whole networks, those of the first network.
    """
    inner, before = model, ""
    if isinstance(getattr(inner, "backbone", None), nn.Module):
        inner, before = model.get_submodule("backbone"), "backbone."
    if isinstance(inner, ModelMixture):
        inner, before = inner.networks[0], before + "networks.0."
    blocks = getattr(inner, "blocks", None)
    if isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks):
        names = [f"blocks.{i}" for i in range(len(blocks))]
    else:
        try:
            names = list(feature_layers(inner))
        except UserError:
            inside = tuple(f"{name}." for name in expert_layers(inner))
            parts = [
                name for name, part in inner.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d, MixtureLayer))
            ]
            names = [name for name in parts if not name.startswith(inside)]
            names = [name for name in names if name not in head_names(inner)] or names
    return tuple(before + name for name in names)


@contextmanager
def record_features(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, LayerOutput]]:
    """Record the outputs of these modules, by name, in the latest forward pass inside the context.

    Raises:
        UserError: during a forward pass, if a module's output is not images, tokens or vectors.
    """
    found: dict[str, LayerOutput] = {}
    with ExitStack() as stack:
        for name in layers:
            hook = model.get_submodule(name).register_forward_hook(_recording_hook(model, name, found))
            stack.callback(hook.remove)
        yield found


def collect(model: nn.Module, groups: Mapping[str, Tensor], layer: str) -> np.ndarray:
    """Features at the output of one module, (G, n, T, D) float32, for groups of images: name -> (n, C, H, W)."""
    return over_groups(groups, lambda batch: [_seen(model, batch, layer).output])[0]


def image_means(model: nn.Module, groups: Mapping[str, Tensor]) -> np.ndarray:
    """Features of all :func:`block_layers`, averaged over tokens and concatenated: (G, n, sum of D)."""
    return np.concatenate([collect(model, groups, each).mean(axis=2) for each in block_layers(model)], axis=-1)


def parts(model: nn.Module, groups: Mapping[str, Tensor], layer: str) -> Parts:
    """Outputs of a layer with and without its experts, averaged over tokens."""

    def of_batch(images: Tensor) -> list[Tensor]:
        return [part.mean(dim=1) for part in _seen(model, images, layer) if part is not None]

    full, backbone = over_groups(groups, of_batch)
    return Parts(backbone, full - backbone if expert_layers(model)[layer].additive else full, full)


def at(features: np.ndarray, place: str) -> np.ndarray:
    """Features (..., T, D) at one of :data:`PLACES`: (..., D). The middle token has index T // 2."""
    if place == "global":
        return np.asarray(features.mean(axis=-2))
    return np.asarray(features[..., {"first": 0, "middle": features.shape[-2] // 2, "last": -1}[place], :])


def tokens(output: Tensor, layout: Layout, *, channels_last: bool) -> Tensor:
    """Rearrange a layer's output to tokens (B, T, D) of whole images, without padding and class tokens.

    Args:
        output: (B, D), (B, C, H, W), or with ``channels_last`` (B x windows, ..., D), as from a Linear layer.
        channels_last: whether features are the last dimension of ``output``.
    """
    if output.ndim == 4 and not channels_last:
        output = output.flatten(2).transpose(1, 2)
    whole = output.reshape(len(output) // layout.windows, -1, output.shape[-1])
    real = positions(layout)
    return select(whole, None if real is None else real.to(whole.device))[:, layout.prefix :]


def _seen(model: nn.Module, images: Tensor, layer: str) -> LayerOutput:
    with torch.no_grad(), record_features(model, [layer]) as found:
        model(images)
    if layer not in found:
        raise UserError(f"layer {layer} did not run in the forward pass; choose one that always runs")
    return found[layer]


def _recording_hook(model: nn.Module, name: str, found: dict[str, LayerOutput]) -> Callable[..., None]:
    """Return a hook that stores copies of a module's output, since later layers may change it in place."""
    module = model.get_submodule(name)
    layout = module.layout if isinstance(module, MixtureLayer) else layout_of(model, name)
    maps = isinstance(module, nn.Conv2d) or not isinstance(module, (nn.Linear, MixtureLayer))
    last = not maps or channels_last(model, name)

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(
                f"layer {name} outputs {what}, not images (B, C, H, W) or tokens (B, T, D); choose another layer"
            )
        plain = module.base_forward(args[0]) if isinstance(module, MixtureLayer) else None
        found[name] = LayerOutput(
            tokens(output.detach().clone(), layout, channels_last=last),
            None if plain is None else tokens(plain.detach(), layout, channels_last=last),
        )

    return hook
