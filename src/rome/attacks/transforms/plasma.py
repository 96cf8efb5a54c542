"""Plasma maps by the diamond-square algorithm (Fournier, Fussell, Carpenter 1982), for fog as attack and corruption.

The side of a map doubles from 1 to M = 2^L. Each doubling adds a point in the middle of every square of four neighbours
and of every diamond of four, with their mean plus an offset as its value; the map wraps around. It is linear in the
offsets, batched and differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def levels_for(side: int) -> int:
    """L of the smallest map side 2^L that is *larger* than ``side``: 6 for 32, 8 for 224."""
    return side.bit_length()


def diamond_square(offsets: Sequence[Tensor], back: int = 1) -> Tensor:
    """Return the map (B, M, M) with these offsets, not normalised.

    Args:
        offsets: 3 L tensors, three of shape (B, 2^i, 2^i) for each level i = 0..L-1: for the middles of the squares,
            for the diamonds on the rows of the old points, and for those on their columns. M = 2^L.
        back: distance, in squares, between the two middles among a diamond's four points. 1: neighbours; 2: as in
            advex-uar.
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
    """Shift and scale maps (B, M, M) to [0, 1], each by itself or all together; a constant map becomes 0."""
    dims = (0, 1, 2) if together else (1, 2)
    low, high = maps.amin(dim=dims, keepdim=True), maps.amax(dim=dims, keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)
