"""Attacks that move the variables of an image transform: fog, snow, Gabor noise, a flow, JPEG coefficients.

Kang et al., "Testing robustness against unforeseen adversaries" (arXiv:1908.08016; github.com/ddkang/advex-uar), as
Laidlaw et al. use them (ICLR 2021; github.com/cassidylaidlaw/perceptual-advex): untargeted, sign steps of
bound / sqrt(steps), last iterate. An attack says how the variables of a batch become images; the ascent is here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rome.attacks.base import Steps, StepSize
from rome.attacks.engine import Model, check_bound, log_odds
from rome.attacks.free import Form, LastIterate
from rome.core.component import Number
from rome.threats import Threat
from rome.threats.projections import signs


class Transform(ABC):
    """An image transform with variables in [low, high], prepared for one batch.

    Attributes:
        start: the variables (B, ...) the ascent begins with, within their range.
        first: where the first gradient is taken; ``start``, unless the published code has it elsewhere.
    """

    low: float = 0.0
    high: float = 1.0

    def __init__(self, start: Tensor) -> None:
        self.start = self.first = start

    @abstractmethod
    def images(self, variables: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1]; differentiable in the variables, each image a function of its own."""

    def project(self, variables: Tensor) -> Tensor:
        """Allowed variables near these."""
        return variables.clamp(self.low, self.high)

    def moved(self, variables: Tensor, step: Tensor) -> Tensor:
        """Allowed variables after a step."""
        return self.project(variables + step)

    def contains(self, variables: Tensor) -> Tensor:
        """Whose variables are allowed: bool (B,)."""
        return ((variables >= self.low) & (variables <= self.high)).flatten(1).all(dim=1)


class TransformAttack(LastIterate):
    """Ascends the cross-entropy over the variables v of a transform: v <- P(v + step_size sign(gradient)).

    It bounds its perturbation itself and runs under :class:`~rome.threats.AnyImage`. Everything random (start,
    kernels) depends on the seed and the image alone.
    """

    bound: Number = Field(ge=0)
    steps: Steps = 100
    step_size: StepSize | None = None
    """In the units of the variables; None is :meth:`default_step`."""
    best: bool = False
    """Return the iterate with the highest loss instead of the last one; costs one forward more."""
    form: Form = "corrected"

    @model_validator(mode="after")
    def _published_as_it_was(self) -> Self:
        if self.form == "published" and (self.best or self.stop):
            raise ValueError("the published form returns its last iterate: leave best and stop out, or form")
        return self

    def passes_for(self, threat: Threat) -> float:
        return super().passes_for(threat) + self.best

    def default_step(self) -> float:
        """bound / sqrt(steps), as published."""
        return self.bound / math.sqrt(max(self.steps, 1))

    @abstractmethod
    def prepare(self, x: Tensor, noise: Tensor) -> Transform:
        """The transform of a batch.

        Args:
            x: images (B, C, H, W) in [0, 1].
            noise: U[0, 1), (B, *noise_shape), in the images' dtype.
        """

    def last(self, model: Model, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        with _no_autocast(x.device):
            transform = self.prepare(x, noise.to(x.dtype))
        variables = self.ascend(model, transform, y)
        check_bound(self.kind, transform.contains(variables), variables)
        return _images(transform, variables)

    def ascend(self, model: Model, transform: Transform, y: Tensor) -> Tensor:
        """The variables after all steps, or the best on the way; never waits for the device."""
        size = self.default_step() if self.step_size is None else self.step_size
        variables = best = transform.start
        highest = torch.full_like(y, -torch.inf, dtype=torch.float32)
        for i in range(self.steps):
            loss, gradient = _loss_and_gradient(model, transform, variables if i else transform.first, y)
            if self.best:
                highest, best = _better(loss, variables, highest, best)
            variables = transform.moved(variables, size * signs(gradient))
        if not self.best:
            return variables
        loss = log_odds(model(_images(transform, variables)), y)
        return _better(loss, variables, highest, best)[1]


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _images(transform: Transform, variables: Tensor) -> Tensor:
    """In the variables' own precision, whatever autocast the model runs under."""
    with _no_autocast(variables.device):
        return transform.images(variables)


def _loss_and_gradient(model: Model, transform: Transform, variables: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log odds against the label (B,) and their gradient in the variables, summed so that examples stay independent."""
    variables = variables.detach().requires_grad_()
    with torch.enable_grad():
        loss = log_odds(model(_images(transform, variables)), y)
        (gradient,) = torch.autograd.grad(loss.sum(), variables)
    return loss.detach(), gradient


def _better(loss: Tensor, variables: Tensor, highest: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
    """Each example's highest loss so far (B,) and its variables."""
    rises = (loss > highest).view(-1, *(1,) * (variables.ndim - 1))
    return torch.maximum(loss, highest), torch.where(rises, variables, best)
