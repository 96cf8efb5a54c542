"""The positions of an adapted layer's tokens on the image."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.experts.placement import ancestors, window_positions
from rome.experts.recording import expert_layers


class Grid(NamedTuple):
    """The tokens of a layer as a map of the image."""

    rows: int
    columns: int
    order: Tensor
    """int64 (rows * columns,): the token at each position, row by row."""

    def spread(self, values: Tensor) -> Tensor:
        """Arrange values (B, T, K) of the recorded tokens as maps (B, K, rows, columns)."""
        return values[:, self.order].transpose(1, 2).reshape(len(values), -1, self.rows, self.columns)


REORDERED = ("Nest", "Hiera", "Twins")
"""timm's model families that do not keep the tokens of an image row by row."""


def grid_of(model: nn.Module, name: str, tokens: int, image: tuple[int, int]) -> Grid:
    """Return how a layer's recorded gates map onto the image.

    Class and register tokens are left out. Windows of windowed attention are put back in their place, with the cyclic
    shift undone. Patches and the locations of a convolution are taken row by row, in the image's proportions.

    Args:
        name: the adapted layer.
        tokens: T of its recorded gates.
        image: height and width in pixels.

    Raises:
        UserError: the layer has one token per image, or its tokens do not form such a grid.
    """
    layer = expert_layers(model)[name]
    for part in ancestors(model, name):
        if type(part).__name__ in REORDERED:
            raise UserError(
                f"the tokens of {type(part).__name__} are not ordered row by row: there is no map of layer {name}"
            )
    if tokens == 1:
        raise UserError(f"layer {name} weighs its experts for the image as a whole: there is no map of them")
    for inner, outer in pairwise(ancestors(model, name)):
        if type(inner).__name__.startswith("WindowAttention"):
            rows, columns, places = window_positions(outer, name)
            return Grid(rows, columns, torch.tensor(places).argsort())
    patches = tokens - layer.layout.prefix
    rows = max(round(math.sqrt(patches * image[0] / image[1])), 1)
    columns = patches // rows
    if rows * columns != patches or abs(rows * image[1] - columns * image[0]) >= max(image):
        raise UserError(
            f"the {patches} tokens of layer {name} do not form a grid over images of {image[0]}x{image[1]} pixels"
        )
    return Grid(rows, columns, torch.arange(layer.layout.prefix, tokens))
