"""Recorded gates of chosen values, and a model of two adapted blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rome.experts import DualScale, Gates, MixtureLinear, Recorded, add_experts


def recorded_gates(local: Any, whole: Any, projection: Any = None) -> Recorded:
    """Gates u (B, T, K) and v (B, K) of one layer, whose projection has the given weight (K', K)."""
    u, v = torch.as_tensor(local, dtype=torch.float64), torch.as_tensor(whole, dtype=torch.float64)
    gate = DualScale().build(4, v.shape[1], block=1, blocks=1)
    size = len(projection) if projection is not None else 0
    layer = MixtureLinear(nn.Linear(4, 4), experts=v.shape[1], rank=1, gate=gate, projection_dim=size).double()
    if layer.projection is not None:
        layer.projection.weight.data = torch.as_tensor(projection, dtype=torch.float64)
    return Recorded(layer, Gates(u, u, v))


def random_gates(batch: int = 7, tokens: int = 3, experts: int = 4, *, seed: int = 0, project: int = 5) -> Recorded:
    g = torch.Generator().manual_seed(seed)
    u = torch.randn(batch, tokens, experts, generator=g, dtype=torch.float64).softmax(-1)
    v = torch.randn(batch, experts, generator=g, dtype=torch.float64).softmax(-1)
    return recorded_gates(u, v, torch.randn(project, experts, generator=g, dtype=torch.float64) if project else None)


def pair_of_blocks(projection: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))
    return add_experts(model, layers=("0", "2"), experts=3, rank=2, projection=projection, projection_dim=7).double()
