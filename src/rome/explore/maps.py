"""Gate weights of tokens, put where their patches lie in the image."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.experts import expert_layers
from rome.experts.layers import ancestors

TOLERANCE = 0.5
"""How far the log of a grid's proportions may be from the image's for it to be that image's grid."""


def on_grid(model: nn.Module, name: str, weights: Tensor, size: tuple[int, int]) -> tuple[Tensor, str]:
    """The weights of a layer's tokens as a map over the image, and a sentence where they do not differ by place.

    Class and register tokens before the patches are left out; the windows of windowed attention are laid out again,
    their cyclic shift undone.

    Args:
        name: of the layer, as :func:`rome.experts.record_gates` calls it.
        weights: (..., T, K), as recorded.
        size: (H, W) of the image.

    Returns:
        (..., h, w, K) for a grid of h x w patches; (..., 1, 1, K) where the tokens have no place in the image.
    """
    layer = expert_layers(model)[name]
    whole = weights.mean(dim=-2)[..., None, None, :]
    if weights.shape[-2] == 1:
        return whole, "This gate decides once for the whole image."
    patches = weights[..., layer.layout.prefix :, :]
    grid = _grid(patches.shape[-2], size)
    if grid is None:
        return whole, f"Its {patches.shape[-2]} tokens form no grid over the image; this is their mean."
    order = window_order(model, name) if layer.layout.windows > 1 else None
    if order is not None:
        patches = torch.empty_like(patches).index_copy_(-2, order, patches)
    note = "" if bool((patches != patches[..., :1, :]).any()) else "This gate gives every patch the same weights."
    return patches.reshape(*patches.shape[:-2], *grid, patches.shape[-1]), note


def window_order(model: nn.Module, name: str) -> Tensor | None:
    """Where each recorded token of a layer in windowed attention lies in the image, counted row by row: int64 (T,).

    A Swin block rolls its tokens by its shift, pads them to whole windows and cuts these row by row; padding is not
    recorded. None where the block does not say.
    """
    block: Any = next((each for each in ancestors(model, name) if hasattr(each, "input_resolution")), None)
    if block is None or not hasattr(block, "window_size"):
        return None
    (height, width), (rows, columns) = block.input_resolution, _pair(block.window_size)
    down, across = _pair(getattr(block, "shift_size", 0))
    places = torch.arange(height * width).view(height, width).roll((-down, -across), dims=(0, 1))
    padded = F.pad(places, (0, -width % columns, 0, -height % rows), value=-1)
    order = padded.unfold(0, rows, rows).unfold(1, columns, columns).flatten()  # window by window
    return order[order >= 0]


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _grid(tokens: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """The h x w = tokens whose proportions are nearest to the image's; None where none are near."""
    wanted = math.log(size[0] / size[1])
    pairs = [(h, tokens // h) for h in range(1, tokens + 1) if tokens % h == 0]
    best = min(pairs, key=lambda pair: abs(math.log(pair[0] / pair[1]) - wanted))
    return best if abs(math.log(best[0] / best[1]) - wanted) <= TOLERANCE else None
