"""Feed-forward experts: the conventional mixture of experts of vision transformers (paper 4.1, Fig. 3, Table 6)."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn

from rome.experts.fused import becomes_a_program
from rome.experts.gated import Gated
from rome.experts.gates import PLAIN, GateModule, Layout


class MixtureFFN(Gated):
    """o_i = sum_k w_ik FFN_k(h_i) over the ``top`` experts with the largest gates, their weights scaled to sum to 1.

    For a softmax gate that is the softmax over the chosen scores. Every expert starts as a copy of the block's own
    network (sparse upcycling, Komatsuzaki et al. 2023), so the function does not change; or all start at random. A
    token visits ``top`` experts only: tokens are sorted by expert, which waits for the device once a layer.
    ``top=None`` mixes all experts.

    Args:
        ffn: the network to multiply, (B, T, d) to (B, T, d_out).
        in_features: d.
        experts: K.
        top: experts for each token.
        gate: turns scores into gate weights.
        projection_dim, train_projection: see :class:`Gated`.
        start: ``random`` takes modules for which :func:`without_start` finds nothing.
    """

    adds = False

    def __init__(
        self,
        ffn: nn.Module,
        in_features: int,
        *,
        experts: int,
        top: int | None,
        gate: GateModule,
        layout: Layout = PLAIN,
        projection_dim: int = 0,
        train_projection: bool = False,
        start: Literal["copies", "random"] = "copies",
    ) -> None:
        super().__init__()
        self.in_features, self.top, self.start = in_features, top, start
        self.networks = nn.ModuleList([ffn, *(copy.deepcopy(ffn) for _ in range(experts - 1))])
        if start == "random":
            self.networks.apply(_restart)
        self.equip(experts, gate, layout, projection_dim, train_projection)
        like = next(ffn.parameters())
        self.to(device=like.device, dtype=like.dtype)
        self.train(ffn.training)

    @property
    def shared(self) -> tuple[str, ...]:
        first = self.networks[0].state_dict() if self.start == "copies" else ()
        return tuple(f"networks.0.{name}" for name in first)

    def plain(self, input: Tensor) -> Tensor:
        answer: Tensor = self.networks[0](input)
        return answer

    def forward(self, input: Tensor) -> Tensor:
        h = input.reshape(input.shape[0], -1, self.in_features)
        rows = self.gate.rows()
        gates = self.weigh(nn.functional.linear(h, rows), lambda: nn.functional.linear(h.detach(), rows))
        if self.top is None:
            mixed = self._all(h, gates.weights)
        elif becomes_a_program():
            best = gates.weights.topk(self.top, dim=-1)
            shares = best.values / best.values.sum(dim=-1, keepdim=True)
            mixed = self._all(h, torch.zeros_like(gates.weights).scatter(-1, best.indices, shares))
        else:
            mixed = self._chosen(h, gates.weights, self.top)
        return mixed.view(*input.shape[:-1], -1)

    def _all(self, h: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.stack([network(h) for network in self.networks], dim=-1)
        return (outputs * weights.to(outputs.dtype).unsqueeze(-2)).sum(dim=-1)

    def _chosen(self, h: Tensor, weights: Tensor, top: int) -> Tensor:
        best = weights.flatten(0, 1).topk(top, dim=-1)
        shares = (best.values / best.values.sum(dim=-1, keepdim=True)).flatten()
        order = best.indices.flatten().argsort(stable=True)
        visits = best.indices.flatten().bincount(minlength=self.experts).tolist()
        tokens = order.div(top, rounding_mode="floor")
        visiting = torch.split(h.flatten(0, 1)[tokens], visits)
        answers = torch.cat([network(x) for network, x in zip(self.networks, visiting, strict=True)])
        answers = answers * shares[order].to(answers.dtype).unsqueeze(-1)
        mixed = answers.new_zeros(h.shape[0] * h.shape[1], answers.shape[-1]).index_add(0, tokens, answers)
        return mixed.view(*h.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top={self.top}"


def without_start(network: nn.Module) -> list[str]:
    """Names of its parameters that have no random start: neither a Linear layer's nor of a module that can reset its
    own."""
    return [
        f"{name}.{parameter}".removeprefix(".")
        for name, module in network.named_modules()
        for parameter, _ in module.named_parameters(recurse=False)
        if not callable(getattr(module, "reset_parameters", None))
    ]


def _restart(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
