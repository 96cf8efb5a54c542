"""How an adapted layer weighs its experts (paper 4.3, Eq. 3-5).

A gate is split in two so that the layer can read its input once: ``rows`` are weights the layer stacks under its own
(one matrix product gives expert codes and gate scores together), and ``forward`` turns the scores into weights.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rome.component import Component, Number


class Gates(NamedTuple):
    """Gate weights of one layer for a batch of B images with T tokens and K experts; they sum to 1 over K."""

    weights: Tensor
    """g, (B, T, K): what multiplies the experts (Eq. 5)."""
    local: Tensor
    """u, (B, T, K): from each token (Eq. 3)."""
    whole: Tensor
    """v, (B, K): from the image (Eq. 4)."""

    def first(self, n: int) -> Gates:
        """Those of the first n images."""
        return Gates(*(part[:n] for part in self))


class Gate(Component):
    """Settings of a gate; builds one module for each adapted layer."""

    default_kind = "dual-scale"

    @abstractmethod
    def build(self, in_features: int, experts: int, *, block: int, blocks: int) -> GateModule:
        """The gate of a layer in block number ``block`` of 1..``blocks``."""


class GateModule(nn.Module):
    """Base of the modules that gates build."""

    @abstractmethod
    def rows(self) -> Tensor:
        """(R, d_in): weights whose products with the input are the scores."""

    @abstractmethod
    def forward(self, scores: Tensor) -> Gates:
        """Scores (B, T, R) to gate weights."""


class DualScale(Gate):
    """Local and global gate, mixed by a fixed coefficient that favours the global one in early blocks (Eq. 3-5).

    beta(l) = sigmoid(s (1 - l/L) - b) with l = 1..L counted in blocks: .841 to .119 for s=4, b=2, L=12.
    """

    kind = "dual-scale"
    s: Number = 4.0
    b: Number = 2.0

    def beta(self, block: int, blocks: int) -> float:
        return 1 / (1 + math.exp(-(self.s * (1 - block / blocks) - self.b)))

    def build(self, in_features: int, experts: int, *, block: int, blocks: int) -> GateModule:
        return DualScaleGate(in_features, experts, self.beta(block, blocks))


class DualScaleGate(GateModule):
    """g_i = (1 - beta) softmax(local(h_i)) + beta softmax(global(mean_i h_i)).

    ``local`` and ``whole`` are Linear(d_in, K) with bias. The mean over all T tokens, the class token among them
    (spec F6), is taken after the product, which is the same because the product is linear.
    """

    def __init__(self, in_features: int, experts: int, beta: float) -> None:
        super().__init__()
        self.local = nn.Linear(in_features, experts)
        self.whole = nn.Linear(in_features, experts)
        self.beta = beta

    def rows(self) -> Tensor:
        return torch.cat([self.local.weight, self.whole.weight])

    def forward(self, scores: Tensor) -> Gates:
        local_scores, whole_scores = scores.chunk(2, dim=-1)
        u = (local_scores + self.local.bias).softmax(dim=-1)
        v = (whole_scores.mean(dim=1) + self.whole.bias).softmax(dim=-1)
        return Gates((1 - self.beta) * u + self.beta * v.unsqueeze(1), u, v)

    def extra_repr(self) -> str:
        return f"beta={self.beta:.3f}"
