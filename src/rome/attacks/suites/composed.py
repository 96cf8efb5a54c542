"""Suites composed of suites, and the ways to specify a suite: a name, several names, settings, or a list of these."""

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
    """Suites, by name or with settings, whose cases form one matrix."""

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        found: dict[str, tuple[Suite, Case]] = {}
        for suite in self.suites:
            for case in suite.cases(threats, classes):
                if case.name in found:
                    raise UserError(
                        f"suites {found[case.name][0].label!r} and {suite.label!r} both have a column {case.name!r}: "
                        "leave one of them out, or evaluate them separately"
                    )
                found[case.name] = suite, case
        return [case for _, case in found.values()]


class AllSuites(SeveralSuites):
    """Everything: autoattack, unseen, corruptions."""

    kind = "all"
    suites: tuple[Suite, ...] = Field(
        default_factory=lambda: (AutoAttackSuite(), UnseenSuite(), CorruptionsSuite()), min_length=1
    )
    """Lp balls, unseen attacks and corruptions, each by name or with settings."""


def parts(suite: Suite) -> list[Suite]:
    """The suites that a suite is composed of, or the suite itself if it is not composed."""
    return [part for each in suite.suites for part in parts(each)] if isinstance(suite, SeveralSuites) else [suite]


def with_features(suite: Suite, features: str | None) -> Suite:
    """Return the suite with this network for perceptual distances, or unchanged if it is None.

    Raises:
        UserError: nothing in the suite measures perceptual distances.
    """
    if features is None:
        return suite
    if not any(isinstance(part, UnseenSuite) for part in parts(suite)):
        raise UserError(f"suite {suite.label!r} measures no perceptual distances: leave --features out")

    def changed(part: Suite) -> Suite:
        if isinstance(part, SeveralSuites):
            return part.model_copy(update={"suites": tuple(map(changed, part.suites))})
        return part.model_copy(update={"features": features}) if isinstance(part, UnseenSuite) else part

    return changed(suite)


def check_files(suite: Suite, cases: Collection[str] | None = None) -> list[str]:
    """Check that the files needed by these cases (None: all) exist, before hours are spent on other cases.

    Returns:
        Sentences about a missing file that the user did not name: the suite's default network.

    Raises:
        UserError: a file that the user named is missing or unusable.
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


def parse_suites(text: str) -> list[Any]:
    """Parse the suites in a text: names separated by commas, or settings as YAML in braces or brackets.

    Raises:
        ValueError: the text is not valid YAML, or names no suite.
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
        raise ValueError(f"name at least one.{did_you_mean('', Suite.members())}")
    return found


def _listed(value: Any) -> Any:
    """Convert a list or text (:func:`parse_suites`) to the settings of one suite; return anything else unchanged."""
    if isinstance(value, str):
        value = parse_suites(value)
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else {"kind": SeveralSuites.kind, "suites": list(value)}
    return value


SuiteChoice = Annotated[Suite, BeforeValidator(_listed, json_schema_input_type=Suite | str | tuple[Suite, ...])]
"""A suite as given in a config or by a caller: ``apgd``, ``apgd,unseen``, ``[apgd, unseen]``, ``{kind: apgd,
iterations: 50}``; in quotes on the command line."""


def as_suite(suite: str | Suite | Mapping[str, Any] | Iterable[str | Suite]) -> Suite:
    """Return the suite with this name, these names or these settings; settings not given have their defaults.

    Raises:
        UserError: there is no such suite.
    """
    if isinstance(suite, Mapping):
        suite = dict(suite)
    elif isinstance(suite, Iterable) and not isinstance(suite, (str, Suite)):
        suite = list(suite)
    try:
        return TypeAdapter(SuiteChoice).validate_python(suite)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"suite: {str(first['msg']).removeprefix('Value error, ')}") from None
