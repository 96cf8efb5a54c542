"""ReColorAdv: one smooth change of colours for the whole image (paper 5.2; Laidlaw and Feizi, NeurIPS 2019)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rome.attacks.transforms.colors import luv_to_rgb, rgb_to_luv
from rome.attacks.transforms.functional import FunctionalAttack
from rome.core.component import Number

NODES = (16, 32, 32)
"""Number of grid nodes along L, u and v."""


class ReColorAdv(FunctionalAttack):
    """Maps the colours of an image by a function that is linear between the nodes of a grid of colours.

    The grid spans scaled CIELUV (:mod:`rome.attacks.transforms.colors`) with 16 x 32 x 32 nodes for each image, and no
    node moves by more than .06 in any coordinate. Before that bound is applied, nodes are projected onto the unit cube
    and the colours of sRGB, so that even the identity changes an image slightly: on CIFAR-10 by 0.0007 on average. The
    bound, the 20 steps and the weight of the smoothness, .06, are those of the paper and its sources; with a learning
    rate of .001 the 20 steps reach a third of the bound.
    """

    kind = "recoloradv"
    channels = (3,)
    bound: Number = Field(default=0.06, ge=0)
    """Largest change of a colour in each channel of the colour space, scaled to [0, 1]."""
    lr: Number = Field(default=0.001, gt=0)
    """Adam's learning rate on the colour grid."""
    tau: Number = Field(default=0.06, ge=0)

    def unsupported_reason(self, channels: int) -> str:
        return (
            super().unsupported_reason(channels) and f"changes colours: it needs images of 3 channels, not {channels}"
        )

    def identity(self, x: Tensor) -> Tensor:
        axes = [torch.linspace(0, 1, count, dtype=x.dtype, device=x.device) for count in NODES]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).unsqueeze(0)

    def valid(self, parameters: Tensor) -> Tensor:
        return rgb_to_luv(luv_to_rgb(parameters.clamp(0, 1)))

    def apply(self, x: Tensor, parameters: Tensor) -> Tensor:
        luv = rgb_to_luv(x.permute(0, 2, 3, 1))
        # grid_sample takes coordinates in reverse order, from -1 to 1; colours outside the cube get the border's value
        place = (2 * luv.flip(-1) - 1).unsqueeze(1)
        grid = parameters.permute(0, 4, 1, 2, 3)
        moved = F.grid_sample(grid, place, mode="bilinear", padding_mode="border", align_corners=True)
        return luv_to_rgb(moved.squeeze(2).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
