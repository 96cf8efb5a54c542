"""Suites of threats on which the paper does not train (Table 2): attacks by name, and the common corruptions."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple, Self

from pydantic import Field, model_validator

from rome.attacks.base import Attack
from rome.attacks.corruptions.attack import Corruption
from rome.attacks.corruptions.severities import CORRUPTIONS as COMMON_CORRUPTIONS
from rome.attacks.corruptions.severities import CorruptionType
from rome.attacks.free import Form
from rome.attacks.suites.base import Case, Suite
from rome.core.component import Number
from rome.core.errors import UserError, did_you_mean
from rome.threats import CIFAR10, AnyImage, LpBall, Perceptual, Threat

PERCEPTUAL, CORRUPTIONS = "perceptual", "corruptions"
"""Groups of cases, whose means are the paper's ``Percep. lp`` and ``Com. Corr.``."""


class Row(NamedTuple):
    """A case, by the kind of its attack; the defaults of the attack's settings are those of the paper."""

    kind: str
    group: str | None = None
    inside: str = "any"
    """The threat: ``ball`` for the Linf ball of the other cases, ``perceptual`` for a perceptual bound, ``any`` if the
    attack has its own bound."""


UNSEEN = (
    *(Row(kind, PERCEPTUAL) for kind in ("fog", "snow", "gabor", "elastic", "jpeg")),
    *(Row(kind) for kind in ("sparsefool", "patch", "stadv", "recoloradv")),
    *(Row(kind, inside="perceptual") for kind in ("ppgd", "lpa")),
    Row("gma", "gates", inside="ball"),
)
"""Paper A1: fog 12, snow .5, gabor 60, elastic .125, JPEG-Linf .125 with 100 iterations; SparseFool 10 iterations,
lambda 3; PPGD and LPA bound .25, 20 iterations; patch 8 x 8, 50 iterations of 2/255; StAdv tau .05; ReColorAdv .06, 20
iterations; GMA Linf 20 steps."""


class UnseenSuite(Suite):
    """Attacks beyond Lp balls, from Table 2: fog, snow, gabor, elastic, jpeg, sparsefool, patch and others."""

    kind = "unseen"
    features: str = "runs/alexnet"
    """The network that measures perceptual distances for PPGD and LPA: a trained one (``rome train
    experiments/alexnet/cifar10.yaml --out runs/alexnet``), or ``self``, the evaluated model, which overestimates its
    own robustness."""
    bound: Number = Field(default=0.25, gt=0)
    """The perceptual bound of PPGD and LPA."""
    attacks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of attacks that differ from the paper's: ``{fog: {steps: 200}, patch: {size: 4}}``."""

    form: Form = "corrected"
    """Form of fog, snow, gabor, elastic, jpeg, ppgd and lpa; the other attacks are the same in both. ``published``
    computes them as the code behind published numbers does, including its defects
    (docs/decisions/unseen-transforms.md, perceptual.md); the names of the result and its folder then say so."""
    stop: bool = False
    """Stop searching for an example at its first misclassified image, also in the attacks that return their last image
    as published (fog, snow, gabor, elastic, jpeg, patch, stadv, recoloradv): faster, at least as strong, but not the
    paper's protocol. ``attacks`` can override it for individual attacks."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        kinds = [row.kind for row in UNSEEN]
        if unknown := self.attacks.keys() - set(kinds):
            raise ValueError(f"the suite has no attack {min(unknown)!r}.{did_you_mean(min(unknown), kinds)}")
        for kind in kinds:
            try:
                self._attack(kind)
            except UserError as error:
                raise ValueError(f"attack {kind!r}: {error}") from None
        return self

    @property
    def space(self) -> Perceptual:
        """The threat in which PPGD and LPA search."""
        return Perceptual(bound=self.bound, features=self.features)

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        balls = (threat for threat in threats.values() if isinstance(threat, LpBall) and threat.norm == "Linf")
        places = {"ball": next(balls, CIFAR10["Linf"]), "perceptual": self.space}
        found = []
        for kind, group, inside in UNSEEN:
            threat = places.get(inside, AnyImage(label=kind))
            found.append(Case(name=kind, threat=threat, attacks=(self._attack(kind),), group=group))
        return found

    def _attack(self, kind: str) -> Attack:
        attack = Attack.of_kind(kind)
        usual = {"stop": self.stop, "form": self.form}
        return attack(**{key: usual[key] for key in usual.keys() & attack.model_fields} | self.attacks.get(kind, {}))


class CorruptionsSuite(Suite):
    """Common corruptions: a column such as fog-3 for every type and severity, and their mean accuracy."""

    kind = "corruptions"
    types: tuple[CorruptionType, ...] = Field(default=COMMON_CORRUPTIONS, min_length=1)
    """Types of corruptions; by default the 15 of Hendrycks and Dietterich (ICLR 2019) that RobustBench counts."""
    severities: tuple[int, ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    """Severities, from 1, the weakest, to 5."""
    path: str | None = None
    """The folder of CIFAR-10-C to read the images from; None: they are generated."""

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        found = []
        for kind, severity in product(self.types, self.severities):
            name, attack = f"{kind}-{severity}", Corruption(type=kind, severity=severity, path=self.path)
            threat = AnyImage(label=name)
            found.append(Case(name=name, threat=threat, attacks=(attack,), group=CORRUPTIONS, on_all=True))
        return found
