"""Putting experts into a model, in place (paper 4.2 and 5.1): the settings a config names under ``experts``."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal, Self, TypeVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from rome.core.component import Component, Names, Number
from rome.core.errors import UserError
from rome.experts.checking import check_experts
from rome.experts.conv import MixtureConv2d
from rome.experts.ffn import MixtureFFN, without_start
from rome.experts.gated import Gated
from rome.experts.gated_linear import AdapterLinear, GatedLinear, MixtureLinear
from rome.experts.gates import DualScale, Gate, GateModule, Layout, Local, Uniform
from rome.experts.placement import (
    block_numbers,
    check_places,
    find_layers,
    joins_late,
    layout_of,
    matches_end,
    sees_class_token,
)
from rome.experts.regularizers import Diversification, Regularizer
from rome.experts.state import sign

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

    def sign(self, model: nn.Module) -> None:
        """Note on a model that it got these experts; the notes travel with saved files, which are loaded by them."""
        sign(model, self.dump())

    def inject(self, model: Module, images: Tensor | None = None) -> Module:
        """Add the experts to ``model`` in place and return it.

        A forward pass shows whether the model runs them and whether what they see are images: of ``images``, or of
        zeros in the size that the model itself tells; where there is none, it is the first one that the model makes
        (:func:`rome.experts.checking.check_experts`).

        Args:
            images: two or more (B, C, H, W) as the model takes them.

        Raises:
            UserError: they do not fit; the model is unchanged then.
        """
        replaced = self.place(model)
        try:
            check_experts(model, images)
        except BaseException:
            for name, module in replaced.items():
                model.set_submodule(name, module)
            raise
        self.sign(model)
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
    gate: Gate = Field(default_factory=DualScale)
    projection: Literal["frozen", "trainable", "none"] = "frozen"
    """The layer K -> K' of Eq. 7: kept at its random start, learned (the literal form, unbounded), or absent. A gate
    without global part has none."""
    projection_dim: int = Field(default=100, ge=1)

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
        blocks, made = max(numbers.values()), dict[str, Gated]()
        for name, module in chosen.items():
            layout = layouts[name]
            gate = self.gate.build(self.width(module), self.experts, block=numbers[name], blocks=blocks, layout=layout)
            made[name] = self.beside(module, gate, layout)
            made[name].block = numbers[name]
        for name, layer in made.items():
            model.set_submodule(name, layer)
        return chosen

    @property
    def projected(self) -> tuple[int, bool]:
        """K' (0 for no projection), and whether the projection is trained."""
        absent = self.projection == "none" or not self.gate.has_global
        return 0 if absent else self.projection_dim, self.projection == "trainable"

    @abstractmethod
    def places(self, model: nn.Module) -> dict[str, nn.Module]:
        """The modules to replace, by name."""

    def check(self, name: str, module: nn.Module) -> None:
        """Raise UserError if this module cannot be replaced with these settings."""

    @abstractmethod
    def width(self, module: nn.Module) -> int:
        """Size of what the gate reads at each token."""

    @abstractmethod
    def beside(self, module: nn.Module, gate: GateModule, layout: Layout) -> Gated:
        """What replaces the module."""


class Bottleneck(Layerwise):
    """Base of the kinds whose experts have a rank and stand beside single layers."""

    rank: int = Field(default=16, ge=1)
    layers: Annotated[Names, Field(min_length=1)] | None = None
    """Names of the layers to adapt: the end of a module's name (``qkv``, ``attn.proj``), or a pattern for its end
    (``blocks.*.mlp.fc?``): the Linear layers that match, or the convolutions where none does. null picks the paper's:
    QKV and output projections of attention, else 3x3 convolutions behind the stem."""

    def places(self, model: nn.Module) -> dict[str, nn.Module]:
        return find_layers(model, self.layers)

    def check(self, name: str, module: nn.Module) -> None:
        inputs, outputs = _sides(module)
        if self.rank > min(inputs, outputs):
            raise UserError(
                f"experts.rank {self.rank} exceeds layer {name} ({inputs} -> {outputs}); "
                f"choose at most {min(inputs, outputs)}"
            )

    def width(self, module: nn.Module) -> int:
        return _sides(module)[0]

    def linear(self, build: type[Adapted], module: nn.Module, gate: GateModule, layout: Layout) -> Adapted:
        """A Linear layer with these experts beside it."""
        assert isinstance(module, nn.Linear)
        size, train = self.projected
        return build(
            module,
            experts=self.experts,
            rank=self.rank,
            gate=gate,
            layout=layout,
            projection_dim=size,
            train_projection=train,
        )


class LowRank(Bottleneck):
    """K low-rank experts with a gate beside each chosen layer (Eq. 2; the paper's K=4, r=16, QKV and output)."""

    kind = "low-rank"
    conv: Literal["loralib", "peft"] = "loralib"
    """Form of the update beside convolutions; see :class:`rome.experts.MixtureConv2d`."""
    alpha: Number | None = Field(default=None, gt=0)
    """Scales the experts by alpha / rank, as LoRA's official implementation does (its default is 1); null: by 1, as
    Eq. 2 has it."""
    initial_b: Number = Field(default=0, ge=0)
    """Standard deviation of B at the start. 0, as in LoRA, leaves the model's function unchanged, and cross-entropy
    tells the gates nothing until B has grown."""

    def beside(self, module: nn.Module, gate: GateModule, layout: Layout) -> Gated:
        size, train = self.projected
        layer: MixtureLinear | MixtureConv2d
        if isinstance(module, nn.Conv2d):
            layer = MixtureConv2d(
                module,
                experts=self.experts,
                rank=self.rank,
                gate=gate,
                form=self.conv,
                projection_dim=size,
                train_projection=train,
            )
        else:
            layer = self.linear(MixtureLinear, module, gate, layout)
        if self.alpha is not None:
            layer.scale = self.alpha / self.rank
        if self.initial_b:
            nn.init.normal_(layer.B, std=self.initial_b)
        return layer


class Adapters(Bottleneck):
    """K bottleneck adapters (Houlsby et al. 2019) with a gate behind each chosen Linear layer (paper Table 4)."""

    kind = "adapter"

    def check(self, name: str, module: nn.Module) -> None:
        super().check(name, module)
        if not isinstance(module, nn.Linear):
            raise UserError(f"layer {name} is a convolution; adapters stand behind Linear layers, use kind: low-rank")

    def beside(self, module: nn.Module, gate: GateModule, layout: Layout) -> Gated:
        return self.linear(AdapterLinear, module, gate, layout)


class FeedForward(Layerwise):
    """K copies of each block's feed-forward network, of which a token visits the best (paper 4.1, Fig. 3, Table 6)."""

    kind = "ffn"
    gate: Gate = Field(default_factory=Local)
    top: int | None = Field(default=2, ge=1)
    """Experts for each token; null mixes all of them."""
    start: Literal["copies", "random"] = "copies"
    """Every expert starts as the block's own network, or all of them at random as in a vision transformer that nobody
    has trained: Linear weights normal with deviation 0.02, biases 0."""
    layers: tuple[str, ...] = Field(default=("mlp",), min_length=1)
    """Names of the feed-forward networks, as in ``low-rank``; those of class attention and of pooling by attention are
    meant only where the pattern names ``cls_attn_blocks`` or ``attn_pool``."""

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.top is not None and self.top > self.experts:
            raise ValueError(f"top: {self.top} exceeds the {self.experts} experts")
        return self

    def places(self, model: nn.Module) -> dict[str, nn.Module]:
        chosen = {
            name: module
            for name, module in model.named_modules()
            if name and any(matches_end(name, pattern) and not joins_late(name, pattern) for pattern in self.layers)
        }
        if not chosen:
            named = ", ".join(self.layers)
            raise UserError(f"feed-forward networks named {named} do not exist in this model; set experts.layers")
        return chosen

    def width(self, module: nn.Module) -> int:
        return next(part.in_features for part in module.modules() if isinstance(part, nn.Linear))

    def check(self, name: str, module: nn.Module) -> None:
        if not any(isinstance(part, nn.Linear) for part in module.modules()):
            raise UserError(f"{name} has no Linear layer, so it is no feed-forward network; set experts.layers")
        if self.start == "random" and (lasting := without_start(module)):
            raise UserError(f"experts.start: random knows no start for {name}.{lasting[0]}; use start: copies")

    def beside(self, module: nn.Module, gate: GateModule, layout: Layout) -> Gated:
        size, train = self.projected
        return MixtureFFN(
            module,
            self.width(module),
            experts=self.experts,
            top=self.top,
            gate=gate,
            layout=layout,
            projection_dim=size,
            train_projection=train,
            start=self.start,
        )


def _sides(module: nn.Module) -> tuple[int, int]:
    """Sizes of a layer's input and output: features or channels."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def add_experts(
    model: Module,
    *,
    experts: int = 4,
    rank: int = 16,
    layers: Sequence[str] | str | None = None,
    gate: Gate | None = None,
    projection: Literal["frozen", "trainable", "none"] = "frozen",
    projection_dim: int = 100,
    conv: Literal["loralib", "peft"] = "loralib",
    alpha: float | None = None,
    images: Tensor | None = None,
) -> Module:
    """Add low-rank experts to a model, in place; its function does not change until they are trained (B = 0).

    Args:
        model: any module with Linear or Conv2d layers: a timm model, one from :func:`rome.create_model`, your own.
        experts: K, experts for each layer.
        rank: r, of every expert.
        layers: which layers; None picks the paper's for the model's family. See :class:`LowRank`.
        gate: how experts are weighed; None is ``DualScale(s=4, b=2)``.
        projection: of the global gate in the diversification loss (Eq. 7).
        projection_dim: K', its size.
        conv: form of the update beside convolutions.
        alpha: scales the experts by alpha / rank, as LoRA does; None for a scale of 1, the paper's.
        images: two or more (B, C, H, W) as the model takes them, to see that it runs the experts. None asks the model
            for their size; where it does not tell, its first forward pass shows it.

    Returns:
        The same model.

    Raises:
        UserError: nothing matches ``layers``, a match cannot be adapted or never runs, or a setting is out of range;
            the model is unchanged then.
    """
    return LowRank(
        experts=experts,
        rank=rank,
        layers=(layers,) if isinstance(layers, str) else None if layers is None else tuple(layers),
        gate=gate or DualScale(),
        projection=projection,
        projection_dim=projection_dim,
        conv=conv,
        alpha=alpha,
        regularizer=None if isinstance(gate, Uniform) else Diversification(),
    ).inject(model, images)
