"""Bottleneck adapters as experts (paper Table 4, "adapter-based experts")."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.experts.base import Bottleneck
from rome.experts.gated import MixtureLayer
from rome.experts.gated_linear import GatedLinear, scale_groups


class AdapterLinear(GatedLinear):
    """o_i = y_i + sum_k g_ik (U_k gelu(D_k y_i + c_k) + e_k) with y_i = W h_i: bottleneck adapters after the layer.

    The adapters of Houlsby et al. 2019, mixed by gates that read the layer's own input, as the gates of low-rank
    experts do (paper Table 4, "adapter-based experts"). ``D`` (K r, d_out) and ``U`` (d_out, K r) are stacked like A
    and B; r is the bottleneck width. U and e are initialised to 0, so adding adapters does not change the function.
    """

    biases = ("D_bias", "U_bias")

    def create_experts(self, experts: int, rank: int) -> None:
        self.D = nn.Parameter(torch.empty(experts * rank, self.out_features))
        self.D_bias = nn.Parameter(torch.zeros(experts * rank))
        self.U = nn.Parameter(torch.zeros(self.out_features, experts * rank))
        self.U_bias = nn.Parameter(torch.zeros(experts, self.out_features))
        nn.init.kaiming_uniform_(self.D, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        output = self.base_forward(input)
        h = self.tokens(input)
        gates = self.weigh(h)
        codes = F.gelu(F.linear(output.view(*h.shape[:-1], -1), self.D, self.D_bias))
        added = F.linear(scale_groups(codes, gates.weights), self.U)
        return output + (added + gates.weights.to(added.dtype) @ self.U_bias.to(added.dtype)).view(output.shape)


class Adapters(Bottleneck):
    """K bottleneck adapters (Houlsby et al. 2019) with a gate after each selected Linear layer (paper Table 4)."""

    kind = "adapter"

    def check(self, name: str, module: nn.Module) -> None:
        super().check(name, module)
        if not isinstance(module, nn.Linear):
            raise UserError(f"layer {name} is a convolution; adapters are for Linear layers, use kind: low-rank")

    def wrap(self, module: Any, gating: dict[str, Any]) -> MixtureLayer:
        return AdapterLinear(module, rank=self.rank, **gating)
