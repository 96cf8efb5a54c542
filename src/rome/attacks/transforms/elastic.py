"""Elastic: adversarial flow (Kang et al., arXiv:1908.08016; github.com/ddkang/advex-uar, ``elastic.py``,
``elastic_attack.py``).

That code was written for versions of torch whose ``grid_sample`` aligned corners. With the default since torch 1.3, its
grid from -1 to 1 is not the identity, and even zero flow shifts images. Corners are aligned here, except in ``form:
published``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rome.attacks.transforms.base import SignAscent, Transform
from rome.core.component import Number


class Elastic(SignAscent):
    """Adversarial elastic deformation, by search over a flow that is smoothed.

    x'(p) = x(p + 2/side G*v(p)) with coordinates p in [-1, 1], bilinear, black outside. Variables v: a flow
    (2, H, W) in pixels, right and down, in [-bound, bound]. G is a Gaussian of sigma = 3/224 side, cut off at
    12/224 side: 25 x 25 with sigma 3 at 224 pixels, 5 x 5 at 32.
    """

    kind = "elastic"
    bound: Number = Field(default=0.125, ge=0)
    """Largest flow before smoothing, in pixels."""

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        return (2, *image[1:])

    def prepare(self, x: Tensor, noise: Tensor) -> Transform:
        return _Elastic(x, noise, self.bound, align_corners=self.form == "corrected")


class _Elastic(Transform):
    def __init__(self, x: Tensor, noise: Tensor, bound: float, *, align_corners: bool) -> None:
        super().__init__(bound * (2 * noise - 1))
        self.x, self.low, self.high, self.align_corners = x, -bound, bound, align_corners
        height, width = x.shape[2:]
        down, right = (torch.linspace(-1, 1, side, dtype=x.dtype, device=x.device) for side in (height, width))
        self.identity = torch.stack((right.expand(height, width), down[:, None].expand(height, width)))
        self.units = x.new_tensor((2 / width, 2 / height)).view(2, 1, 1)
        self.down, self.right = smoothing(height, x).mT, smoothing(width, x)

    def images(self, variables: Tensor) -> Tensor:
        grid = self.identity + self.units * self.smoothed(variables)
        sampled = F.grid_sample(self.x, grid.permute(0, 2, 3, 1), align_corners=self.align_corners)
        return sampled.clamp(0, 1)

    def smoothed(self, flow: Tensor) -> Tensor:
        """Smoothed flow G * v, with borders reflected: (B, 2, H, W)."""
        return self.down @ flow @ self.right


def smoothing(side: int, like: Tensor) -> Tensor:
    """Gaussian smoothing along an axis of this length as a matrix (side, side) that multiplies rows, borders reflected.

    It has 25 taps at 224 pixels, 5 at 32. Two matrix products are several times faster than single-channel
    convolutions.
    """
    sigma, radius = 3 / 224 * side, max(round(12 / 224 * side), 1)
    t = torch.arange(-radius, radius + 1, dtype=like.dtype, device=like.device)
    kernel = torch.exp(-0.5 * (t / sigma) ** 2)
    units = torch.eye(side, dtype=like.dtype, device=like.device)[:, None]
    padded = F.pad(units, (radius, radius), mode="reflect")
    return F.conv1d(padded, (kernel / kernel.sum()).view(1, 1, -1))[:, 0]
