"""The JSON schema of configs, with which editors complete and check YAML files (``rome schema``).

A component is written as the name of its kind, or as a mapping whose ``kind`` determines the other valid keys. A file
may leave any setting to the file that it ``extends``, so nothing below the top level is required, and a mapping without
``kind`` may hold the settings of every kind.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

from pydantic_core import to_jsonable_python

from rome.core.component import FAMILY, Component, Settings
from rome.core.trust import import_own
from rome.runs.config import Config

REFERENCE = "#/definitions/{model}"
_LIMITS = {"minimum": "ge", "exclusiveMinimum": "gt", "maximum": "le", "exclusiveMaximum": "lt"}
_NOISE = ("title", "default", "required", "discriminator")
"""Keys of pydantic's schemas that are dropped or computed differently here."""


def schema(modules: Iterable[str] = ()) -> dict[str, Any]:
    """Build the schema, in draft 7, which all editors support.

    Args:
        modules: modules to import, whose components are included in addition to rome's.

    Raises:
        UserError: a module cannot be imported.
    """
    packages = {"rome", *(import_own(name).__name__.partition(".")[0] for name in modules)}
    return _Builder(packages).built()


def written(found: dict[str, Any]) -> str:
    """Format the schema as the text of a file."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


class _Builder:
    def __init__(self, packages: set[str]) -> None:
        self.packages = packages
        rome_last = sorted(_below(Settings), key=lambda cls: cls.__module__.startswith("rome."))
        self.classes = {cls.__name__: cls for cls in rome_last}  # rome's, if a user's class has the same name
        self.definitions: dict[str, Any] = {}

    def built(self) -> dict[str, Any]:
        own = self._settings(Config)
        own["properties"] = {
            "extends": {"type": "string", "description": "A config file to inherit from, relative to this file."},
            **own["properties"],
        }
        return {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "rome config",
            **own,
            "anyOf": [{"required": ["extends"]}, {"required": ["data", "model"]}],
            "definitions": dict(sorted(self.definitions.items())),
        }

    def _settings(self, cls: type[Settings]) -> dict[str, Any]:
        """Schema of a settings class: its properties with their descriptions and defaults."""
        made = cls.model_json_schema(ref_template=REFERENCE)
        for name in made.get("$defs", ()):
            if name not in self.definitions and not issubclass(self.classes[name], Component):
                self.definitions[name] = {}  # before the recursion, as it may contain itself
                self.definitions[name] = self._settings(self.classes[name])
        documented = _documented(cls)
        properties = {}
        for name, field in cls.model_fields.items():
            found = {key: value for key, value in made["properties"][name].items() if key not in _NOISE}
            found = self._followed(found)
            for each in field.metadata:  # pydantic omits limits where a fraction is valid, too
                limits = {key: getattr(each, limit, None) for key, limit in _LIMITS.items()}
                found |= {key: value for key, value in limits.items() if value is not None}
            if name in documented:
                found["description"] = documented[name]
            default = None if field.is_required() else _plain(field.get_default(call_default_factory=True))
            if not field.is_required() and default not in ((), [], {}, ""):
                found["default"] = default
            properties[name] = found
        return {
            "type": "object",
            "description": _words(inspect.getdoc(cls) or ""),
            "properties": properties,
            "additionalProperties": False,
        }

    def _followed(self, part: Any) -> Any:
        """Replace component families in a part of pydantic's schema by references."""
        if isinstance(part, list):
            return [self._followed(each) for each in part]
        if not isinstance(part, dict):
            return part
        if FAMILY in part:
            return {"$ref": REFERENCE.format(model=self._family(self.classes[part[FAMILY]]))}
        if "$ref" in part and issubclass(member := self.classes[part["$ref"].rpartition("/")[2]], Component):
            return self._member(member)
        renamed = {"prefixItems": "items"}  # its name in draft 7
        return {renamed.get(key, key): self._followed(value) for key, value in part.items() if key != "title"}

    def _family(self, cls: type[Any]) -> str:
        """Return the name of a family's definition, creating the definition if necessary."""
        name = cls.__name__
        if name in self.definitions:
            return name
        self.definitions[name] = {}  # before the recursion, as members may contain members
        found = cls.members().items()
        members = {kind: member for kind, member in found if member.__module__.partition(".")[0] in self.packages}
        kinds = [{"const": kind, "description": _words(member.summary())} for kind, member in members.items()]
        cases, every = [], dict[str, list[Any]]()
        for kind, member in members.items():
            definition = f"{name}.{kind}"
            own = self._settings(member)
            own["title"] = f"{name.lower()} {kind}"
            own["properties"] = {"kind": {"const": kind}, **own["properties"]}
            self.definitions[definition] = own
            for key, value in own["properties"].items():
                bare = {part: said for part, said in value.items() if part not in ("default", "description")}
                if key != "kind" and bare not in every.setdefault(key, []):
                    every[key].append(bare)
            this_kind = {"properties": {"kind": {"const": kind}}, "required": ["kind"]}
            cases.append({"if": this_kind, "then": {"$ref": REFERENCE.format(model=definition)}})
        any_kind = {key: found[0] if len(found) == 1 else {"anyOf": found} for key, found in every.items()}
        self.definitions[name] = {
            "title": cls.__name__.lower(),
            "description": _words(inspect.getdoc(cls) or ""),
            "anyOf": [*kinds, {"type": "object", "title": f"settings of one {cls.__name__.lower()}"}],
            "if": {"type": "object"},
            "then": {
                "properties": {"kind": {"anyOf": kinds, **({"default": cls.default_kind} if cls.default_kind else {})}},
                "if": {"required": ["kind"]},
                "then": {"allOf": cases},
                "else": {"properties": any_kind, "additionalProperties": False},
            },
        }
        return name

    def _member(self, cls: type[Any]) -> dict[str, Any]:
        """Reference for a setting that takes only one kind."""
        family = self._family(cls.family())
        return {"$ref": REFERENCE.format(model=f"{family}.{cls.kind}")}


def _below(cls: type[Any]) -> Iterator[type[Any]]:
    for below in cls.__subclasses__():
        yield below
        yield from _below(below)


def _plain(value: Any) -> Any:
    """Convert a default to the value in a config; a component with default settings becomes the name of its kind."""
    if isinstance(value, Component):
        try:
            usual = type(value)()
        except Exception:  # a setting has no default
            return value.dump()
        return value.kind if value == usual else value.dump()
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, Settings):
        return {}
    return to_jsonable_python(value)


def _documented(cls: type[Any]) -> dict[str, str]:
    """Return the attribute docstrings of the settings of a class and its bases, by setting."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Settings):
            found |= _documented_in(base.__module__).get(base.__name__, {})
    return found


@functools.cache
def _documented_in(module: str) -> dict[str, dict[str, str]]:
    """Parse the attribute docstrings of all classes in a module: class -> setting -> text."""
    found: dict[str, dict[str, str]] = {}
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[module]))):
        if not isinstance(node, ast.ClassDef):
            continue
        for line, text in pairwise(node.body):
            match line, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(said))):
                    found.setdefault(node.name, {})[name] = _words(inspect.cleandoc(said))
    return found


def _words(text: str) -> str:
    """Return a docstring up to its sections, without reStructuredText markup."""
    text = text.partition("\n\nArgs:")[0].partition("\n\nAttributes:")[0]
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))
