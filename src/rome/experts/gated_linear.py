"""Linear layers with gated experts beside them: low-rank updates (paper 4.2, Eq. 2) and bottleneck adapters."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.experts.fused import closed_form, mixture
from rome.experts.gated import Gated, scale_groups
from rome.experts.gates import PLAIN, GateModule, Layout


class GatedLinear(nn.Linear, Gated):
    """A Linear layer with K gated experts of rank r; the base of the two classes below.

    ``weight`` and ``bias`` are the very parameters of the layer it replaces, under the same names. Its input has shape
    (B, ..., d_in) and dimensions in between count as tokens; where windows of an image stand in the batch dimension,
    they are gathered first.

    Args:
        linear: the layer to adapt; shares its parameters.
        experts: K.
        rank: r.
        gate: turns scores into gate weights.
        layout, projection_dim, train_projection: see :class:`Gated`.
    """

    def __init__(
        self,
        linear: nn.Linear,
        *,
        experts: int,
        rank: int,
        gate: GateModule,
        layout: Layout = PLAIN,
        projection_dim: int = 0,
        train_projection: bool = False,
    ) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.rank = rank
        self.make(experts, rank)
        self.equip(experts, gate, layout, projection_dim, train_projection)
        self.to(device=linear.weight.device, dtype=linear.weight.dtype)
        self.train(linear.training)

    @abstractmethod
    def make(self, experts: int, rank: int) -> None:
        """Create the parameters of the experts."""

    def plain(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias)

    def tokens(self, input: Tensor) -> Tensor:
        """The input as (B, T, d_in)."""
        count = math.prod(input.shape[1:-1]) * self.layout.windows
        return input.reshape(input.shape[0] // self.layout.windows, count, self.in_features)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, experts={self.experts}, rank={self.rank}, scale={self.scale:g}"


class MixtureLinear(GatedLinear):
    """o_i = W h_i + sum_k g_ik B_k A_k h_i, the sum times :attr:`scale` where that is not 1.

    The K experts are one contraction: ``A`` (K r, d_in) holds the A_k one above the other, ``B`` (d_out, K r) the B_k
    side by side, and the gate scales each group of r codes in between. With B = 0 the output equals the replaced
    layer's to the last bit.
    """

    def make(self, experts: int, rank: int) -> None:
        self.A = nn.Parameter(torch.empty(experts * rank, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, experts * rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # the fan is d_in, so this is LoRA's start for each A_k

    def stack(self) -> Tensor:
        return torch.cat([self.A, self.gate.rows()])  # expert codes and gate scores in one product

    def forward(self, input: Tensor) -> Tensor:
        stacked = self.stack() if self.stacked is None else self.stacked
        closed = closed_form(self)
        if closed is not None:
            output, gates = mixture(
                input,
                self.weight,
                self.bias,
                stacked,
                self.B,
                closed,
                windows=self.layout.windows,
                scale=self.scale,
                recorded=self.sink is not None,
            )
            if gates is not None:
                self.record(gates, lambda: self.gate(F.linear(self.tokens(input).detach(), self.gate.rows())))
            return output
        output = self.plain(input)
        h = self.tokens(input)
        read = F.linear(h, stacked)
        codes, scores = read[..., : self.A.shape[0]], read[..., self.A.shape[0] :]
        gates = self.weigh(scores, lambda: F.linear(h.detach(), self.gate.rows()))
        mixed = scale_groups(codes, gates.weights)
        flat = output.reshape(-1, self.out_features)
        return flat.addmm_(mixed.reshape(-1, mixed.shape[-1]), self.B.to(flat.dtype).t()).view(output.shape)


class AdapterLinear(GatedLinear):
    """o_i = y_i + sum_k g_ik (U_k gelu(D_k y_i + c_k) + e_k) with y_i = W h_i: bottleneck adapters after the layer.

    Houlsby et al. 2019, mixed by gates that read the layer's own input, as the low-rank experts' do (paper Table 4,
    "adapter-based experts"). ``D`` (K r, d_out) and ``U`` (d_out, K r) are stacked like A and B, r is the width of the
    bottleneck. U = 0 and e = 0 at the start, so that the function does not change.
    """

    biases = ("D_bias", "U_bias")

    def make(self, experts: int, rank: int) -> None:
        self.D = nn.Parameter(torch.empty(experts * rank, self.out_features))
        self.D_bias = nn.Parameter(torch.zeros(experts * rank))
        self.U = nn.Parameter(torch.zeros(self.out_features, experts * rank))
        self.U_bias = nn.Parameter(torch.zeros(experts, self.out_features))
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        output = self.plain(input)
        h = self.tokens(input)
        gates = self.weigh(F.linear(h, self.gate.rows()), lambda: F.linear(h.detach(), self.gate.rows()))
        codes = F.gelu(F.linear(output.view(*h.shape[:-1], -1), self.D, self.D_bias))
        added = F.linear(scale_groups(codes, gates.weights), self.U)
        return output + (added + gates.weights.to(added.dtype) @ self.U_bias.to(added.dtype)).view(output.shape)
