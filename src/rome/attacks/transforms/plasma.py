"""Plasma maps by the diamond-square algorithm (Fournier, Fussell and Carpenter 1982): fog, as attack and as corruption.

A map doubles its side from 1 to M = 2^L. Each doubling puts a point into the middle of every square of four neighbours
and into the middle of every diamond of four, at their mean plus an offset; the map is a torus. It is linear in the
offsets, batched and differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def levels_for(side: int) -> int:
    """L of the smallest map 2^L that is *larger* than ``side``: 6 for 32, 8 for 224."""
    return side.bit_length()


def diamond_square(offsets: Sequence[Tensor], back: int = 1) -> Tensor:
    """The map (B, M, M) of these offsets, before any normalisation.

    Args:
        offsets: 3 L tensors; for each level i = 0..L-1 three of shape (B, 2^i, 2^i): of the squares' middles, of the
            diamonds on the rows of the old points, of the diamonds on their columns. M = 2^L.
        back: how many squares back the second middle of a diamond's four points lies. 1 is its neighbour; 2 is what
            advex-uar takes.
    """
    grid = torch.zeros_like(offsets[0])
    for square, row, column in zip(offsets[0::3], offsets[1::3], offsets[2::3], strict=True):
        right, below = grid.roll(-1, 2), grid.roll(-1, 1)
        centre = (grid + right + below + right.roll(-1, 1)) / 4 + square
        beside = (grid + right + centre + centre.roll(back, 1)) / 4 + row
        under = (grid + below + centre + centre.roll(back, 2)) / 4 + column
        upper, lower = torch.stack((grid, beside), dim=3), torch.stack((under, centre), dim=3)
        grid = torch.stack((upper, lower), dim=2).flatten(3).flatten(1, 2)
    return grid


def to_unit(maps: Tensor, *, together: bool = False) -> Tensor:
    """Each map (B, M, M) shifted and scaled onto [0, 1] by itself, or all together; a constant map becomes 0."""
    dims = (0, 1, 2) if together else (1, 2)
    low, high = maps.amin(dim=dims, keepdim=True), maps.amax(dim=dims, keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
