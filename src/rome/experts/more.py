"""Whole networks as experts, weighted by a gate network of the same architecture: MORE."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.experts.base import Experts
from rome.experts.gated import MixtureLayer, NetworkMixture
from rome.experts.gates import Gates
from rome.experts.regularizers import Regularizer


class ModelMixture(NetworkMixture):
    """f(x) = sum_i w_i(x) f_i(x) with w = softmax(gate(x)): logits of K networks, weighted per image.

    Cheng et al., "Mixture of robust experts (MORE)" (arXiv 2104.10586; github.com/ChaduCheng/
    Mixture-of-Robust-Experts-MoRE-). ``router``, the gate, is a network of the experts' architecture with K outputs.
    All start as copies of the network, the router with a new classifier, so the function does not change, up to
    rounding. The gates have one token per image: weights (B, 1, K), local None, global (B, K).

    Args:
        network: images (B, C, H, W) to logits (B, classes); becomes the first expert.
        experts: K.

    Raises:
        UserError: the network cannot be copied, or its classifier is not found; the network is then left unchanged.
    """

    def __init__(self, network: nn.Module, *, experts: int) -> None:
        super().__init__()
        classifiers(network)
        try:
            copies = [copy.deepcopy(network) for _ in range(experts)]
        except Exception as error:  # the network's own tensors and objects may raise anything
            raise UserError(f"this {type(network).__name__} cannot be copied: {error}") from error
        self.router = with_outputs(copies.pop(), experts)
        self.networks = nn.ModuleList([network, *copies])
        self.init_gating(network, experts, None)
        self.visited: tuple[int, ...] = ()
        """The experts of the parts of the batch, inside :meth:`apart`."""

    @property
    def graph_state(self) -> Hashable:
        return super().graph_state, self.visited

    def gate_parameters(self) -> list[nn.Parameter]:
        return list(self.router.parameters())

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that the networks exempt from weight decay."""
        own: set[str] = getattr(self.router, "no_weight_decay", set)()
        networks = ("router", *(f"networks.{k}" for k in range(self.experts)))
        return {f"{network}.{name}" for network in networks for name in own}

    def forward(self, x: Tensor) -> Tensor:
        if self.visited:
            parts = x.reshape(len(self.visited), -1, *x.shape[1:])
            return torch.cat([self.networks[k](part) for k, part in zip(self.visited, parts, strict=True)])
        scores = self.router(x)
        if scores.shape != (x.shape[0], self.experts):
            raise UserError(
                f"the gate network returns {tuple(scores.shape)} for {len(x)} images, not {self.experts} weights "
                "each: its last Linear layer is not its classifier. Give the network get_classifier() and "
                "reset_classifier(outputs), as timm's have."
            )
        w = scores.softmax(dim=-1)
        gates = Gates(w.unsqueeze(1), None, w)
        self.record(gates)
        logits = torch.stack([network(x) for network in self.networks], dim=1)
        return (self.route(gates).weights[:, 0].unsqueeze(-1) * logits).sum(dim=1)

    @contextmanager
    def separate_experts(self, *experts: int) -> Iterator[None]:
        """Bypass the gate: inside, the batch consists of equal parts, one for each of these experts alone."""
        before, self.visited = self.visited, experts
        try:
            yield
        finally:
            self.visited = before

    def follow_first(self) -> None:
        """Copy the first expert's weights to the other experts and, except for its classifier, to the gate network."""
        first, own = self.networks[0].state_dict(), prefixes(self.router)
        for network in self.networks[1:]:
            network.load_state_dict(first)
        self.router.load_state_dict(
            {name: old if name.startswith(own) else first[name] for name, old in self.router.state_dict().items()}
        )

    def freeze_bodies(self) -> None:
        """Freeze the experts except for their classifiers: parameters, dropout and BatchNorm statistics.

        The gate stays trainable. Call this again after each call of :meth:`train`.
        """
        for network in self.networks:
            network.eval()
            learning = prefixes(network)
            for name, parameter in network.named_parameters():
                if not name.startswith(learning):
                    parameter.requires_grad_(False)


class Networks(Experts):
    """K copies of the whole network, mixed by a gate network of the same architecture (MORE; paper Tables 1, 2, 6).

    They replace the model's ``backbone``, after the normalisation.
    """

    kind = "more"
    own_method: ClassVar[bool] = True
    experts: int = Field(default=3, ge=1)
    """Number of networks, one for each threat."""
    regularizer: Regularizer | None = None

    def replace_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        if any(isinstance(module, MixtureLayer) for module in model.modules()):
            raise UserError("this model has experts already; whole networks can be added only to a model without")
        backbone = getattr(model, "backbone", None)
        if not isinstance(backbone, nn.Module):
            raise UserError(
                f"whole networks replace a model's backbone, and this {type(model).__name__} has none; wrap "
                "it: rome.models.Classifier(model, mean=(0,), std=(1,)), or build it with rome.create_model"
            )
        model.backbone = ModelMixture(backbone, experts=self.experts)
        return {"backbone": backbone}


def classifiers(network: nn.Module) -> dict[str, nn.Module]:
    """Return the last layers of a network by name: those of timm's ``get_classifier``, or else the last Linear layer.

    Raises:
        UserError: there is no layer whose number of outputs could be changed.
    """
    if _of_timm(network):
        last: Any = network.get_classifier()  # type: ignore[operator]
        layers = last if isinstance(last, (tuple, list)) else (last,)
    else:
        layers = [module for module in network.modules() if isinstance(module, nn.Linear)][-1:]
        layers = [layer for layer in layers if type(layer) is nn.Linear]
    found = {name: module for name, module in network.named_modules() if name and any(module is one for one in layers)}
    if not [parameter for layer in found.values() for parameter in layer.parameters()]:
        raise UserError(
            f"this {type(network).__name__} has no classifier that a gate's could replace: neither a plain Linear "
            "layer at its end nor get_classifier() and reset_classifier(outputs), as timm's networks have"
        )
    return found


def prefixes(network: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the parameter names of a network's classifiers."""
    return tuple(f"{name}." for name in classifiers(network))


def with_outputs(network: nn.Module, outputs: int) -> nn.Module:
    """Replace a network's classifier in place by a new one with this number of outputs, and return the network."""
    old = classifiers(network)
    like = next(parameter for layer in old.values() for parameter in layer.parameters())
    if _of_timm(network):
        network.reset_classifier(outputs)  # type: ignore[operator]
    else:
        for name, layer in old.items():
            assert isinstance(layer, nn.Linear)
            network.set_submodule(name, nn.Linear(layer.in_features, outputs, bias=layer.bias is not None))
    for layer in classifiers(network).values():
        layer.to(device=like.device, dtype=like.dtype)
    return network


def _of_timm(network: nn.Module) -> bool:
    return all(callable(getattr(network, name, None)) for name in ("get_classifier", "reset_classifier"))
