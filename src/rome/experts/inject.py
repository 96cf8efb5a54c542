"""Putting experts beside existing layers, in place (paper 4.2 and 5.1)."""

from __future__ import annotations

import fnmatch
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator
from torch import nn

from rome.component import Component
from rome.errors import UserError
from rome.experts.diversity import Diversification, Regularizer
from rome.experts.gating import DualScale, Gate
from rome.experts.mixture import MixtureLinear

Module = TypeVar("Module", bound=nn.Module)


class Experts(Component):
    """Settings of the experts beside a backbone."""

    default_kind = "low-rank"

    regularizer: Regularizer | None = Field(default_factory=Diversification)
    """Loss on the gates while training; null for none."""

    @abstractmethod
    def inject(self, model: Module) -> Module:
        """Add the experts to ``model`` in place and return it."""


class LowRank(Experts):
    """K low-rank experts with a gate beside each chosen Linear layer (Eq. 2; the paper's K=4, r=16, QKV and output)."""

    kind = "low-rank"
    experts: int = Field(default=4, ge=1)
    rank: int = Field(default=16, ge=1)
    layers: tuple[str, ...] = Field(default=("qkv", "proj"), min_length=1)
    """Names of the layers to adapt: the end of a module's name (``qkv``, ``attn.proj``), or a pattern for its end
    (``blocks.*.mlp.fc?``)."""
    gate: Gate = Field(default_factory=DualScale)
    projection: Literal["frozen", "trainable", "none"] = "frozen"
    """The layer K -> K' of Eq. 7: kept at its random start, learned (the literal form, unbounded), or absent."""
    projection_dim: int = Field(default=100, ge=1)

    @model_validator(mode="after")
    def _projection_learns_something(self) -> Self:
        if self.projection == "trainable" and self.regularizer is None:
            raise ValueError("projection: trainable learns from the regularizer alone, and there is none; use frozen")
        return self

    @field_validator("layers", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    def inject(self, model: Module) -> Module:
        chosen = find_layers(model, self.layers)
        blocks = block_numbers(list(chosen))
        for name, linear in chosen.items():
            if self.rank > min(linear.in_features, linear.out_features):
                raise UserError(
                    f"experts.rank {self.rank} exceeds layer {name} ({linear.in_features} -> {linear.out_features}); "
                    f"choose at most {min(linear.in_features, linear.out_features)}"
                )
        for name, linear in chosen.items():
            gate = self.gate.build(linear.in_features, self.experts, block=blocks[name], blocks=max(blocks.values()))
            mixture = MixtureLinear(
                linear,
                experts=self.experts,
                rank=self.rank,
                gate=gate,
                projection_dim=0 if self.projection == "none" else self.projection_dim,
                train_projection=self.projection == "trainable",
            )
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, mixture)
        object.__setattr__(model, "experts_settings", self.dump())  # travels with saved files
        return model


def add_experts(
    model: Module,
    *,
    experts: int = 4,
    rank: int = 16,
    layers: Sequence[str] | str = ("qkv", "proj"),
    gate: Gate | None = None,
    projection: Literal["frozen", "trainable", "none"] = "frozen",
    projection_dim: int = 100,
) -> Module:
    """Add low-rank experts to a model, in place; its function does not change until they are trained (B = 0).

    Args:
        model: any module with Linear layers: a timm model, one from :func:`rome.create_model`, your own.
        experts: K, experts for each layer.
        rank: r, of every expert.
        layers: which layers; see :class:`LowRank`.
        gate: how experts are weighed; None is ``DualScale(s=4, b=2)``.
        projection: of the global gate in the diversification loss (Eq. 7).
        projection_dim: K', its size.

    Returns:
        The same model.

    Raises:
        UserError: nothing matches ``layers``, a match cannot be adapted, or a setting is out of range; the model is
            unchanged then.
    """
    try:
        settings = LowRank(
            experts=experts,
            rank=rank,
            layers=(layers,) if isinstance(layers, str) else tuple(layers),
            gate=gate or DualScale(),
            projection=projection,
            projection_dim=projection_dim,
        )
    except ValidationError as error:
        mistakes = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, not {e['input']!r}" for e in error.errors()]
        raise UserError("; ".join(mistakes)) from None
    return settings.inject(model)


def find_layers(model: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The Linear layers whose names match, in module order.

    Raises:
        UserError: a pattern matches nothing (the message lists what could match), or a match cannot be adapted.
    """
    if hasattr(model, "_orig_mod"):
        raise UserError("this model is compiled already: add the experts first, then compile")
    adapted = tuple(name + "." for name, module in model.named_modules() if isinstance(module, MixtureLinear))
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(adapted)
    }
    unmatched = [pattern for pattern in patterns if not any(_matches(name, pattern) for name in linears)]
    if unmatched:
        ends = sorted({name.rpartition(".")[2] for name, module in linears.items() if type(module) is nn.Linear})
        raise UserError(
            f"no Linear layer matches {', '.join(map(repr, unmatched))}; this model has layers ending in "
            f"{', '.join(ends) or '(no Linear layers at all)'}"
        )
    chosen = {name: m for name, m in linears.items() if any(_matches(name, pattern) for pattern in patterns)}
    names: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if id(module) in {id(m) for m in chosen.values()} and names.setdefault(id(module), name) != name:
            raise UserError(f"layers {names[id(module)]} and {name} are one shared module; it cannot be adapted twice")
    for name, module in chosen.items():
        reason = _refusal(model, name, module)
        if reason:
            raise UserError(f"layer {name} cannot hold experts: {reason}. Leave it out of experts.layers.")
    return chosen


def _matches(name: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, "*." + pattern)


def _refusal(model: nn.Module, name: str, module: nn.Linear) -> str | None:
    if isinstance(module, MixtureLinear):
        return "it has experts already"
    if not name:
        return "it is the model itself; put it into a module"
    parts = name.split(".")
    for depth in range(len(parts)):
        parent = model.get_submodule(".".join(parts[:depth]))
        if isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer)):
            return f"{type(parent).__name__} reads its weight without calling it"
        if type(parent).__name__ == "WindowAttention":
            return "its input is windows of an image, whose global gate is not built yet"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not a plain Linear"
    if not isinstance(module.weight, nn.Parameter):
        return "its weight is computed at each call (spectral_norm, weight_norm)"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it has hooks, which would be lost"
    return None


def block_numbers(names: list[str]) -> dict[str, int]:
    """The block l = 1..L of each layer, for beta(l): layers share a block if their names agree up to the last number.

    ``blocks.3.attn.qkv`` and ``blocks.3.attn.proj`` share a block; a name without a number is a block of its own.
    """
    keys: dict[str, str] = {}
    for name in names:
        parts = name.split(".")
        numbers = [i for i, part in enumerate(parts) if part.isdigit()]
        keys[name] = ".".join(parts[: numbers[-1] + 1]) if numbers else name
    order = {key: i + 1 for i, key in enumerate(dict.fromkeys(keys.values()))}
    return {name: order[key] for name, key in keys.items()}
