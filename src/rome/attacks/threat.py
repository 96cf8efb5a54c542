"""Threats that an attack defines: what StAdv, ReColorAdv, fog and their like may do to an image, to be trained on.

Laidlaw et al., "Perceptual adversarial robustness" (ICLR 2021, Table 2), train on StAdv and ReColorAdv, each alone and
joined with Linf and L2 by chance, mean or maximum (github.com/cassidylaidlaw/perceptual-advex, ``adv_train.py``).
"""

from __future__ import annotations

from pydantic import Field, model_validator
from torch import Tensor

from rome.attacks.base import Attack
from rome.core.errors import UserError
from rome.threats import AnyImage, Perceptual, Threat


class AttackThreat(Threat):
    """All images that one attack may make: wherever this threat is met, that attack searches it.

    The attack that a config names searches all other threats. Most attacks here bound their perturbation themselves and
    check it; what :meth:`contains` checks is then the box alone. One that needs a threat to search gets ``inside``.
    """

    kind = "attack"
    attack: Attack
    """What searches this threat wherever it is met."""
    inside: Threat | None = None
    """Where to search: a perceptual threat of features ``self``, or an Lp ball. None: the attack has its own bound."""
    label: str = Field(default="", pattern=r"^([A-Za-z0-9][A-Za-z0-9._+-]*)?$")
    """The name of the column; empty: the attack's kind and number of steps, such as ``stadv-10``."""

    @model_validator(mode="after")
    def _can_be_trained_on(self) -> AttackThreat:
        try:
            self.attack.steps_for(self.place)
        except UserError as error:
            hint = "" if self.inside is not None else "; give it a threat to search (inside: ...)"
            raise ValueError(f"{error}{hint}") from None
        if self.attack.untrained:
            raise ValueError(f"{self.attack.kind} makes no threat to train on: it {self.attack.untrained}")
        if isinstance(self.inside, Perceptual) and self.inside.features != "self":
            raise ValueError(
                f"the network {self.inside.features!r} would be read at every update; measure with features: self, or "
                "train with method pat"
            )
        return self

    @property
    def place(self) -> Threat:
        """Where the attack searches."""
        return AnyImage(label=self.attack.kind) if self.inside is None else self.inside

    @property
    def name(self) -> str:
        return self.label or f"{self.attack.kind}-{self.attack.steps_for(self.place)}"

    def searched_by(self, attack: Attack) -> tuple[Attack, Threat]:
        return self.attack, self.place

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        return self.place.project(x_adv, x)

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """In the measure of ``inside``; without one the largest change of a pixel: (B,)."""
        return self.place.size(x_adv, x)

    def contains(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """According to ``inside``; without one, which examples are in the box."""
        return self.place.contains(x_adv, x)


def check_channels(threats: tuple[Threat, ...], attack: Attack, channels: int) -> None:
    """See before a run starts whether the attacks have a meaning on such images.

    Raises:
        UserError: one has none.
    """
    for threat in threats:
        searcher, _ = threat.searched_by(attack)
        if reason := searcher.unsuited(channels):
            raise UserError(f"threats: {threat.name}: {searcher.kind} {reason}; leave it out")
