"""Fog: adversarial plasma (Kang et al., arXiv:1908.08016; github.com/ddkang/advex-uar, ``fog.py``, ``fog_attack.py``).

This differs from that code in two ways. That code normalises fog over the whole batch, this over each example, so that
an image's fog does not depend on the rest of the batch. Its torch port of diamond-square also rolls by two where the
algorithm (and the numpy code it was ported from) rolls by one, so that a diamond's mean includes a wrong neighbour.
``form: published`` reproduces both.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.transforms.base import SignAscent, Transform
from rome.attacks.transforms.plasma import diamond_square, levels_for, to_unit
from rome.core.component import Number

WIBBLE = 100.0
"""Largest offset at the coarsest level, halved at each finer one. Only the ratio matters, as fog is normalised."""


class Fog(SignAscent):
    """Adversarial fog, by search over the offsets of a diamond-square map.

    x' = (x + b fog(v)) / (max_c x + b), where b = bound/255, fog in [0, 1] is the same in all channels and max_c is the
    largest value of a channel, so that even zero fog stretches the contrast of every channel. Variables v: the M^2 - 1
    offsets of a map of side M = 2^(floor(log2 side) + 1), each v in [0, 1] and the offset (2 v - 1) 100 / 2^level. The
    middle of the map is used as fog.
    """

    kind = "fog"
    bound: Number = Field(default=12, ge=0)
    """Brightness of the fog, in grey levels of 255."""

    def default_step(self) -> float:
        """2.5 / steps; bound / sqrt(steps) would jump between the ends of the range and so weaken the attack."""
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
        """Fog of the variables: (B, M^2 - 1) in [0, 1] -> (B, 1, H, W) in [0, 1]."""
        maps = diamond_square(self.offsets(variables), back=2 if self.published else 1)
        maps = to_unit(maps, together=self.published)
        height, width = self.x.shape[2:]
        top, left = (maps.shape[1] - height) // 2, (maps.shape[2] - width) // 2
        return maps[:, None, top : top + height, left : left + width]

    def offsets(self, variables: Tensor) -> list[Tensor]:
        """Offsets from coarse to fine: three maps for each side 1, 2, 4 .. M/2."""
        sides = [2**level for level in range(self.levels) for _ in range(3)]
        parts = torch.split(variables, [side * side for side in sides], dim=1)
        return [(2 * part - 1).view(-1, side, side) * (WIBBLE / side) for part, side in zip(parts, sides, strict=True)]
