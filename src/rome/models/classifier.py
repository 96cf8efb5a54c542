"""The model class: a backbone with input normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """A backbone with input normalisation: maps images (B, C, H, W) in [0, 1] to logits (B, classes)."""

    mean: Tensor
    std: Tensor
    recipe: dict[str, Any] | None = None
    """The arguments of :func:`create_model`, saved with the weights."""

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone((images - self.mean) / self.std)
