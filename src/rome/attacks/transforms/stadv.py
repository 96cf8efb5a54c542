"""StAdv: moves pixels instead of changing their values (paper 5.2; Xiao et al., ICLR 2018)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rome.attacks.transforms.functional import FunctionalAttack
from rome.core.component import Number


class StAdv(FunctionalAttack):
    """Moves pixels along a smooth flow: each pixel of the result samples the image bilinearly at its own position.

    Positions are in [-1, 1] from border to border of the image and stay there; they move by at most .05, which is 0.8
    pixels at 32 and 5.6 at 224. tau = .05 is the paper's (A1); the other numbers are from mister_ed and its wrapper by
    Laidlaw et al. 2021. The smoothness is the :func:`~rome.attacks.transforms.functional.roughness` of the flow.

    ``align_corners`` is False throughout: -1 and 1 are the outer edges of the border pixels, which is how the published
    codes behave on current torch. Positions beyond the centre of a border pixel blend with zeros, also as in those
    codes.
    """

    kind = "stadv"
    bound: Number = Field(default=0.05, ge=0)
    """Largest shift of a pixel along an axis, as a share of half the side."""
    lr: Number = Field(default=0.01, gt=0)
    """Adam's learning rate on the flow."""
    tau: Number = Field(default=0.05, ge=0)

    def identity(self, x: Tensor) -> Tensor:
        down, across = ((2 * torch.arange(n, dtype=x.dtype, device=x.device) + 1) / n - 1 for n in x.shape[2:])
        return torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=-1).unsqueeze(0)

    def valid(self, parameters: Tensor) -> Tensor:
        return parameters.clamp(-1, 1)

    def apply(self, x: Tensor, parameters: Tensor) -> Tensor:
        return F.grid_sample(x, parameters, mode="bilinear", padding_mode="zeros", align_corners=False)
