"""Optimizers and the learning-rate schedule."""

from __future__ import annotations

from abc import abstractmethod
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field, field_validator
from torch import nn

from rome.core.component import Component, Number, Settings
from rome.experts import expert_layers


class Optimizer(Component):
    """An optimizer's settings."""

    default_kind = "adamw"
    lr: Number = Field(gt=0)
    """Peak learning rate, multiplied by the schedule's factor."""
    weight_decay: Number = Field(default=0.05, ge=0)
    """Weight decay: decoupled from the gradient in AdamW, added to the gradient in SGD."""
    decay_all: bool = False
    """Also decay biases and normalization layers; false exempts 1-D parameters and those that the model lists (DeiT's
    recipe)."""
    experts_lr: Number = Field(default=1, gt=0)
    """Learning-rate multiplier for the parameters that experts add to a model, except their gates."""
    gates_lr: Number = Field(default=1, gt=0)
    """Learning-rate multiplier for the gates."""

    @abstractmethod
    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer for the parameters that require a gradient."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Split the parameters into groups by weight decay and learning-rate multiplier (``lr_scale``)."""
        if self.decay_all:
            every = [p for p in model.parameters() if p.requires_grad]
            groups: list[dict[str, Any]] = [{"params": every, "weight_decay": self.weight_decay}]
        else:
            from timm.optim._param_groups import param_groups_weight_decay

            backbone, prefix = (model.backbone, "backbone.") if hasattr(model, "backbone") else (model, "")
            skip = {prefix + name for name in getattr(backbone, "no_weight_decay", set)()}
            skip |= {f"{name}.{bias}" for name, layer in expert_layers(model).items() for bias in layer.biases}
            groups = list(param_groups_weight_decay(model, self.weight_decay, no_weight_decay_list=skip))
        if self.experts_lr == self.gates_lr == 1:
            return groups
        scale = self._scales(model)
        split = []
        for group in groups:
            for factor in dict.fromkeys(scale.get(p, 1.0) for p in group["params"]):
                members = [p for p in group["params"] if scale.get(p, 1.0) == factor]
                split.append({**group, "params": members, "lr_scale": factor})
        return split

    def _scales(self, model: nn.Module) -> dict[nn.Parameter, float]:
        """Learning-rate multipliers for the parameters that experts add."""
        scales: dict[nn.Parameter, float] = {}
        for layer in expert_layers(model).values():
            kept = layer.shared if layer.additive else ()  # where experts replace a layer, its original is one of them
            shared = {layer.get_parameter(name) for name in kept if name in dict(layer.named_parameters())}
            scales |= {p: self.experts_lr for p in layer.parameters() if p not in shared}
            scales |= dict.fromkeys(layer.gate_parameters(), self.gates_lr)
        return scales


def fuses(model: nn.Module) -> bool:
    """Whether the model's optimizer is one kernel, which a CUDA graph can contain: on CUDA."""
    return next(model.parameters()).is_cuda


Beta = Annotated[Number, Field(ge=0, lt=1)]


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019), the paper's optimizer: lr 1e-3 on CIFAR-10, 1e-4 on ImageNet."""

    kind = "adamw"
    lr: Number = Field(default=1e-3, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Decay rates for the running means of the gradient and its square."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.groups(model), lr=self.lr, betas=self.betas, fused=fuses(model))


class SGD(Optimizer):
    """SGD with momentum, the optimizer of E-AT and RAMP."""

    kind = "sgd"
    lr: Number = Field(default=0.05, gt=0)
    weight_decay: Number = Field(default=5e-4, ge=0)
    momentum: Number = Field(default=0.9, ge=0, lt=1)
    """Momentum factor; 0 for none."""
    nesterov: bool = False
    """Use Nesterov momentum."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            self.groups(model), lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, fused=fuses(model)
        )


class Schedule(Settings):
    """Learning-rate schedule: a factor on the peak rate, interpolated linearly between points at every update.

    The default is the paper's schedule for every data set (A1): warm-up from 0 to 1 over the first fifth of training,
    then down to 0.05 at four fifths and 0.001 at the end (epochs 4, 16, 20 on CIFAR-10 and 1, 4, 5 on ImageNet).
    """

    points: tuple[tuple[Number, Number], ...] = ((0, 0), (0.2, 1), (0.8, 0.05), (1, 0.001))
    """Points ``[share, factor]``: the share of training done, from 0 to 1, and the factor on the learning rate."""

    @field_validator("points")
    @classmethod
    def _in_order(cls, points: tuple[tuple[float, float], ...]) -> tuple[tuple[float, float], ...]:
        shares = [share for share, _ in points]
        if any(factor < 0 for _, factor in points):
            raise ValueError("factors on the learning rate must not be negative")
        if len(points) < 2 or shares[0] != 0 or shares[-1] != 1 or any(a > b for a, b in pairwise(shares)):
            raise ValueError("points must run from share 0 to share 1 in order, such as [[0, 0], [0.2, 1], [1, 0]]")
        return points

    def factor(self, share: float) -> float:
        """Return the factor after this share (0..1) of the updates."""
        for (left, start), (right, end) in pairwise(self.points):
            if share <= right and right > left:
                return start + (end - start) * max(share - left, 0) / (right - left)
        return self.points[-1][1]
