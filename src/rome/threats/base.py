"""The contract of a threat: a set of allowed images around every image.

Images are float tensors (B, C, H, W) in [0, 1]; every threat includes that box.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rome.core.component import Component


class Threat(Component):
    """A set of allowed images around every image."""

    default_kind = "lp"

    @property
    @abstractmethod
    def name(self) -> str:
        """A short unique name for columns and logs, such as ``Linf``."""

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Project ``x_adv`` (B, C, H, W) to the nearest allowed image or one near it; here, only into the box."""
        return x_adv.clamp(0, 1)

    @abstractmethod
    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The size of each perturbation in the threat's own measure: (B,)."""

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Whether each image is allowed, up to rounding: bool (B,). Here, whether it is in the box; NaN is not."""
        return ((x_adv >= 0) & (x_adv <= 1)).flatten(1).all(dim=1)

    def resolve_attack(self, attack: Any) -> tuple[Any, Threat]:
        """The :class:`rome.attacks.Attack` that searches when ``attack`` is called with this threat, and the threat it
        searches inside. For threats that an attack defines, both are others (:class:`rome.attacks.AttackThreat`)."""
        return attack, self


class AnyImage(Threat):
    """Every image in [0,1]: for attacks that bound their perturbation by a measure of their own (fog, a patch, a flow).

    Such an attack has its own bound and checks it; only the box is checked here.
    """

    kind = "any-image"
    label: str = "any-image"
    """The name of the threat's column."""

    @property
    def name(self) -> str:
        return self.label

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The largest change of a pixel: (B,)."""
        return (x_adv - x).abs().flatten(1).amax(dim=1)


@dataclass(frozen=True)
class PerExample:
    """The threats of a batch in which every example has its own: ``threats[labels[i]]`` for example i.

    ``labels`` is an int64 tensor (B,) on the CPU, so that attacks can split the batch without waiting for the device.
    """

    threats: tuple[Threat, ...]
    labels: Tensor

    @staticmethod
    def repeated(threats: Iterable[Threat], batch: int) -> PerExample:
        """Every example under every threat, threat by threat: labels 0..0 1..1 2..2, for a batch that is repeated as a
        whole."""
        chosen = tuple(threats)
        return PerExample(chosen, torch.arange(len(chosen)).repeat_interleave(batch))

    def groups(self) -> list[tuple[Threat, Tensor]]:
        """The threats that occur, each with the positions of its examples (int64, CPU)."""
        found = [(threat, (self.labels == i).nonzero().flatten()) for i, threat in enumerate(self.threats)]
        return [(threat, where) for threat, where in found if len(where)]
