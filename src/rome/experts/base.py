"""Putting experts into a model, in place (paper 4.2 and 5.1): the settings a config names under ``experts``."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from rome.core.component import Component, Names
from rome.core.errors import UserError
from rome.experts.checking import check_experts
from rome.experts.gated import MixtureLayer
from rome.experts.gated_linear import GatedLinear
from rome.experts.gates import DualScale, Gate, Uniform
from rome.experts.placement import (
    block_numbers,
    check_places,
    find_layers,
    layout_of,
    sees_class_token,
)
from rome.experts.regularizers import Diversification, Regularizer
from rome.experts.state import record_settings

Module = TypeVar("Module", bound=nn.Module)
Adapted = TypeVar("Adapted", bound=GatedLinear)


class Experts(Component):
    """Settings of the experts in a backbone."""

    default_kind = "low-rank"
    own_method: ClassVar[bool] = False
    """Whether only a method made for them trains them (:attr:`rome.methods.Method.own_experts`)."""

    regularizer: Regularizer | None = Field(default_factory=Diversification)
    """Loss on the gates while training; null for none."""

    def check_threats(self, threats: int) -> None:
        """Raise UserError if the regularizer does not go with that many threats."""

    def inject(self, model: Module, images: Tensor | None = None) -> Module:
        """Add the experts to ``model`` in place and return it.

        A forward pass shows whether the model runs them and whether what they see are images: of ``images``, or of
        zeros in the size that the model itself names; where it names none, it is the first one that the model makes
        (:func:`rome.experts.checking.check_experts`).

        Args:
            images: two or more (B, C, H, W) as the model takes them.

        Raises:
            UserError: they do not fit; the model is unchanged then.
        """
        if hasattr(model, "_orig_mod"):
            raise UserError("this model is compiled already: add the experts first, then compile")
        replaced = self.place(model)
        try:
            check_experts(model, images)
        except BaseException:
            for name, module in replaced.items():
                model.set_submodule(name, module)
            raise
        record_settings(model, self.dump())
        return model

    @abstractmethod
    def place(self, model: nn.Module) -> dict[str, nn.Module]:
        """Put the experts into ``model`` in place; returns the modules whose places they took, by name.

        Raises:
            UserError: they do not fit; the model is unchanged then.
        """


class Layerwise(Experts):
    """Base of the kinds that put K experts and a gate at each of several layers."""

    experts: int = Field(default=4, ge=1)
    """K, at each layer."""
    gate: Gate = Field(default_factory=DualScale)
    """What mixes them."""
    projection: Literal["frozen", "trainable", "none"] = "frozen"
    """The layer K -> K' of Eq. 7: left at its random start, learned (the literal form, unbounded), or absent. A gate
    without global part has none."""
    projection_dim: int = Field(default=100, ge=1)
    """K' of that layer."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.projection == "trainable" and (self.regularizer is None or not self.regularizer.projects):
            raise ValueError(
                "projection: trainable learns from a diversification loss with l2 or cosine alone, which is not there; "
                "use projection: frozen"
            )
        if isinstance(self.gate, Uniform) and self.regularizer is not None:
            raise ValueError("gate: uniform learns nothing that a regularizer could change; add regularizer: null")
        return self

    def check_threats(self, threats: int) -> None:
        if self.regularizer is not None:
            self.regularizer.check(self.experts, threats)

    def place(self, model: nn.Module) -> dict[str, nn.Module]:
        chosen = self.places(model)
        check_places(model, chosen)
        numbers = block_numbers(list(chosen))
        layouts = {name: layout_of(model, name) for name in chosen}
        for name, module in chosen.items():
            self.check(name, module)
            if self.gate.needs_class_token and not sees_class_token(model, name):
                raise UserError(f"gate.pool: cls reads a class token, and layer {name} sees none; use mean")
        blocks, made = max(numbers.values()), dict[str, MixtureLayer]()
        for name, module in chosen.items():
            layout = layouts[name]
            gate = self.gate.build(self.width(module), self.experts, block=numbers[name], blocks=blocks, layout=layout)
            gating = {
                "experts": self.experts,
                "gate": gate,
                "layout": layout,
                "projection_dim": self.projection_dim if self.projection != "none" and self.gate.has_global else 0,
                "train_projection": self.projection == "trainable",
            }
            made[name] = self.wrap(module, gating)
            made[name].block = numbers[name]
        for name, layer in made.items():
            model.set_submodule(name, layer)
        return chosen

    @abstractmethod
    def places(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to replace, by name."""

    def check(self, name: str, module: nn.Module) -> None:
        """Raise UserError if this module cannot be replaced with these settings."""

    @abstractmethod
    def width(self, module: nn.Module) -> int:
        """Size of what the gate reads at each token."""

    @abstractmethod
    def wrap(self, module: Any, gating: dict[str, Any]) -> MixtureLayer:
        """What replaces the module, which :meth:`check` let pass. ``gating``: for :meth:`MixtureLayer.init_gating`."""


class Bottleneck(Layerwise):
    """Base of the kinds whose experts have a rank and stand beside single layers."""

    rank: int = Field(default=16, ge=1)
    """r of each expert."""
    layers: Annotated[Names, Field(min_length=1)] | None = None
    """Names of the layers to adapt: the end of a module's name (``qkv``, ``attn.proj``), or a pattern for its end
    (``blocks.*.mlp.fc?``): the Linear layers that match, or the convolutions where none does. null picks the paper's:
    QKV and output projections of attention, else 3x3 convolutions behind the stem."""

    def places(self, model: nn.Module) -> dict[str, nn.Module]:
        return find_layers(model, self.layers)

    def check(self, name: str, module: Any) -> None:
        outputs, inputs = module.weight.shape[:2]
        if self.rank > min(inputs, outputs):
            raise UserError(
                f"experts.rank {self.rank} exceeds layer {name} ({inputs} -> {outputs}); "
                f"choose at most {min(inputs, outputs)}"
            )

    def width(self, module: Any) -> int:
        return int(module.weight.shape[1])
