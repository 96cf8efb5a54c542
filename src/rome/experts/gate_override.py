"""Other gates than the learned ones at inference: what the experts and their gates are worth (paper 5.4, Table 5)."""

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
    """Replace the gate weights of every adapted layer by others, until the next call; in place.

    ``inverse``: (1 - g) / (K - 1), the inverted weights scaled to sum to 1; ``inverse-unscaled``: 1 - g as the paper
    writes it, which sums to K - 1, so that the experts weigh three times as much where K = 4 (feed-forward experts of
    ``top`` divide by the sum in any case). ``random``: weights drawn once for each
    layer and expert, uniform over the simplex and the same for every image and token, so that the model stays a
    function of its input. ``none``: no experts at all. ``learned``: back to the gates. What is recorded are the
    learned gates.

    Returns:
        The same model.

    Raises:
        UserError: there is no such routing, or the model has no experts, one expert only and so no inverse, or experts
            that stand in a layer's place and so cannot be left out. Nothing has changed then.
    """
    if routing not in get_args(Routing):
        raise UserError(f"there is no routing {routing!r}.{did_you_mean(routing, get_args(Routing))}")
    layers = expert_layers(model)
    if not layers and routing != "learned":
        raise UserError(f"routing {routing} is for models with experts, and this one has none; leave it out")
    for name, layer in layers.items():
        if routing == "none" and not layer.additive:
            raise UserError(
                f"the experts of {name or 'this model'} stand in the layer's place: without them nothing is left"
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
    """What :func:`set_routing` set last; where layers differ, all of it, such as ``inverse+learned``."""
    return "+".join(sorted({layer.routing for layer in expert_layers(model).values()})) or LEARNED
