"""Suites of threats that the paper trains nothing on (Table 2): attacks by name, and the common corruptions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from pydantic import Field, field_validator, model_serializer
from pydantic_core import PydanticCustomError

from rome.attacks.base import Attack
from rome.attacks.free import Form, LastIterate
from rome.attacks.suites.base import Case, Suite
from rome.core.component import Number
from rome.core.errors import UserError, did_you_mean
from rome.threats import CIFAR10, AnyImage, LpBall, Perceptual, Threat

PERCEPTUAL, CORRUPTIONS = "perceptual", "corruptions"
"""Groups of cases: the paper's ``Percep. lp`` and ``Com. Corr.`` are their means."""


class Row(NamedTuple):
    """A case by the kind of its attack, whose own settings are those of the paper unless given here."""

    kind: str
    group: str | None = None
    settings: Mapping[str, Any] = {}
    inside: str = "any"
    """``ball``: the Linf ball of the other cases; ``perceptual``: a perceptual bound; else the attack has its own."""


UNSEEN = (
    *(Row(kind, PERCEPTUAL) for kind in ("fog", "snow", "gabor", "elastic", "jpeg")),
    *(Row(kind) for kind in ("sparsefool", "patch", "stadv", "recoloradv")),
    *(Row(kind, inside="perceptual") for kind in ("ppgd", "lpa")),
    Row("gma", "gates", inside="ball"),
)
"""Paper A1: fog 12, snow .5, gabor 60, elastic .125, JPEG-Linf .125 with 100 iterations; SparseFool 10 iterations,
lambda 3; PPGD and LPA bound .25, 20 iterations; patch 8 x 8, 50 iterations of 2/255; StAdv tau .05; ReColorAdv .06, 20
iterations; GMA Linf 20 steps."""

COMMON_CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise"),
    *("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness"),
    *("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
"""The 15 types of Hendrycks and Dietterich (ICLR 2019) that RobustBench counts."""


class UnseenSuite(Suite):
    """Attacks beyond Lp, those of Table 2: fog, snow, gabor, elastic, jpeg, sparsefool, patch and others."""

    kind = "unseen"
    rows: ClassVar[tuple[Row, ...]] = UNSEEN
    features: str = "runs/alexnet"
    """The network that measures for PPGD and LPA: a trained one (``rome train experiments/alexnet/cifar10.yaml --out
    runs/alexnet``), or ``self``, the evaluated model, which flatters itself."""
    bound: Number = Field(default=0.25, gt=0)
    """The perceptual bound of PPGD and LPA."""
    attacks: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Settings of attacks that are not to be the paper's: ``{fog: {steps: 200}, patch: {size: 4}}``."""

    form: Form = "corrected"
    """Of fog, snow, gabor, elastic, jpeg, ppgd and lpa. ``published``: as the code computes them that published numbers
    come from, defects included (docs/decisions/unseen-transforms.md, perceptual.md); the others are the same in both.
    The result's folder and label say so."""
    stop: bool = False
    """An example is done with its first image that is misclassified, also in the attacks that return their last image
    as published (fog, snow, gabor, elastic, jpeg, patch, stadv, recoloradv): faster, at least as strong, and not the
    paper's protocol. ``attacks`` may say otherwise for one."""

    @field_validator("attacks")
    @classmethod
    def _possible(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        kinds = [row.kind for row in cls.rows]
        for kind, settings in given.items():
            if kind not in kinds:
                raise ValueError(f"the suite has no attack {kind!r}.{did_you_mean(kind, kinds)}")
            try:
                _attack(cls.kind, kind, settings)
            except UserError as error:
                raise ValueError(str(error)) from None
        return given

    @model_serializer(mode="plain")
    def _with_kind(self) -> dict[str, Any]:
        """Without ``attacks`` and ``stop`` where there are none, so that evaluations of earlier versions go on."""
        own = {"kind": self.kind, **{name: getattr(self, name) for name in type(self).model_fields}}
        return {name: value for name, value in own.items() if value or name not in ("attacks", "stop")}

    @property
    def measured(self) -> tuple[str, ...]:
        """The cases inside a perceptual bound."""
        return tuple(row.kind for row in self.rows if row.inside == "perceptual")

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        places: dict[str, Threat] = {
            "ball": _linf(threats),
            "perceptual": Perceptual(bound=self.bound, features=self.features),
        }
        return [
            Case(
                name=row.kind,
                threat=places.get(row.inside, AnyImage(label=row.kind)),
                attacks=(_attack(self.kind, row.kind, self._settings(row)),),
                group=row.group,
            )
            for row in self.rows
        ]

    def _settings(self, row: Row) -> dict[str, Any]:
        """Of a row's attack."""
        attack = Attack.members().get(row.kind, Attack)
        stops = {"stop": True} if self.stop and issubclass(attack, LastIterate) else {}
        form = {"form": self.form} if "form" in attack.model_fields else {}
        return {**row.settings, **stops, **form, **self.attacks.get(row.kind, {})}


class CorruptionsSuite(Suite):
    """Common corruptions, every type at every severity: columns such as fog-3, one accuracy as their mean."""

    kind = "corruptions"
    attack: ClassVar[str] = "corruption"
    types: tuple[str, ...] = Field(default=COMMON_CORRUPTIONS, min_length=1)
    severities: tuple[int, ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    path: str | None = None
    """The folder of CIFAR-10-C to read them from; None makes them."""

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        source = {} if self.path is None else {"path": self.path}
        return [
            Case(
                name=f"{type}-{severity}",
                threat=AnyImage(label=f"{type}-{severity}"),
                attacks=(_attack(self.kind, self.attack, {"type": type, "severity": severity, **source}),),
                group=CORRUPTIONS,
                on_all=True,
            )
            for type in self.types
            for severity in self.severities
        ]


def _linf(threats: Mapping[str, Threat]) -> LpBall:
    """The first Linf ball among the threats; CIFAR-10's where there is none."""
    balls = (threat for threat in threats.values() if isinstance(threat, LpBall) and threat.norm == "Linf")
    return next(balls, CIFAR10["Linf"])


def _attack(suite: str, kind: str, settings: Mapping[str, Any]) -> Attack:
    try:
        return Attack.of_kind(kind)(**settings)
    except PydanticCustomError as error:
        raise UserError(f"suite {suite!r} needs an attack that is not there: {error}") from None
    except UserError as error:
        raise UserError(f"suite {suite!r}: attack {kind!r}: {error}") from None
