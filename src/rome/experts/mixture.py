"""A Linear layer with a gated mixture of low-rank experts beside it (paper 4.2, Eq. 2)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.experts.gating import GateModule, Gates


class Recorded(NamedTuple):
    """One layer's gates in one forward pass."""

    layer: MixtureLinear
    gates: Gates


class MixtureLinear(nn.Linear):
    """o_i = W h_i + sum_k g_ik B_k A_k h_i, for h of shape (B, ..., d_in): dimensions in between count as tokens.

    The K experts are one contraction: ``A`` (K r, d_in) holds the A_k one above the other, ``B`` (d_out, K r) the B_k
    side by side, and the gate scales each group of r codes in between. ``weight`` and ``bias`` are the very parameters
    of the layer it replaces, under the same names. With B = 0 the output equals that layer's to the last bit.

    Args:
        linear: the layer to adapt; shares its parameters.
        experts: K.
        rank: r.
        gate: turns scores into gate weights.
        projection_dim: K', size to which the global gate is projected in the diversification loss (Eq. 7); 0 for none.
        train_projection: learn that projection instead of keeping its random start.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        experts: int,
        rank: int,
        gate: GateModule,
        projection_dim: int = 0,
        train_projection: bool = False,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.experts, self.rank = experts, rank
        self.A = nn.Parameter(torch.empty(experts * rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, experts * rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # the fan is d_in, so this is LoRA's start for each A_k
        self.gate = gate
        self.projection = nn.Linear(experts, projection_dim) if projection_dim else None
        if self.projection is not None:
            self.projection.requires_grad_(False)  # the bias cancels in every distance: a gradient never reaches it
            self.projection.weight.requires_grad_(train_projection)
        self.sink: list[Recorded] | None = None
        self.to(device=linear.weight.device, dtype=linear.weight.dtype)
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        output = F.linear(input, self.weight, self.bias)
        h = input.reshape(len(input), math.prod(input.shape[1:-1]), self.in_features)
        read = F.linear(h, torch.cat([self.A, self.gate.rows()]))  # expert codes and gate scores in one product
        codes, scores = read[..., : self.A.shape[0]], read[..., self.A.shape[0] :]
        gates: Gates = self.gate(scores)
        if self.sink is not None:
            self.sink.append(Recorded(self, gates))
        grouped = codes.view(*codes.shape[:-1], self.experts, self.rank)
        mixed = (grouped * gates.weights.to(codes.dtype).unsqueeze(-1)).flatten(-2)
        flat = output.reshape(-1, self.out_features)
        return flat.addmm_(mixed.reshape(-1, mixed.shape[-1]), self.B.to(flat.dtype).t()).view(output.shape)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts={self.experts}, rank={self.rank}"
