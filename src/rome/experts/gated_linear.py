"""The base of Linear layers with gated experts."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from rome.experts.gated import MixtureLayer


class GatedLinear(nn.Linear, MixtureLayer):
    """A Linear layer with K gated experts of rank r.

    ``weight`` and ``bias`` are the parameters of the replaced layer, under the same names. The input has shape
    (B, ..., d_in), and the dimensions in between count as tokens. If the batch dimension holds windows of images, these
    are gathered into images first.

    Args:
        linear: the layer to adapt, whose parameters are shared.
        rank: r.
        gating: see :meth:`MixtureLayer.init_gating`.
    """

    def __init__(self, linear: nn.Linear, *, rank: int, **gating: Any) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank = rank
        self.create_experts(gating["experts"], rank)
        self.init_gating(linear, **gating)

    @abstractmethod
    def create_experts(self, experts: int, rank: int) -> None:
        """Create the parameters of the experts."""

    def base_forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def tokens(self, input: Tensor) -> Tensor:
        """Return the input as (B, T, d_in)."""
        count = math.prod(input.shape[1:-1]) * self.layout.windows
        return input.reshape(input.shape[0] // self.layout.windows, count, self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts={self.experts}, rank={self.rank}, scale={self.scale:g}"


def scale_groups(codes: Tensor, weights: Tensor) -> Tensor:
    """Multiply each group of r codes (..., K r) by the weight (..., K) of its expert."""
    grouped = codes.view(*codes.shape[:-1], weights.shape[-1], -1)
    return (grouped * weights.to(codes.dtype).unsqueeze(-1)).flatten(-2)
