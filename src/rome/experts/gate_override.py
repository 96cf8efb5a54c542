"""Replacing the learned gates at inference, to measure what experts and gates contribute (paper 5.4, Table 5)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import nn

from rome.core.errors import UserError, did_you_mean
from rome.core.randomness import stream
from rome.experts.gated import LEARNED
from rome.experts.recording import expert_layers

Routing = Literal["learned", "random", "inverse", "inverse-unscaled", "none"]


def set_routing(model: nn.Module, routing: Routing, *, seed: int = 0) -> nn.Module:
    """Replace the gate weights of every adapted layer in place, until the next call.

    ``inverse``: (1 - g) / (K - 1), the inverted weights scaled to sum to 1. ``inverse-unscaled``: 1 - g as the paper
    writes it, which sums to K - 1, so that K = 4 experts weigh three times as much (feed-forward experts with ``top``
    divide by the sum in any case). ``random``: weights drawn once for each layer, uniformly from the simplex, and the
    same for every image and token, so that the model stays a function of its input. ``none``: no experts at all.
    ``learned``: the gates again. Recorded gates are always the learned ones.

    Returns:
        The same model.

    Raises:
        UserError: the routing does not exist, or does not fit the model, which is then left unchanged: it has no
            experts, a single expert (no inverse), or experts that replace a layer (no ``none``).
    """
    if routing not in get_args(Routing):
        raise UserError(f"there is no routing {routing!r}.{did_you_mean(routing, get_args(Routing))}")
    layers = expert_layers(model)
    if not layers and routing != "learned":
        raise UserError(f"routing {routing} is for models with experts, and this one has none; leave it out")
    for name, layer in layers.items():
        if routing == "none" and not layer.additive:
            raise UserError(
                f"the experts of {name or 'this model'} replace the layer: with routing none nothing would be left"
            )
        if routing.startswith("inverse") and layer.experts < 2:
            raise UserError(f"layer {name} has one expert, whose gate has no inverse; use routing none")
    for name, layer in layers.items():
        layer.routing, layer.fixed_weights = routing, None
        if routing in ("random", "none"):
            drawn = -torch.log1p(-stream(seed, f"routing:{name}").uniform((layer.experts,)))
            weights = drawn / drawn.sum() if routing == "random" else torch.zeros(layer.experts)
            layer.fixed_weights = weights.to(next(layer.parameters()))
    return model


def routing_of(model: nn.Module) -> str:
    """Return the routing set by :func:`set_routing`; if layers differ, all of them, such as ``inverse+learned``."""
    return "+".join(sorted({layer.routing for layer in expert_layers(model).values()})) or LEARNED
