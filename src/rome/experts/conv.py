"""Convolutions with a gated mixture of low-rank experts (paper 5.1, "our method on CNNs")."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.experts.gated import MixtureLayer


class MixtureConv2d(nn.Conv2d, MixtureLayer):
    """o(s) = (W * x)(s) + sum_k g_k(s) (dW_k * x)(s) at every location s of the output, for square kernels c x c.

    ``form="loralib"`` is the update of the official LoRA implementation (github.com/microsoft/LoRA): A_k (r c, C_in c)
    and B_k (C_out c, r c) with dW_k = B_k A_k viewed as (C_out, C_in, c, c), of rank r c. The dense dW_k are built only
    where that takes fewer multiplications, as with 64 channels (:attr:`dense`). Otherwise the factors are applied one
    after the other: row (o, a) of B_k A_k, a = 0..c-1, is the a-th of c equal blocks of the flattened kernel
    (C_in, c, c) of output o, so A_k applies to block a of the input patch and B_k combines the c blocks. If c does not
    divide C_in, blocks begin or end inside a channel; such a block is a convolution over the channels it touches, with
    zeros outside the block.
    ``form="peft"`` has r filters of size c x c followed by a 1x1 convolution: rank r, cheaper.

    ``A`` and ``B`` stack the experts: (K r c, C_in c) and (C_out c, K r c), or (K r, C_in, c, c) and (C_out, K r). The
    local gate reads the input at the resolution of the output (after adaptive average pooling if the layer changes the
    resolution), the global gate the mean of what the local gate reads. With B = 0 the layer computes W * x.

    Args:
        conv: the layer to adapt, whose parameters are shared: zero padding given as a number, one group, a square
            kernel.
        rank: r.
        form: see above.
        gating: see :meth:`MixtureLayer.init_gating`.
    """

    def __init__(self, conv: nn.Conv2d, *, rank: int, form: Literal["loralib", "peft"], **gating: Any) -> None:
        experts = gating["experts"]
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
        self.init_gating(conv, **gating)

    def base_forward(self, input: Tensor) -> Tensor:
        return super().forward(input)

    def forward(self, input: Tensor) -> Tensor:
        output = self.base_forward(input)
        shape = (output.shape[2], output.shape[3])
        gate_input = input if input.shape[2:] == shape else F.adaptive_avg_pool2d(input, shape)
        weights = self.weigh(gate_input).weights.to(output.dtype).transpose(1, 2)  # (B, K, T)
        mix = self._dense if self.dense else self._factored
        return output + mix(input, weights).view_as(output)

    @property
    def dense(self) -> bool:
        """Whether K dense kernels take no more multiplications at each location than their factors."""
        if self.form == "peft":
            return False
        size, codes = self.kernel_size[0], len(self.A)
        touched = sum(end - first for first, end in self._blocks())
        factored = codes * touched * size**2 + self.out_channels * size * codes
        return self.experts * self.weight.numel() <= factored

    def _dense(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the mixture of the experts, computed with their dense kernels: (B, C_out, T)."""
        size = self.kernel_size[0]
        up = self.B.view(self.out_channels * size, self.experts, -1).transpose(0, 1)  # (K, C_out c, r c)
        kernels = up @ self.A.view(self.experts, -1, self.in_channels * size)
        kernels = kernels.view(-1, self.in_channels, size, size)
        each = F.conv2d(x, kernels, None, self.stride, self.padding, self.dilation)
        return (each.view(x.shape[0], self.experts, self.out_channels, -1) * weights[:, :, None]).sum(dim=1)

    def _factored(self, x: Tensor, weights: Tensor) -> Tensor:
        """Return the mixture of the experts, computed with A_k, the gate weights and B_k."""
        codes = self._codes(x)
        scaled = codes.view(x.shape[0], codes.shape[1], self.experts, -1, weights.shape[-1]) * weights[:, None, :, None]
        joint = self.B.view(self.out_channels, -1, 1, 1)  # for loralib: (C_out, c K r c)
        return F.conv2d(scaled.reshape(x.shape[0], -1, *codes.shape[-2:]), joint)

    def scores(self, h: Tensor) -> Tensor:
        return (self.gate.rows() @ h.flatten(2)).transpose(1, 2)

    def _codes(self, x: Tensor) -> Tensor:
        """Return the codes A_k x at every output location, per block of the input patch: (B, blocks, K r', H', W')."""
        stride, dilation = self.stride, self.dilation
        if self.form == "peft":
            return F.conv2d(x, self.A, None, stride, self.padding, dilation).unsqueeze(1)
        size, channels = self.kernel_size[0], self.in_channels
        codes = []
        for block, (first, end) in enumerate(self._blocks()):
            before = (block * channels - first * size) * size  # entries of the first channel before the block
            filters = F.pad(self.A, (before, (end - first) * size**2 - before - channels * size))
            filters = filters.view(-1, end - first, size, size)
            codes.append(F.conv2d(x[:, first:end], filters, None, stride, self.padding, dilation))
        return torch.stack(codes, dim=1)

    def _blocks(self) -> list[tuple[int, int]]:
        """Return the range of channels, first and end, that each of the c blocks of an input patch touches."""
        size, channels = self.kernel_size[0], self.in_channels
        return [(block * channels // size, -(-(block + 1) * channels // size)) for block in range(size)]

    def extra_repr(self) -> str:
        own = f"experts={self.experts}, rank={self.rank}, scale={self.scale:g}, form={self.form}"
        return f"{super().extra_repr()}, {own}"  # type: ignore[no-untyped-call]
