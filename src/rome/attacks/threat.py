"""Threats defined by an attack, such as StAdv, ReColorAdv or fog, so that models can be trained on them.

Laidlaw et al., "Perceptual adversarial robustness" (ICLR 2021, Table 2), train on StAdv and ReColorAdv, each alone and
combined with Linf and L2 at random, by their mean or by their maximum (github.com/cassidylaidlaw/perceptual-advex,
``adv_train.py``).
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor

from rome.attacks.base import Attack
from rome.core.errors import UserError
from rome.threats import AnyImage, Perceptual, Threat


class AttackThreat(Threat):
    """All images that a given attack can produce: only that attack searches this threat.

    The attack named in a config searches all other threats. Most attacks here bound their perturbation themselves and
    check it; :meth:`contains` then only checks that images are in [0, 1]. An attack that needs a threat to search in
    takes it from ``inside``.
    """

    kind = "attack"
    attack: Attack
    """The attack that searches this threat wherever it occurs."""
    inside: Threat | None = None
    """The threat to search in: a perceptual one with features ``self``, or an Lp ball. None: the attack has its own
    bound."""
    label: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._+-]*)?$")
    """Name of the column; empty: the attack's kind and number of steps, such as ``stadv-10``."""

    @model_validator(mode="after")
    def _can_be_trained_on(self) -> AttackThreat:
        try:
            self.attack.steps_for(self.place)
        except UserError as error:
            hint = "" if self.inside is not None else "; give it a threat to search (inside: ...)"
            raise ValueError(f"{error}{hint}") from None
        if self.attack.not_for_training:
            raise ValueError(
                f"{self.attack.kind} cannot define a threat to train on: it {self.attack.not_for_training}"
            )
        if isinstance(self.inside, Perceptual) and self.inside.features != "self":
            raise ValueError(
                f"the network {self.inside.features!r} would be read at every update; measure with features: self, or "
                "train with method pat"
            )
        return self

    @property
    def place(self) -> Threat:
        """The threat in which the attack searches."""
        return AnyImage(label=self.attack.kind) if self.inside is None else self.inside

    @property
    def name(self) -> str:
        return self.label or f"{self.attack.kind}-{self.attack.steps_for(self.place)}"

    def resolve_attack(self, attack: Attack) -> tuple[Attack, Threat]:
        return self.attack, self.place

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return self.place.project(x_adv, x)

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Size in the measure of ``inside``, or the largest change of a pixel without one: (B,)."""
        return self.place.size(x_adv, x)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Which examples are allowed by ``inside``, or in [0, 1] without one: bool (B,)."""
        return self.place.contains(x_adv, x)


def check_channels(threats: tuple[Threat, ...], attack: Attack, channels: int) -> None:
    """Check before a run starts that every attack is defined for images with this many channels.

    Raises:
        UserError: one is not.
    """
    for threat in threats:
        searcher, _ = threat.resolve_attack(attack)
        if reason := searcher.unsupported_reason(channels):
            raise UserError(f"threats: {threat.name}: {searcher.kind} {reason}; leave it out")
