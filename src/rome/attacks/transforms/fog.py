"""Fog: adversarial plasma (Kang et al., arXiv:1908.08016; github.com/ddkang/advex-uar, ``fog.py``, ``fog_attack.py``).

Two differences from that code: it normalises fog over the whole batch, we over each example, so that an image's fog
does not depend on its batch mates; and its port of diamond-square to torch rolls by two where the algorithm (and the
numpy code it was ported from) rolls by one, so that a diamond's mean takes a wrong neighbour. ``form: published`` does
as that code does.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.transforms.base import SignAscent, Transform
from rome.attacks.transforms.plasma import diamond_square, levels_for, to_unit
from rome.core.component import Number

WIBBLE = 100.0
"""Largest offset at the coarsest level; halved at each finer one. Only ratios matter, as fog is normalised."""


class Fog(SignAscent):
    """Adversarial fog: the offsets of a diamond-square map.

    x' = (x + b fog(v)) / (max_c x + b), with b = bound/255, fog in [0, 1] in the same place of every channel and
    max_c the largest value of a channel: fog 0 still stretches every channel's contrast to 1. Variables v: the
    M^2 - 1 offsets of a map of side M = 2^(floor(log2 side) + 1), each in [0, 1], offset (2 v - 1) 100 / 2^level.
    The middle of the map is the fog.
    """

    kind = "fog"
    bound: Number = Field(default=12, ge=0)
    """In grey levels of 255."""

    def default_step(self) -> float:
        """2.5 / steps: bound / sqrt(steps) is a jump between the ends of the variables' range, and a weaker attack."""
        return super().default_step() if self.form == "published" else 2.5 / max(self.steps, 1)

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        return (4 ** levels_for(max(image[1:])) - 1,)

    def prepare(self, x: Tensor, noise: Tensor) -> Transform:
        return _Fog(x, noise, self.bound / 255, published=self.form == "published")


class _Fog(Transform):
    def __init__(self, x: Tensor, start: Tensor, bound: float, *, published: bool) -> None:
        super().__init__(start)
        self.x, self.bound, self.published = x, bound, published
        self.levels = levels_for(max(x.shape[2:]))
        self.range = (x.amax(dim=(2, 3), keepdim=True) + bound).clamp(min=torch.finfo(x.dtype).tiny)

    def images(self, variables: Tensor) -> Tensor:
        return ((self.x + self.bound * self.fog(variables)) / self.range).clamp(0, 1)

    def fog(self, variables: Tensor) -> Tensor:
        """(B, M^2 - 1) in [0, 1] -> (B, 1, H, W) in [0, 1]."""
        maps = diamond_square(self.offsets(variables), back=2 if self.published else 1)
        maps = to_unit(maps, together=self.published)
        height, width = self.x.shape[2:]
        top, left = (maps.shape[1] - height) // 2, (maps.shape[2] - width) // 2
        return maps[:, None, top : top + height, left : left + width]

    def offsets(self, variables: Tensor) -> list[Tensor]:
        """Coarse to fine, three maps of each side 1, 2, 4 .. M/2."""
        sides = [2**level for level in range(self.levels) for _ in range(3)]
        parts = torch.split(variables, [side * side for side in sides], dim=1)
        return [(2 * part - 1).view(-1, side, side) * (WIBBLE / side) for part, side in zip(parts, sides, strict=True)]
