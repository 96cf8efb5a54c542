"""Attacks that search over the variables of an image transform: fog, snow, Gabor noise, JPEG coefficients, a flow.

A subclass defines how the variables of a batch become images and how a step follows the gradient; the ascent is here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from rome.attacks.base import Steps, StepSize
from rome.attacks.checks import check_bound
from rome.attacks.engine import Model, at_least_float32, log_odds, logits_of
from rome.attacks.free import Form, LastIterate
from rome.core.component import Number
from rome.threats.projections import signs


class Transform(ABC):
    """An image transform with variables in [low, high], prepared for one batch.

    Attributes:
        start: the variables (B, ...) at which the ascent starts, within their range.
        first: the variables at which the first gradient is taken: ``start``, unless the published code differs.
    """

    low: float = 0.0
    high: float = 1.0

    def __init__(self, start: Tensor) -> None:
        self.start = self.first = start

    @abstractmethod
    def images(self, variables: Tensor) -> Tensor:
        """Images (B, C, H, W) in [0, 1]; differentiable, and each image depends only on its own variables."""

    def project(self, variables: Tensor) -> Tensor:
        """Project the variables onto the allowed set."""
        return variables.clamp(self.low, self.high)

    def moved(self, variables: Tensor, step: Tensor) -> Tensor:
        """The allowed variables after a step."""
        return self.project(variables + step)

    def contains(self, variables: Tensor) -> Tensor:
        """Which examples' variables are allowed: bool (B,)."""
        return ((variables >= self.low) & (variables <= self.high)).flatten(1).all(dim=1)


class TransformAttack(LastIterate):
    """Ascends a gain over the variables of a transform.

    It bounds its perturbation itself and runs under :class:`~rome.threats.AnyImage`. Everything random (start, kernels)
    depends only on the seed and the image. The transform is computed in the images' precision even if the model runs
    under autocast.
    """

    steps: Steps = 100
    """Iterations of the search."""

    @abstractmethod
    def prepare(self, x: Tensor, noise: Tensor) -> Transform:
        """Prepare the transform of a batch.

        Args:
            x: images (B, C, H, W) in [0, 1].
            noise: U[0, 1), ``(B, *noise_shape)``, in the images' dtype.
        """

    def gain(self, logits: Tensor, y: Tensor, variables: Tensor) -> Tensor:
        """The quantity to ascend (B,); here the log odds against the label, which rise with the cross-entropy."""
        return log_odds(logits, y)

    @abstractmethod
    def stepper(self, transform: Transform) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function that computes the next variables from the current ones and the gradient of the gain."""

    def last(self, model: Model, x: Tensor, y: Tensor, noise: Tensor) -> Tensor:
        with _full_precision(x.device):
            transform = self.prepare(x, noise.to(x.dtype))
        variables = self.ascend(model, transform, y)
        check_bound(self.kind, transform.contains(variables), variables)
        with _full_precision(x.device):
            return transform.images(variables).clamp(0, 1)

    def ascend(self, model: Model, transform: Transform, y: Tensor) -> Tensor:
        """Return the variables after all steps; never waits for the device."""
        variables, step = transform.start, self.stepper(transform)
        for i in range(self.steps):
            point = (variables if i else transform.first).detach().requires_grad_()
            with torch.enable_grad():
                with _full_precision(point.device):
                    images = transform.images(point)
                gain = self.gain(logits_of(model, images), y, point)
                (gradient,) = torch.autograd.grad(gain.sum(), point)  # a sum, so that examples stay independent
            variables = step(variables, gradient)
        return variables


def _full_precision(device: torch.device) -> AbstractContextManager[object]:
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class SignAscent(TransformAttack):
    """v <- P(v + step_size sign(gradient of the cross-entropy)); returns the last iterate.

    Kang et al., "Testing robustness against unforeseen adversaries" (arXiv:1908.08016; github.com/ddkang/advex-uar), as
    Laidlaw et al. use them (ICLR 2021; github.com/cassidylaidlaw/perceptual-advex): untargeted, steps of
    bound / sqrt(steps).
    """

    bound: Number = Field(ge=0)
    """Largest change of a variable of the transform, in the units of that variable."""
    step_size: StepSize | None = None
    """Step size in the units of the variables; None: :meth:`default_step`."""
    form: Form = "corrected"
    """``published`` computes what the released code computes, including its defects."""

    @model_validator(mode="after")
    def _published_as_it_was(self) -> Self:
        if self.form == "published" and self.stop:
            raise ValueError("the published form returns its last iterate: leave out stop or form")
        return self

    def gain(self, logits: Tensor, y: Tensor, variables: Tensor) -> Tensor:
        """The published form ascends the cross-entropy itself: if the images of a batch depend on each other (fog),
        their relative weights in the sum matter."""
        if self.form == "published":
            return F.cross_entropy(at_least_float32(logits), y, reduction="none")
        return super().gain(logits, y, variables)

    def default_step(self) -> float:
        """bound / sqrt(steps), as published."""
        return self.bound / math.sqrt(max(self.steps, 1))

    def stepper(self, transform: Transform) -> Callable[[Tensor, Tensor], Tensor]:
        size = self.default_step() if self.step_size is None else self.step_size
        return lambda variables, gradient: transform.moved(variables, size * signs(gradient))
