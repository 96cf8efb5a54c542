"""A component is a frozen, validated value named by its ``kind``: an attack, a method, a threat, a data set.

Writing a subclass with a ``kind`` is its registration: ``class PGD(Attack): kind = "pgd"`` makes
``attack: {kind: pgd, steps: 10}`` valid in every config, and an unknown name answers with the nearest one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetCoreSchemaHandler, model_serializer
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from rome.errors import did_you_mean


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)


def _number(value: Any) -> Any:
    """Accept ``8/255`` where a number is wanted; leave everything else to pydantic."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            message = "'{given}' is not a fraction such as 8/255"
            raise PydanticCustomError("fraction", message, {"given": value}) from None
    return value


Number = Annotated[float, BeforeValidator(_number)]
"""A float that may be written as a fraction: ``8/255``."""


def summary(documented: object) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


class Component(Settings):
    """Base of everything a config names by ``kind``. A direct subclass opens a family (``Attack``); the classes
    below it that set ``kind`` are its members."""

    kind: ClassVar[str] = ""
    default_kind: ClassVar[str] = ""
    """The member meant where a config names none; empty: it must be named."""

    @classmethod
    def family(cls) -> type[Component]:
        """The direct subclass of :class:`Component` this class descends from: the base of its family."""
        return next(base for base in cls.__mro__ if Component in base.__bases__)

    @classmethod
    def members(cls) -> dict[str, type[Self]]:
        """All registered kinds at and below this class, by name."""
        found: dict[str, type[Self]] = {}
        todo: list[type[Self]] = [cls]
        while todo:
            member = todo.pop()
            if member.__dict__.get("kind"):
                found[member.kind] = member
            todo.extend(member.__subclasses__())
        return dict(sorted(found.items()))

    @classmethod
    def of_kind(cls, kind: str) -> type[Self]:
        """The registered class of that name.

        Raises:
            PydanticCustomError: no such kind; the message names the nearest one.
        """
        members = cls.members()
        if not isinstance(kind, str) or kind not in members:
            raise PydanticCustomError(
                "unknown_kind",
                "unknown {family} kind '{given}'.{hint}",
                {"family": cls.family().__name__.lower(), "given": str(kind), "hint": did_you_mean(kind, members)},
            )
        return members[kind]

    @classmethod
    def summary(cls) -> str:
        """The first sentence of the docstring, for listings."""
        return summary(cls)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        own = handler(source)

        def build(value: Any, validate: Callable[[Any], Any]) -> Any:
            if isinstance(value, cls):
                return value
            if isinstance(value, str) and not cls.kind:  # `attack: pgd` is short for `attack: {kind: pgd}`
                value = {"kind": value}
            if not isinstance(value, dict):
                return validate(value)
            settings = dict(value)
            kind = settings.pop("kind", cls.kind or cls.default_kind)
            if kind == cls.kind and cls.kind:
                return validate(settings)
            if not kind:
                raise PydanticCustomError(
                    "missing_kind", "needs a kind.{hint}", {"hint": did_you_mean("", cls.members())}
                )
            return cls.of_kind(kind).model_validate(settings)

        return core_schema.no_info_wrap_validator_function(build, own)

    @model_serializer(mode="plain")
    def _with_kind(self) -> dict[str, Any]:
        return {"kind": self.kind, **{name: getattr(self, name) for name in type(self).model_fields}}

    def dump(self) -> dict[str, Any]:
        """The settings as plain data, ``kind`` first: what a config file would say."""
        return self.model_dump(mode="json")
