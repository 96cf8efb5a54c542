"""Snow: adversarial flakes (Kang et al., arXiv:1908.08016; github.com/ddkang/advex-uar, ``snow.py``,
``snow_attack.py``).

This differs from that code in two ways. Its forwards and its result use intensities before they are projected onto
their range; here only ``form: published`` does. Its 7 kernels are drawn once per batch; here they are drawn for every
image, in both forms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rome.attacks.transforms.base import SignAscent, Transform
from rome.core.component import Number

BUDGET = 0.2
"""Largest mean intensity of a grid within a region."""
REGION = 8
"""Side of a region, in cells of a grid: 32 pixels."""
CELL = 4
"""Pixels from one flake of a grid to the next."""
OFFSETS = ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (3, 0))
"""(row, column) of the first flake in each of the 7 grids."""
RADIUS = 6
"""Radius of the kernels, which are 13 x 13."""
DRAWS = 4 * len(OFFSETS) + 1
"""Number of random numbers for an image's kernels: end (2), width and blur of each, and one for mirroring all."""


class Snow(SignAscent):
    """Adversarial snow, by search over the intensities of flakes.

    x' = 0.75 x + 0.25 max(x, 1.5 gray(x) + 0.5) + bound snow(v). Variables v: 7 grids of side/4 x side/4 intensities in
    [1e-9, 1], started at exp(-5 U) and scaled down where a grid's mean over 8 x 8 cells exceeds 0.2. Flakes of
    brightness v^4 are on a lattice with a spacing of 4 pixels, shifted differently for each grid, and stretched along
    the grid's random line. Bound 0 still makes colours paler.
    """

    kind = "snow"
    channels = (1, 3)
    bound: Number = Field(default=0.5, ge=0)
    """Brightness of a flake of full intensity, on the scale [0, 1]."""

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        _, height, width = image
        return (len(OFFSETS) * -(-height // CELL) * -(-width // CELL) + DRAWS,)

    def prepare(self, x: Tensor, noise: Tensor) -> Transform:
        return (_PublishedSnow if self.form == "published" else _Snow)(x, noise, self.bound)


class _Snow(Transform):
    low = 1e-9

    def __init__(self, x: Tensor, noise: Tensor, bound: float) -> None:
        height, width = x.shape[2:]
        start = torch.exp(-noise[:, DRAWS:] / BUDGET)
        grids = start.view(-1, len(OFFSETS), -(-height // CELL), -(-width // CELL))
        super().__init__(self.project(grids))
        self.bound = bound
        weights = x.new_tensor((0.2126, 0.7152, 0.0722) if x.shape[1] == 3 else (1.0,))
        gray = (x * weights.view(1, -1, 1, 1)).sum(dim=1, keepdim=True)
        self.pale = 0.75 * x + 0.25 * torch.maximum(x, 1.5 * gray + 0.5)
        self.stamps = _stamps(line_kernels(noise[:, :DRAWS]))

    def images(self, variables: Tensor) -> Tensor:
        return (self.pale + self.bound * self.snow(variables)).clamp(0, 1)

    def snow(self, variables: Tensor) -> Tensor:
        """Draw snow from intensities: (B, 7, H/4, W/4) -> (B, 1, H, W)."""
        # instead of convolving sparse flakes, stamp a kernel at each flake: a 16th of the multiplications
        grids = (variables**4).flatten(0, 1)[None]
        drawn = F.conv_transpose2d(grids, self.stamps, stride=CELL, groups=len(variables))
        height, width = self.pale.shape[2:]
        return drawn[0, :, None, RADIUS : RADIUS + height, RADIUS : RADIUS + width]

    def project(self, variables: Tensor) -> Tensor:
        inside = variables.clamp(self.low, self.high)
        return inside * (BUDGET / _region_means(inside).clamp(min=BUDGET))

    def contains(self, variables: Tensor) -> Tensor:
        means = _region_means(variables).flatten(1).amax(dim=1)
        within = (variables >= 0) & (variables <= self.high)
        return within.flatten(1).all(dim=1) & (means <= BUDGET * (1 + 1e-5))


class _PublishedSnow(_Snow):
    """Snow as published: intensities are projected onto their range only before the next step."""

    def moved(self, variables: Tensor, step: Tensor) -> Tensor:
        upwards = torch.where(variables < 0, -step, step)  # v^4 falls where v < 0; use its slope at |v| there
        return self.project(variables) + upwards

    def contains(self, variables: Tensor) -> Tensor:
        return torch.ones(len(variables), dtype=torch.bool, device=variables.device)


def _region_means(grids: Tensor) -> Tensor:
    """Mean over each cell's region: (B, 7, h, w); regions at the lower and right edges may be smaller."""
    means = F.avg_pool2d(grids, REGION, ceil_mode=True)
    spread = means.repeat_interleave(REGION, dim=2).repeat_interleave(REGION, dim=3)
    return spread[:, :, : grids.shape[2], : grids.shape[3]]


def line_kernels(draws: Tensor) -> Tensor:
    """Draw blurred lines through the middle from U[0, 1): (B, 29) -> (B, 7, 13, 13), point-symmetric.

    Each line goes from (-r, -c) to (r, c), both uniform in 2..6, has width 1, 3, 5 with probability 0.6, 0.3, 0.1, and
    is blurred by a 3 x 3 Gaussian with sigma uniform in [0.41, 0.6]. In half of the images all 7 lines are mirrored. At
    coordinate a along the longer axis the line is at a s with slope s <= 1, and a pixel at b has the value
    min(1, max(0, 1 + w/2 - |b - a s|)), where w = width sqrt(1 + s) / 2.
    """
    mirror, (row, column, width, blur) = draws[:, 0] < 0.5, draws[:, 1:].reshape(-1, 4, len(OFFSETS)).unbind(1)
    row, column = (2 + (5 * end).floor() for end in (row, column))
    width = 1 + 2.0 * (width >= 0.6) + 2.0 * (width >= 0.9)
    longer, shorter = torch.maximum(row, column), torch.minimum(row, column)
    slope = shorter / longer
    a = torch.arange(RADIUS + 1, dtype=draws.dtype, device=draws.device)
    off = (a - _wide(slope) * a[:, None]).abs()  # (B, 7, a, b)
    line = (1 + _wide(width * (1 + slope).sqrt() / 4) - off).clamp(0, 1) * (a[:, None] <= _wide(longer))
    line = torch.where(_wide(row > column), line, line.mT)
    kernels = torch.maximum(F.pad(line, (RADIUS, 0, RADIUS, 0)), F.pad(line.flip(2, 3), (0, RADIUS, 0, RADIUS)))
    kernels = torch.where(mirror.view(-1, 1, 1, 1), kernels.flip(3), kernels)
    side = torch.exp(-0.5 / (0.41 + 0.19 * _wide(blur)) ** 2)
    for _ in range(2):  # rows, then columns
        padded = F.pad(kernels, (0, 0, 1, 1))
        kernels = ((kernels + side * (padded[:, :, :-2] + padded[:, :, 2:])) / (1 + 2 * side)).mT
    return kernels


def _wide(values: Tensor) -> Tensor:
    return values[:, :, None, None]


def _stamps(kernels: Tensor) -> Tensor:
    """Place each grid's kernel within its cell: (B, 7, 13, 13) -> (7 B, 1, 16, 16)."""
    last = CELL - 1
    placed = [F.pad(kernels[:, i], (column, last - column, row, last - row)) for i, (row, column) in enumerate(OFFSETS)]
    return torch.stack(placed, dim=1).flatten(0, 1)[:, None]
