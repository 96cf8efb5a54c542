"""Convolutions with a gated mixture of low-rank experts beside them (paper 5.1, "our method on CNNs")."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.experts.gated import Gated
from rome.experts.gating import PLAIN, GateModule


class MixtureConv2d(nn.Conv2d, Gated):
    """o(s) = (W * x)(s) + sum_k g_k(s) (dW_k * x)(s) at every location s of the output, for square kernels c x c.

    ``form="loralib"`` is the official LoRA implementation's update (github.com/microsoft/LoRA): A_k (r c, C_in c) and
    B_k (C_out c, r c) with dW_k = (B_k A_k) viewed as (C_out, C_in, c, c), of rank r c. The dense dW_k are never built.
    Row (o, a) of B_k A_k, a = 0..c-1, is the a-th of c equal blocks of output o's flattened kernel (C_in, c, c), so
    A_k applies to block a of the input patch and B_k joins the c blocks. Where c divides C_in a block is a slice of
    the channels and A is one convolution with the blocks in the batch dimension; otherwise the blocks are cut from the
    unfolded patches. Both are exact. ``form="peft"`` has r filters of c x c and a 1x1 convolution: rank r, cheaper.

    ``A`` and ``B`` stack the experts: (K r c, C_in c) and (C_out c, K r c), or (K r, C_in, c, c) and (C_out, K r). The
    local gate reads the input at the resolution of the output (adaptive average pooling where the layer has a stride),
    the global gate its average over all locations. The scale is 1 (Eq. 2). With B = 0 the output does not change.

    Args:
        conv: the layer to adapt; shares its parameters. Zero padding given as a number, one group, a square kernel.
        experts: K.
        rank: r.
        gate: turns scores into gate weights.
        form: see above.
        projection_dim, train_projection: see :class:`Gated`.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        *,
        experts: int,
        rank: int,
        gate: GateModule,
        form: Literal["loralib", "peft"] = "loralib",
        projection_dim: int = 0,
        train_projection: bool = False,
    ) -> None:
        size, inputs, outputs = conv.kernel_size[0], conv.in_channels, conv.out_channels
        super().__init__(inputs, outputs, size, bias=conv.bias is not None, device="meta")
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation
        self.weight, self.bias = conv.weight, conv.bias
        self.rank, self.form = rank, form
        if form == "loralib":
            self.A = nn.Parameter(torch.empty(experts * rank * size, inputs * size))
            self.B = nn.Parameter(torch.zeros(outputs * size, experts * rank * size))
        else:
            self.A = nn.Parameter(torch.empty(experts * rank, inputs, size, size))
            self.B = nn.Parameter(torch.zeros(outputs, experts * rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.equip(experts, gate, PLAIN, projection_dim, train_projection)
        self.to(device=conv.weight.device, dtype=conv.weight.dtype)
        self.train(conv.training)

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        where = (
            input
            if output.shape[2:] == input.shape[2:]
            else F.adaptive_avg_pool2d(input, (output.shape[2], output.shape[3]))
        )
        gates = self.weigh(self._scores(where), lambda: self._scores(where.detach()))
        codes = self._codes(input, output.shape[2:])
        weights = gates.weights.to(codes.dtype).transpose(1, 2)  # (B, K, T)
        scaled = codes.view(len(input), codes.shape[1], self.experts, -1, weights.shape[-1]) * weights[:, None, :, None]
        joint = self.B.view(self.out_channels, -1, 1, 1)  # for loralib: (C_out, c K r c)
        return output + F.conv2d(scaled.reshape(len(input), -1, *output.shape[2:]), joint)

    def _scores(self, where: Tensor) -> Tensor:
        rows = self.gate.rows()
        return F.conv2d(where, rows[:, :, None, None]).flatten(2).transpose(1, 2)

    def _codes(self, x: Tensor, shape: torch.Size) -> Tensor:
        """What the A_k give at every output location, for each block of the input patch: (B, blocks, K r', H', W')."""
        stride, padding, dilation = self.stride, self.padding, self.dilation
        assert not isinstance(padding, str)
        if self.form == "peft":
            return F.conv2d(x, self.A, None, stride, padding, dilation).unsqueeze(1)
        size = self.kernel_size[0]
        if self.in_channels % size == 0:
            slices = x.reshape(-1, self.in_channels // size, *x.shape[2:])
            filters = self.A.view(-1, self.in_channels // size, size, size)
            codes = F.conv2d(slices, filters, None, stride, padding, dilation)
            return codes.view(len(x), size, -1, *shape)
        patches = F.unfold(x, size, dilation, padding, stride)  # (B, C_in c c, T)
        return (self.A @ patches.view(len(x), size, -1, patches.shape[-1])).view(len(x), size, -1, *shape)

    def extra_repr(self) -> str:
        own = f"experts={self.experts}, rank={self.rank}, form={self.form}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]
