"""Adversarial patch: a small opaque square with arbitrary content (paper 5.2; Brown et al., NeurIPS 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.base import Steps, StepSize
from rome.attacks.engine import Model, loss_and_gradient
from rome.attacks.free import LastIterate, changed_pixels
from rome.core.errors import UserError
from rome.threats.projections import signs


class Patch(LastIterate):
    """Replaces a square of ``size`` x ``size`` pixels at a random place of each image, by signed-gradient ascent.

    The paper gives size, steps and step size (A1). The place and start are ours: each image has its own patch, placed
    uniformly where it fits and started with pixels from U(0, 1). A pixel moves by at most steps * step_size, 0.39 by
    default, so the start matters.
    """

    kind = "patch"
    size: int = Field(default=8, ge=0)
    """Side of the patch in pixels."""
    steps: Steps = 50
    """Iterations of the search."""
    step_size: StepSize = 2 / 255
    """Change of a pixel of the patch in a step, on the scale [0, 1]."""
    start: Literal["random", "image"] = "random"
    """Initial pixels of the patch: from U(0, 1), or those of the image."""

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        """Two numbers for the place, then the initial pixels."""
        return (2 + image[0] * self.size**2,)

    def last(self, model: Model, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if self.size > min(height, width):
            raise UserError(
                f"a patch of {self.size}x{self.size} does not fit into images of {height}x{width}: give a smaller size"
            )
        down = _offsets(noise[:, 0], height, self.size)
        across = _offsets(noise[:, 1], width, self.size)
        inside = ((down >= 0) & (down < self.size)).unsqueeze(2) & ((across >= 0) & (across < self.size)).unsqueeze(1)
        inside = inside.unsqueeze(1)
        x_adv = x
        if self.start == "random" and self.size:
            pixels = noise[:, 2:].view(len(x), x.shape[1], self.size, self.size).to(x.dtype)
            example = torch.arange(len(x), device=x.device).view(-1, 1, 1)
            rows, columns = (part.clamp(0, self.size - 1) for part in (down.unsqueeze(2), across.unsqueeze(1)))
            x_adv = torch.where(inside, pixels[example, :, rows, columns].permute(0, 3, 1, 2), x)
        for _ in range(self.steps):
            _, _, gradient = loss_and_gradient(model, x_adv, y)
            x_adv = torch.where(inside, (x_adv + self.step_size * signs(gradient)).clamp(0, 1), x)
        self.check(changed_pixels(x_adv, x), self.size**2)
        return x_adv


def _offsets(u: Tensor, length: int, size: int) -> Tensor:
    """Positions along an axis relative to the start of a patch placed uniformly where it fits: int64 (B, length)."""
    first = (u * (length - size + 1)).long().clamp(max=length - size)
    return torch.arange(length, device=u.device) - first.unsqueeze(1)
