"""Suites choose the attacks for each threat: a suite turns threats into cases, and a case is plain data."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from rome.attacks.base import Attack
from rome.attacks.lp.apgd import APGD
from rome.attacks.lp.autoattack import APGDCE, APGDT, FABT, MIN_CLASSES_DLR, Square, standard_runs
from rome.attacks.lp.pgd import PGD
from rome.attacks.threat import AttackThreat
from rome.core.component import Component, Settings
from rome.core.errors import UserError
from rome.threats import LpBall, Threat, labelled

BATCH_SIZE = 250
"""AutoAttack's batch size, and the default of an evaluation."""
SaveImages = Literal["none", "fooled", "all"]
"""Which adversarial images an evaluation keeps: none, those of the examples on which an attack succeeded, or those of
all attacked examples."""
SearchPrecision = Literal["fp32", "tf32"]
"""Precision in which an evaluation's attacks in Lp balls compute products; everything else is computed in fp32."""
LP = "lp"
"""Group of the cases under an Lp ball."""


class Case(Settings):
    """One column of the evaluation matrix: the examples that stay correct under all its attacks, within one threat.

    The attacks run in order, each only on the examples that are still classified correctly.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    threat: Threat
    attacks: tuple[Attack, ...] = Field(min_length=1)
    note: str = ""
    """What readers of the result should know about this choice of attacks."""
    group: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._+-]*$")
    """Group of cases whose mean accuracy is reported; None: ``lp`` under an Lp ball, otherwise no group."""
    on_all: bool = False
    """Whether the case is not an attack but a fixed change of the images, such as a corruption. It is then applied to
    every example, because one misclassified on the clean image may be classified correctly here, and it does not count
    towards average and union."""

    def dump(self) -> dict[str, Any]:
        """The case as plain data."""
        return {name: value for name, value in self.model_dump(mode="json").items() if value is not None}


class Suite(Component):
    """A choice of attacks for each threat."""

    @abstractmethod
    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        """The cases for these threats (column name -> threat) and a model with this many classes.

        Raises:
            UserError: the suite has no attack for one of the threats.
        """

    @property
    def label(self) -> str:
        """Short name for folders and tables."""
        return suite_label(self.dump())


def suite_label(settings: Mapping[str, Any]) -> str:
    """:attr:`Suite.label` of a dumped suite: its kind, or the labels of its parts as in ``apgd+unseen``; ``-published``
    is added if it runs attacks in that form."""
    kind, parts = str(settings.get("kind") or "own"), [suite_label(part) for part in settings.get("suites", ())]
    if kind == "several":
        return "+".join(parts)
    published = settings.get("form") == "published" or any(part.endswith("-published") for part in parts)
    return f"{kind}-published" if published else kind


class _BallSuite(Suite):
    """A case for each Lp ball, and one for each threat that brings its own attack."""

    @abstractmethod
    def attacks(self, ball: LpBall, classes: int) -> tuple[list[Attack], str]:
        """Return the attacks inside a ball and a note on their choice."""

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        made = []
        for name, threat in threats.items():
            if isinstance(threat, LpBall):
                attacks, note = self.attacks(threat, classes)
            elif isinstance(threat, AttackThreat):
                attacks = [threat.attack]
                note = f"searched only by {threat.attack.kind}, the threat's own attack, not by those of the suite"
            else:
                raise UserError(
                    f"suite {self.kind!r} attacks Lp balls; threat {name!r} is a {type(threat).__name__}. "
                    "Give threats such as LpBall(norm='Linf', eps=8/255) or AttackThreat(attack=StAdv())"
                )
            made.append(Case(name=name, threat=threat, attacks=tuple(attacks), note=note))
        return made


class QuickSuite(_BallSuite):
    """rome's own APGD and PGD, as in training: a quick look during development, not for reported results."""

    kind = "lp"
    steps: int = Field(default=20, ge=1)
    """Steps of APGD, and of PGD after it."""

    def attacks(self, ball: LpBall, classes: int) -> tuple[list[Attack], str]:
        note = "a quick look: stronger attacks (suite apgd or autoattack) will find less robustness"
        return [APGD(steps=self.steps), PGD(steps=self.steps)], note


class APGDSuite(_BallSuite):
    """APGD-CE, then APGD-T: the protocol of E-AT and RAMP."""

    kind = "apgd"
    iterations: int = Field(default=100, ge=5)
    """Iterations of APGD and FAB; AutoAttack uses 100, fewer are for tests and quick looks."""

    def attacks(self, ball: LpBall, classes: int) -> tuple[list[Attack], str]:
        """APGD-CE and APGD-T; FAB-T replaces APGD-T if there are too few classes for its loss."""
        few = classes < MIN_CLASSES_DLR
        runs = {part.kind: standard_runs(part.kind, ball) for part in (APGDCE, APGDT, FABT)}
        attacks: list[Attack] = [APGDCE(iterations=self.iterations, restarts=runs["apgd-ce"])]
        if not few:
            attacks.append(APGDT(iterations=self.iterations, targets=min(runs["apgd-t"], classes - 1)))
        if few or self.more:
            attacks.append(FABT(iterations=self.iterations, targets=min(runs["fab-t"], classes - 1)))
        attacks += self.more
        note = (
            f"apgd-t needs {MIN_CLASSES_DLR} classes for its loss and the model has {classes}; "
            f"run instead: {', '.join(attack.kind for attack in attacks)}"
        )
        return attacks, note if few else ""

    @property
    def more(self) -> list[Attack]:
        """Attacks after APGD-T and FAB-T."""
        return []


class AutoAttackSuite(APGDSuite):
    """AutoAttack's standard version: APGD-CE, APGD-T, FAB-T, Square."""

    kind = "autoattack"
    square_queries: int = Field(default=5000, ge=1)
    """Forward passes of Square for each image; AutoAttack uses 5000."""

    @property
    def more(self) -> list[Attack]:
        return [Square(queries=self.square_queries)]


def name_threats(threats: Threat | Iterable[Threat] | Mapping[str, Threat]) -> dict[str, Threat]:
    """Map column names to threats.

    Raises:
        UserError: there is no threat, something is not a threat, or two threats have the same name.
    """
    if isinstance(threats, Mapping):
        pairs = list(threats.items())
    else:
        several = labelled((threats,) if isinstance(threats, Threat) else threats)
        pairs = [(getattr(threat, "name", ""), threat) for threat in several]
    for _, threat in pairs:
        if not isinstance(threat, Threat):
            raise UserError(f"a threat must be a Threat such as LpBall(norm='Linf', eps=8/255), not {threat!r}")
    named = dict(pairs)
    if not named:
        raise UserError("no threats: at least one is needed, such as rome.CIFAR10")
    if len(named) < len(pairs):
        names = ", ".join(name for name, _ in pairs)
        raise UserError(f"two threats have the same name ({names}): give a mapping from names to threats")
    return named
