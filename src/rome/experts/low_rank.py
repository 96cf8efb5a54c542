"""Low-rank experts beside Linear layers and convolutions (paper 4.2, Eq. 2)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rome.core.component import Number
from rome.experts.base import Bottleneck, Module
from rome.experts.conv import MixtureConv2d
from rome.experts.fused import closed_form, mixture
from rome.experts.gated import MixtureLayer
from rome.experts.gated_linear import GatedLinear, scale_groups
from rome.experts.gates import DualScale, Gate, Uniform
from rome.experts.regularizers import Diversification


class MixtureLinear(GatedLinear):
    """o_i = W h_i + sum_k g_ik B_k A_k h_i, the sum times :attr:`scale` where that is not 1.

    The K experts are one contraction: ``A`` (K r, d_in) holds the A_k one above the other, ``B`` (d_out, K r) the B_k
    side by side, and the gate scales each group of r codes in between. With B = 0 the output equals that of the
    replaced layer to the last bit.
    """

    combine = staticmethod(mixture)
    """The fused operation; compiled blocks set one that is excluded from compilation."""

    def create_experts(self, experts: int, rank: int) -> None:
        self.A = nn.Parameter(torch.empty(experts * rank, self.in_features))
        self.B = nn.Parameter(torch.zeros(self.out_features, experts * rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # the fan-in is d_in, so each A_k is initialised as in LoRA

    def stack(self) -> Tensor:
        return torch.cat([self.A, self.gate.rows()])  # expert codes and gate scores in one product

    def forward(self, input: Tensor) -> Tensor:
        stacked = self.stack() if self.stacked is None else self.stacked
        gate = closed_form(self)
        if gate is not None:
            output, gates = self.combine(self, input, stacked, gate)
            if gates is not None:
                self.record(gates, self.tokens(input))
            return output
        output, h = self.base_forward(input), self.tokens(input)
        read = F.linear(h, stacked)
        codes, scores = read[..., : self.A.shape[0]], read[..., self.A.shape[0] :]
        mixed = scale_groups(codes, self.weigh(h, scores).weights)
        flat = output.reshape(-1, self.out_features)
        return flat.addmm_(mixed.reshape(-1, mixed.shape[-1]), self.B.to(flat.dtype).t()).view(output.shape)


class LowRank(Bottleneck):
    """K low-rank experts with a gate beside each selected layer (Eq. 2; the paper's K=4, r=16, QKV and output)."""

    kind = "low-rank"
    also_called = ("rome",)
    conv: Literal["loralib", "peft"] = "loralib"
    """Form of the update of convolutions; see :class:`rome.experts.MixtureConv2d`."""
    alpha: Number | None = Field(default=None, gt=0)
    """Scales the experts by alpha / rank, as LoRA's official implementation does (with alpha 1 by default); null: no
    scaling, as in Eq. 2."""
    initial_b: Number = Field(default=0, ge=0)
    """Standard deviation of B at initialisation. 0, as in LoRA, leaves the model's function unchanged, but the gates
    get no gradient from the cross-entropy until B has grown."""

    def wrap(self, module: Any, gating: dict[str, Any]) -> MixtureLayer:
        layer: MixtureLinear | MixtureConv2d
        if isinstance(module, nn.Conv2d):
            layer = MixtureConv2d(module, rank=self.rank, form=self.conv, **gating)
        else:
            layer = MixtureLinear(module, rank=self.rank, **gating)
        if self.alpha is not None:
            layer.scale = self.alpha / self.rank
        if self.initial_b:
            nn.init.normal_(layer.B, std=self.initial_b)
        return layer


def add_experts(model: Module, *, gate: Gate | None = None, images: Tensor | None = None, **settings: Any) -> Module:
    """Add low-rank experts to a model, in place; its function does not change until they are trained (B = 0).

    Args:
        model: any module with Linear or Conv2d layers: a timm model, one from :func:`rome.create_model`, your own.
        gate: the gate that weights the experts; None: ``DualScale(s=4, b=2)``.
        images: two or more, (B, C, H, W), as the model takes them, to check that it runs the experts. None: zeros of
            the size that the model declares or of a common size, or the model's first forward pass.
        settings: other settings of :class:`LowRank`, such as ``experts`` (K, 4), ``rank`` (r, 16), ``layers`` (the
            paper's for the model's family), ``projection``, ``conv`` and ``alpha``.

    Returns:
        The same model.

    Raises:
        UserError: nothing matches ``layers``, a match cannot be adapted or never runs, or a setting is unknown or out
            of range; the model is then left unchanged.
    """
    usual = {"gate": gate or DualScale(), "regularizer": None if isinstance(gate, Uniform) else Diversification()}
    return LowRank(**usual | settings).inject(model, images)
