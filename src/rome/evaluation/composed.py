"""Suites made of suites, and what a user may write for a suite: a name, several names, settings, or a list of these."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from rome.errors import UserError
from rome.evaluation.suites import AutoAttackSuite, Case, Suite
from rome.evaluation.unseen import CorruptionsSuite, UnseenSuite
from rome.threats import Threat


class SeveralSuites(Suite):
    """The cases of several suites, one after the other."""

    kind = "several"
    suites: tuple[Suite, ...] = Field(min_length=1)

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        owner: dict[str, Suite] = {}
        cases = []
        for suite in self.suites:
            for case in suite.cases(threats, classes):
                if case.name in owner:
                    raise UserError(
                        f"suites {owner[case.name].label!r} and {suite.label!r} both have a column {case.name!r}: "
                        "leave one of them out, or evaluate them one at a time"
                    )
                owner[case.name] = suite
                cases.append(case)
        return cases


class AllSuites(SeveralSuites):
    """Everything there is: autoattack, unseen, corruptions."""

    kind = "all"
    suites: tuple[Suite, ...] = Field(
        default_factory=lambda: (AutoAttackSuite(), UnseenSuite(), CorruptionsSuite()), min_length=1
    )


def with_features(suite: Suite, features: str | None) -> Suite:
    """The suite with this network to measure perceptual distances; as it is if None.

    Raises:
        UserError: nothing in the suite measures any.
    """
    if features is None:
        return suite
    if isinstance(suite, UnseenSuite):
        return suite.model_copy(update={"features": features})
    if isinstance(suite, SeveralSuites):
        parts = [isinstance(part, (UnseenSuite, SeveralSuites)) for part in suite.suites]
        if any(parts):
            pairs = zip(suite.suites, parts, strict=True)
            changed = tuple(with_features(part, features) if measures else part for part, measures in pairs)
            return suite.model_copy(update={"suites": changed})
    raise UserError(f"suite {suite.label!r} measures no perceptual distances, so --features has no meaning there")


def _listed(value: Any) -> Any:
    """A list, or names with commas, as settings of one suite; anything else is left to the suite itself."""
    if isinstance(value, str) and "," in value:
        value = [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else {"kind": SeveralSuites.kind, "suites": list(value)}
    return value


SuiteChoice = Annotated[Suite, BeforeValidator(_listed)]
"""A suite as a config or a caller may give it: ``apgd``, ``apgd,unseen``, ``[apgd, unseen]``, ``{kind: apgd,
iterations: 50}``."""


def as_suite(suite: str | Suite | Mapping[str, Any] | Iterable[str | Suite]) -> Suite:
    """The suite that was meant, with default settings where only its name is given.

    Raises:
        UserError: no such suite.
    """
    given = suite if isinstance(suite, (str, Suite, Mapping)) else list(suite)
    try:
        return TypeAdapter(SuiteChoice).validate_python(dict(given) if isinstance(given, Mapping) else given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"suite: {first['msg']}") from None
