"""Settings of experts (``experts`` in a config), and adding experts to a model in place (paper 4.2 and 5.1)."""

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
    """Settings of the experts in a model."""

    default_kind = "low-rank"
    own_method: ClassVar[bool] = False
    """Whether these experts need a training method of their own (:attr:`rome.methods.Method.own_experts`)."""

    regularizer: Regularizer | None = Field(default_factory=Diversification)
    """Loss on the gates during training; null for none."""

    def check_threats(self, threats: int) -> None:
        """Raise UserError if the regularizer does not work with this number of threats."""

    def inject(self, model: Module, images: Tensor | None = None) -> Module:
        """Add the experts to ``model`` in place and return it.

        A forward pass checks that the model calls the experts and that each row of their input is an image. It takes
        ``images``, or zeros of the size that the model declares or of a common size; if there is no such pass, the
        check waits for the model's first forward pass (:func:`rome.experts.checking.check_experts`).

        Args:
            images: two or more, (B, C, H, W), as the model takes them.

        Raises:
            UserError: the experts do not fit the model, which is then left unchanged.
        """
        if hasattr(model, "_orig_mod"):
            raise UserError("this model is compiled already: add the experts first, then compile")
        replaced = self.replace_modules(model)
        try:
            check_experts(model, images)
        except BaseException:
            for name, module in replaced.items():
                model.set_submodule(name, module)
            raise
        record_settings(model, self.dump())
        return model

    @abstractmethod
    def replace_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Put the experts into ``model`` in place and return the modules they replaced, by name.

        Raises:
            UserError: the experts do not fit the model, which is then left unchanged.
        """


class Layerwise(Experts):
    """Base of the kinds that give each of several layers K experts and a gate."""

    experts: int = Field(default=4, ge=1)
    """K, the number of experts at each layer."""
    gate: Gate = Field(default_factory=DualScale)
    """The gate that mixes the experts."""
    projection: Literal["frozen", "trainable", "none"] = "frozen"
    """The projection K -> K' of Eq. 7: frozen at its random start, learned (the paper's literal form, whose loss is
    unbounded), or none. A gate without a global part never has one."""
    projection_dim: int = Field(default=100, ge=1)
    """K', the output size of the projection."""

    @model_validator(mode="after")
    def _check_projection(self) -> Self:
        if self.projection == "trainable" and (self.regularizer is None or not self.regularizer.projects):
            raise ValueError(
                "projection: trainable needs a diversification loss with distance l2 or cosine, which alone trains it; "
                "use projection: frozen"
            )
        if isinstance(self.gate, Uniform) and self.regularizer is not None:
            raise ValueError("gate: uniform has no parameters for a regularizer to train; add regularizer: null")
        return self

    def check_threats(self, threats: int) -> None:
        if self.regularizer is not None:
            self.regularizer.check(self.experts, threats)

    def replace_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        chosen = self.select_modules(model)
        check_places(model, chosen)
        numbers = block_numbers(list(chosen))
        layouts = {name: layout_of(model, name) for name in chosen}
        for name, module in chosen.items():
            self.check(name, module)
            if self.gate.needs_class_token and not sees_class_token(model, name):
                raise UserError(f"gate.pool: cls reads a class token, and the input of layer {name} has none; use mean")
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
    def select_modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules to replace, by name."""

    def check(self, name: str, module: nn.Module) -> None:
        """Raise UserError if this module cannot be replaced with these settings."""

    @abstractmethod
    def width(self, module: nn.Module) -> int:
        """Return the number of features that the gate reads at each token."""

    @abstractmethod
    def wrap(self, module: Any, gating: dict[str, Any]) -> MixtureLayer:
        """Return the layer that replaces ``module``, which has passed :meth:`check`.

        Args:
            gating: the arguments of :meth:`MixtureLayer.init_gating` after ``replaced``.
        """


class Bottleneck(Layerwise):
    """Base of the kinds that adapt single layers by experts of a given rank."""

    rank: int = Field(default=16, ge=1)
    """r, the rank (for adapters the bottleneck width) of each expert."""
    layers: Annotated[Names, Field(min_length=1)] | None = None
    """The layers to adapt, each given by the end of its name (``qkv``, ``attn.proj``) or by a pattern for that end
    (``blocks.*.mlp.fc?``). A pattern selects the Linear layers that match it, or convolutions if no Linear layer does.
    null selects the paper's: the QKV and output projections of attention, or else the 3x3 convolutions after the
    stem."""

    def select_modules(self, model: nn.Module) -> dict[str, nn.Module]:
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
