"""Feed-forward experts: the conventional mixture of experts of vision transformers (paper 4.1, Fig. 3, Table 6)."""

from __future__ import annotations

import copy
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.experts.base import Layerwise
from rome.experts.fused import is_exporting
from rome.experts.gated import MixtureLayer, NetworkMixture
from rome.experts.gates import Gate, Local
from rome.experts.placement import for_class_token, matches_end


class MixtureFFN(NetworkMixture):
    """o_i = sum_k w_ik FFN_k(h_i) over the ``top`` experts with the largest gates, their weights scaled to sum to 1.

    With a softmax gate these weights are the softmax over the selected scores. Every expert starts as a copy of the
    block's own network (sparse upcycling, Komatsuzaki et al. 2023), so the function does not change; or all start at
    random. Only ``top`` experts process a token: tokens are sorted by expert, which waits for the device once a layer.
    ``top=None`` mixes all experts.

    Args:
        ffn: the network to replicate, (B, T, d) to (B, T, d_out).
        top: experts per token.
        start: ``random`` needs a network for which :func:`without_random_start` returns nothing.
        gating: see :meth:`MixtureLayer.init_gating`.
    """

    def __init__(self, ffn: nn.Module, *, top: int | None, start: Literal["copies", "random"], **gating: Any) -> None:
        super().__init__()
        self.in_features, self.top, self.start, experts = input_size(ffn), top, start, gating["experts"]
        self.networks = nn.ModuleList([ffn, *(copy.deepcopy(ffn) for _ in range(experts - 1))])
        if start == "random":
            self.networks.apply(_reset)
        self.init_gating(ffn, **gating)

    @property
    def shared(self) -> tuple[str, ...]:
        return super().shared if self.start == "copies" else ()

    def forward(self, input: Tensor) -> Tensor:
        h = input.reshape(input.shape[0], -1, self.in_features)
        gates = self.weigh(h)
        if self.top is None:
            mixed = self._mix_all(h, gates.weights)
        elif is_exporting():
            best = gates.weights.topk(self.top, dim=-1)
            shares = best.values / best.values.sum(dim=-1, keepdim=True)
            mixed = self._mix_all(h, torch.zeros_like(gates.weights).scatter(-1, best.indices, shares))
        else:
            mixed = self._mix_best(h, gates.weights, self.top)
        return mixed.view(*input.shape[:-1], -1)

    def _mix_all(self, h: Tensor, weights: Tensor) -> Tensor:
        outputs = torch.stack([network(h) for network in self.networks], dim=-1)
        return (outputs * weights.to(outputs.dtype).unsqueeze(-2)).sum(dim=-1)

    def _mix_best(self, h: Tensor, weights: Tensor, top: int) -> Tensor:
        best = weights.flatten(0, 1).topk(top, dim=-1)
        shares = (best.values / best.values.sum(dim=-1, keepdim=True)).flatten()
        order = best.indices.flatten().argsort(stable=True)
        counts = best.indices.flatten().bincount(minlength=self.experts).tolist()
        tokens = order.div(top, rounding_mode="floor")
        inputs = torch.split(h.flatten(0, 1)[tokens], counts)
        outputs = torch.cat([network(x) for network, x in zip(self.networks, inputs, strict=True)])
        outputs = outputs * shares[order].to(outputs.dtype).unsqueeze(-1)
        mixed = outputs.new_zeros(h.shape[0] * h.shape[1], outputs.shape[-1]).index_add(0, tokens, outputs)
        return mixed.view(*h.shape[:-1], -1)

    def extra_repr(self) -> str:
        return f"experts={self.experts}, top={self.top}"


class FeedForward(Layerwise):
    """K copies of each block's feed-forward network, of which each token uses the best (paper 4.1, Fig. 3, Table 6)."""

    kind = "ffn"
    gate: Gate = Field(default_factory=Local)
    top: int | None = Field(default=2, ge=1)
    """Experts per token; null mixes all of them."""
    start: Literal["copies", "random"] = "copies"
    """Every expert starts as a copy of the block's own network, or all start at random, as in an untrained vision
    transformer: Linear weights normal with standard deviation 0.02, biases 0."""
    layers: tuple[str, ...] = Field(default=("mlp",), min_length=1)
    """The feed-forward networks, named as the layers of ``low-rank``. Those of class attention and attention pooling
    are selected only by a pattern that names ``cls_attn_blocks`` or ``attn_pool``."""

    @model_validator(mode="after")
    def _check_top(self) -> Self:
        if self.top is not None and self.top > self.experts:
            raise ValueError(f"top: {self.top} exceeds the {self.experts} experts")
        return self

    def select_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        chosen = {
            name: module
            for name, module in model.named_modules()
            if name
            and any(matches_end(name, pattern) and not for_class_token(name, pattern) for pattern in self.layers)
        }
        if not chosen:
            named = ", ".join(self.layers)
            raise UserError(f"this model has no feed-forward networks named {named}; set experts.layers")
        return chosen

    def width(self, module: nn.Module) -> int:
        return input_size(module)

    def check(self, name: str, module: nn.Module) -> None:
        if not any(isinstance(part, nn.Linear) for part in module.modules()):
            raise UserError(f"{name} has no Linear layer, so it is not a feed-forward network; set experts.layers")
        if self.start == "random" and (fixed := without_random_start(module)):
            raise UserError(f"experts.start: random cannot initialise {name}.{fixed[0]}; use start: copies")

    def wrap(self, module: Any, gating: dict[str, Any]) -> MixtureLayer:
        return MixtureFFN(module, top=self.top, start=self.start, **gating)


def input_size(network: nn.Module) -> int:
    """Return d, the input size of a feed-forward network."""
    return next(part.in_features for part in network.modules() if isinstance(part, nn.Linear))


def without_random_start(network: nn.Module) -> list[str]:
    """Return the names of the parameters without a random start: those of modules without ``reset_parameters``."""
    return [
        f"{name}.{parameter}".removeprefix(".")
        for name, module in network.named_modules()
        for parameter, _ in module.named_parameters(recurse=False)
        if not callable(getattr(module, "reset_parameters", None))
    ]


def _reset(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif callable(reset := getattr(module, "reset_parameters", None)):
        reset()
