"""Suites made of suites, and what a user may write for a suite: a name, several names, settings, or a list of these."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from rome.attacks.corruptions.severities import load_cifar10c
from rome.attacks.perceptual.features import loaded
from rome.attacks.suites.base import AutoAttackSuite, Case, Suite
from rome.attacks.suites.unseen import CorruptionsSuite, UnseenSuite
from rome.core.errors import UserError, did_you_mean
from rome.core.plain_data import Unreadable, parse_yaml
from rome.threats import Threat


class SeveralSuites(Suite):
    """The cases of several suites, one after the other."""

    kind = "several"
    suites: tuple[Suite, ...] = Field(min_length=1)
    """By name or with settings; their cases stand in one matrix."""

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        found: dict[str, tuple[Suite, Case]] = {}
        for suite in self.suites:
            for case in suite.cases(threats, classes):
                if case.name in found:
                    raise UserError(
                        f"suites {found[case.name][0].label!r} and {suite.label!r} both have a column {case.name!r}: "
                        "leave one of them out, or evaluate them one at a time"
                    )
                found[case.name] = suite, case
        return [case for _, case in found.values()]


class AllSuites(SeveralSuites):
    """Everything there is: autoattack, unseen, corruptions."""

    kind = "all"
    suites: tuple[Suite, ...] = Field(
        default_factory=lambda: (AutoAttackSuite(), UnseenSuite(), CorruptionsSuite()), min_length=1
    )
    """Lp balls, unseen attacks and corruptions, each by name or with settings."""


def parts(suite: Suite) -> list[Suite]:
    """The suites that a suite is made of; itself where it is made of none."""
    return [part for each in suite.suites for part in parts(each)] if isinstance(suite, SeveralSuites) else [suite]


def with_features(suite: Suite, features: str | None) -> Suite:
    """The suite with this network to measure perceptual distances; as it is if None.

    Raises:
        UserError: nothing in the suite measures any.
    """
    if features is None:
        return suite
    if not any(isinstance(part, UnseenSuite) for part in parts(suite)):
        raise UserError(f"suite {suite.label!r} measures no perceptual distances, so --features has no meaning there")

    def changed(part: Suite) -> Suite:
        if isinstance(part, SeveralSuites):
            return part.model_copy(update={"suites": tuple(map(changed, part.suites))})
        return part.model_copy(update={"features": features}) if isinstance(part, UnseenSuite) else part

    return changed(suite)


def check_files(suite: Suite, cases: Collection[str] | None = None) -> list[str]:
    """See before hours of other cases whether the files are there that these cases (None: all) are to read.

    Returns:
        Sentences about what is missing although nobody named it: the suite's usual network.

    Raises:
        UserError: a file that was named is missing or of no use.
    """
    sentences = []
    for part in parts(suite):
        wanted = [case for case in part.cases({}, 0) if cases is None or case.name in cases]
        if isinstance(part, CorruptionsSuite) and part.path is not None and wanted:
            for name in ("labels", *part.types):
                load_cifar10c(part.path, name)
        if isinstance(part, UnseenSuite) and (measured := [case.name for case in wanted if case.threat == part.space]):
            try:
                loaded(part.space, "cpu")
            except UserError as error:
                if part.features != UnseenSuite().features:
                    raise
                sentences.append(f"{' and '.join(measured)} will fail: {error}")
    return sentences


def listed(text: str) -> list[Any]:
    """The suites in a text: names with commas between, or settings as YAML in braces or brackets.

    Raises:
        ValueError: not YAML, or nothing is named.
    """
    if text.lstrip().startswith(("{", "[")):
        try:
            data = parse_yaml(text)
        except Unreadable as error:
            raise ValueError(f"{text!r}: {error}") from None
        found = data if isinstance(data, list) else [data]
    else:
        found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise ValueError(f"none is named.{did_you_mean('', Suite.members())}")
    return found


def _listed(value: Any) -> Any:
    """A list, or a text (:func:`listed`), as settings of one suite; anything else is left to the suite itself."""
    if isinstance(value, str):
        value = listed(value)
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else {"kind": SeveralSuites.kind, "suites": list(value)}
    return value


SuiteChoice = Annotated[Suite, BeforeValidator(_listed, json_schema_input_type=Suite | str | tuple[Suite, ...])]
"""A suite as a config or a caller may give it: ``apgd``, ``apgd,unseen``, ``[apgd, unseen]``, ``{kind: apgd,
iterations: 50}``; on the command line in quotes."""


def as_suite(suite: str | Suite | Mapping[str, Any] | Iterable[str | Suite]) -> Suite:
    """The suite of this name, of these names or of these settings; others are the defaults.

    Raises:
        UserError: no such suite.
    """
    if not isinstance(suite, (str, Suite)):
        suite = dict(suite) if isinstance(suite, Mapping) else list(suite)
    try:
        return TypeAdapter(SuiteChoice).validate_python(suite)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"suite: {str(first['msg']).removeprefix('Value error, ')}") from None
