"""Components: frozen, validated values selected by their ``kind``, such as attacks, methods, threats and data sets.

Defining a subclass with a ``kind`` registers it: ``class PGD(Attack): kind = "pgd"`` makes
``attack: {kind: pgd, steps: 10}`` valid in every config. The error for an unknown name suggests the nearest one.
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
"""Key in a JSON schema whose value is the family that a component there must belong to."""
UNKNOWN, PLAIN, UNKNOWN_KEY = "unknown_key", "plain", "unknown key."
"""Types of errors whose messages are final, and the start of the message for an unknown key."""


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        """Raises:
        UserError: the settings are invalid; one line names every mistake. Settings read from plain data
            (``model_validate``) raise pydantic's own error instead, which collects all mistakes with their locations.
        """
        try:
            super().__init__(**data)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, path))}: {message}" for path, message in mistakes(error).items()]
            raise UserError("; ".join(f"{type(self).__name__}: {each.removeprefix(': ')}" for each in found)) from None

    @model_validator(mode="wrap")
    @classmethod
    def _reword_errors(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            found = [_in_plain_words(each, cls) for each in error.errors(include_url=False)]
            raise ValidationError.from_exception_data(cls.__name__, found) from None

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_bools(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where no bool is expected: Python counts true as 1, so ``epochs: yes`` would be one
        epoch."""
        given = value if isinstance(value, (list, tuple)) else (value,)
        if any(isinstance(each, bool) for each in given):
            annotation = cls.model_fields[str(info.field_name)].annotation
            if not {bool, Any} & set(types_in(annotation)):
                raise ValueError("cannot be true or false (in YAML also yes, no, on and off; put text in quotes)")
        return value

    # otherwise pydantic calls a custom __init__ for every nested value of plain data, too
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]


def _number(value: Any) -> Any:
    """Accept ``8/255`` where a number is expected; leave everything else to pydantic."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ArithmeticError):
            message = "'{given}' is not a fraction such as 8/255"
            raise PydanticCustomError("fraction", message, {"given": value}) from None
    return value


_Numeral = Annotated[str, Field(pattern=r"^\s*[-+]?[\d.]+([eE][-+]?\d+)?(\s*/\s*\d+)?\s*$")]  # 1e-3 is text in YAML 1.1
Number = Annotated[float, BeforeValidator(_number, json_schema_input_type=float | _Numeral)]
"""A float that may be written as a fraction: ``8/255``."""


def _as_tuple(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_as_tuple, json_schema_input_type=str | tuple[str, ...])]
"""Several names; a single one may be written without a list."""


Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""A seed that torch's generators accept."""


def summary(documented: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(documented) or "").split("\n\n")[0].split())


class Component(Settings):
    """Base class of everything that a config selects by ``kind``. A direct subclass defines a family (``Attack``); the
    subclasses of that class that set ``kind`` are the family's members."""

    kind: ClassVar[str] = ""
    default_kind: ClassVar[str] = ""
    """The kind used if a config names none; empty: one must be named."""
    also_called: ClassVar[tuple[str, ...]] = ()
    """Words under which a user may look for it in another family."""

    @classmethod
    def family(cls) -> type[Component]:
        """The base class of the family: the direct subclass of :class:`Component` that this class descends from."""
        return next(base for base in cls.__mro__ if Component in base.__bases__)

    @classmethod
    def members(cls) -> dict[str, type[Self]]:
        """All registered kinds of this class and its subclasses, by name. The modules of the family's package are
        imported first, so that a new file there registers itself."""
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
        """The registered class of this kind.

        Raises:
            PydanticCustomError: there is no such kind; the message suggests the nearest one.
        """
        members = cls.members()
        if not isinstance(kind, str) or kind not in members:
            elsewhere = cls._elsewhere(str(kind))
            hint = elsewhere + did_you_mean("" if elsewhere else kind, members)
            raise PydanticCustomError(
                "unknown_kind",
                "unknown {family} kind '{given}'.{hint}",
                {"family": cls.family().__name__.lower(), "given": str(kind), "hint": hint},
            )
        return members[kind]

    @classmethod
    def _elsewhere(cls, kind: str) -> str:
        """A hint that another family has a member of this name, or one also called by a word in it; else empty."""
        words = {kind, *re.split(r"[^a-z0-9]+", kind.lower())}
        for family in Component.__subclasses__():
            for name, member in family.members().items() if family is not cls.family() else ():
                if words & {name, *member.also_called}:
                    key = family.__name__.lower()
                    return f" That is a kind of {key}, a separate setting: {key}={name}."
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
        """The schema of a member describes its settings; a family is only named, and :mod:`rome.runs.schema` describes
        its members."""
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
        """The settings as plain data, ``kind`` first, as in a config file."""
        return self.model_dump(mode="json")


@functools.cache
def _import_package(name: str) -> None:
    """Import the modules of a package of rome, except those whose names begin with an underscore. A family outside rome
    is imported where it is defined."""
    if name.startswith("rome."):
        package = importlib.import_module(name)
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            if not module.name.rpartition(".")[2].startswith("_"):
                importlib.import_module(module.name)


def _in_plain_words(error: ErrorDetails, owner: type[Settings]) -> InitErrorDetails:
    """Rewrite an error of pydantic in words that a reader who does not know pydantic understands."""
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
    """The messages of a validation error, by their location in the data."""
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
    """The annotation, and all types nested in it."""
    yield annotation
    for part in get_args(annotation):
        yield from types_in(part)
