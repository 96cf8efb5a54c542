"""A component is a frozen, validated value named by its ``kind``: an attack, a method, a threat, a data set.

Writing a subclass with a ``kind`` is its registration: ``class PGD(Attack): kind = "pgd"`` makes
``attack: {kind: pgd, steps: 10}`` valid in every config, and an unknown name answers with the nearest one.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import takewhile
from typing import Annotated, Any, ClassVar, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    SerializationInfo,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

from rome.core.errors import UserError, did_you_mean, short

FAMILY = "x-family"
"""In a JSON schema, what stands for a member of a family of components."""
UNKNOWN, PLAIN, UNKNOWN_KEY = "unknown_key", "plain", "unknown key."
"""Types of errors whose message needs no further words, and how that of the first begins."""


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        """Raises:
        UserError: every mistake, in one line. Where settings are read from plain data (``model_validate``), pydantic
            raises its own error instead, which collects the mistakes of the whole with their places.
        """
        try:
            super().__init__(**data)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, path))}: {message}" for path, message in mistakes(error).items()]
            raise UserError("; ".join(f"{type(self).__name__}: {each.removeprefix(': ')}" for each in found)) from None

    @model_validator(mode="wrap")
    @classmethod
    def _in_plain_words(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            found = [_in_plain_words(each, cls) for each in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, found) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Python counts true as 1, so that ``epochs: yes`` would be one epoch."""
        given = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(each, bool) for each in given):
            annotation = cls.model_fields[str(info.field_name)].annotation
            if not {bool, Any} & set(types_in(annotation)):
                raise ValueError("cannot be true or false (in YAML also yes, no, on and off; text stands in quotes)")
        return value

    # pydantic otherwise calls an __init__ of one's own for every value inside plain data too
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def _number(value: Any) -> Any:
    """Accept ``8/255`` where a number is wanted; leave everything else to pydantic."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            message = "'{given}' is not a fraction such as 8/255"
            raise PydanticCustomError("fraction", message, {"given": value}) from None
    return value


_Written = Annotated[str, Field(pattern=r"^\s*[-+]?[\d.]+([eE][-+]?\d+)?(\s*/\s*\d+)?\s*$")]  # 1e-3 is text in YAML 1.1
Number = Annotated[float, BeforeValidator(_number, json_schema_input_type=float | _Written)]
"""A float that may be written as a fraction: ``8/255``."""


def _alone(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_alone, json_schema_input_type=str | tuple[str, ...])]
"""Names; one may be written alone."""


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What torch's generators take."""


def summary(documented: object) -> str:
    """The first paragraph of a docstring in one line."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


class Component(Settings):
    """Base of everything a config names by ``kind``. A direct subclass opens a family (``Attack``); the classes
    below it that set ``kind`` are its members."""

    kind: ClassVar[str] = ""
    default_kind: ClassVar[str] = ""
    """The member meant where a config names none; empty: it must be named."""
    also_called: ClassVar[tuple[str, ...]] = ()
    """Words by which a person may look for it in another family."""

    @classmethod
    def family(cls) -> type[Component]:
        """The direct subclass of :class:`Component` this class descends from: the base of its family."""
        return next(base for base in cls.__mro__ if Component in base.__bases__)

    @classmethod
    def members(cls) -> dict[str, type[Self]]:
        """All registered kinds at and below this class, by name: the modules of the package that holds the family are
        imported, so that a new file there registers itself."""
        _import_package(cls.family().__module__.rpartition(".")[0])
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
            hint = cls._elsewhere(str(kind)) + did_you_mean("" if cls._elsewhere(str(kind)) else kind, members)
            raise PydanticCustomError(
                "unknown_kind",
                "unknown {family} kind '{given}'.{hint}",
                {"family": cls.family().__name__.lower(), "given": str(kind), "hint": hint},
            )
        return members[kind]

    @classmethod
    def _elsewhere(cls, kind: str) -> str:
        """That another family has a member of that name, or one that is called by a word of it."""
        words = {kind, *re.split(r"[^a-z0-9]+", kind.lower())}
        for family in Component.__subclasses__():
            for name, member in family.members().items() if family is not cls.family() else ():
                if words & {name, *member.also_called}:
                    key = family.__name__.lower()
                    return f" That is a kind of {key}, which is set beside it: {key}={name}."
        return ""

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

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """That of a member is its settings; a family is named, for :mod:`rome.runs.schema` to say what is in it."""
        return handler(schema) if cls.kind else {FAMILY: cls.__name__}

    @model_serializer(mode="plain")
    def _with_kind(self, info: SerializationInfo) -> dict[str, Any]:
        shown = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if not info.exclude_defaults or getattr(self, name) != field.get_default(call_default_factory=True)
        }
        return {"kind": self.kind, **shown}

    def dump(self) -> dict[str, Any]:
        """The settings as plain data, ``kind`` first: what a config file would say."""
        return self.model_dump(mode="json")


@functools.cache
def _import_package(name: str) -> None:
    """Import the modules of one of rome's packages, but for those that begin with an underscore; a family of another
    package is imported where it is defined."""
    if name.startswith("rome."):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.rpartition(".")[2].startswith("_"):
                importlib.import_module(module.name)


def _in_plain_words(error: ErrorDetails, owner: type[Settings]) -> InitErrorDetails:
    """What pydantic found wrong with the data for some settings, in words that need no pydantic."""
    kind = error["type"]
    message = error["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind == "extra_forbidden":
        kind, message = UNKNOWN, f"{UNKNOWN_KEY}{did_you_mean(error['loc'][-1], owner.model_fields)}"
    elif kind == "missing":
        message = "is missing"
    elif kind not in (UNKNOWN, PLAIN, "unknown_kind", "missing_kind", "fraction", "value_error"):
        message = f"{message[0].lower()}{message[1:]}, not {short(error['input'])}"
    plain = PydanticCustomError(UNKNOWN if kind == UNKNOWN else PLAIN, "{text}", {"text": message})
    return {"type": plain, "loc": error["loc"], "input": error["input"]}


def mistakes(error: ValidationError) -> dict[tuple[str | int, ...], str]:
    """What is wrong with the data for some settings: a message for each place in the data."""
    found: dict[tuple[str | int, ...], str] = {}
    for each in error.errors(include_url=False):
        path = tuple(takewhile(_is_key, each["loc"]))  # a union adds the names of the types it tried
        if each["type"] == UNKNOWN:  # any text can be a key here
            path = (*takewhile(_is_key, each["loc"][:-1]), each["loc"][-1])
        found.setdefault(path, each["msg"])
    return found


def _is_key(part: str | int) -> bool:
    return isinstance(part, int) or (part.replace("_", "").isalnum() and part not in ("int", "float", "str", "bool"))


def types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)
