"""Code of the user's: which it is, what its places are called, and what it names."""

from __future__ import annotations

import dis
import functools
import os
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any, NamedTuple

Known = type | types.FunctionType | types.BuiltinFunctionType
"""What has a name that identifies it."""
_LIBRARY = tuple(
    os.path.realpath(place) + os.sep
    for place in {
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(__file__).parents[1]),
    }
)


class Import(NamedTuple):
    """``from ..module import a, b``: its name, how far up, and what of it."""

    module: str
    level: int
    wanted: tuple[str, ...]


class Names(NamedTuple):
    """What a piece of code mentions."""

    read: frozenset[str]
    """Globals it reads and never assigns: what it assigns is its state, not its setting."""
    others: frozenset[str]
    """Attributes, and texts that may name one."""
    imports: tuple[Import, ...]
    """Each ``import`` inside it."""


@functools.cache
def in_library(file: str) -> bool:
    real = Path(os.path.realpath(file))
    if str(real).startswith(_LIBRARY) or {"site-packages", "dist-packages"} & set(real.parts):
        return True
    return any(_holds_packages(folder) for folder in real.parents if str(folder) in sys.path)


@functools.cache
def _holds_packages(folder: Path) -> bool:
    """Whether packages are installed in the folder, as ``pip install --target`` does."""
    return any(folder.glob("*.dist-info"))


def is_users(thing: Any) -> bool:
    """Whether a function, class or module is neither Python's nor an installed package's nor rome's."""
    if isinstance(thing, types.FunctionType) and not thing.__code__.co_filename.startswith("<"):
        return not in_library(thing.__code__.co_filename)
    name = _module_name(thing)
    top = name.partition(".")[0]
    for module in (sys.modules.get(name), sys.modules.get(top)):
        if file := getattr(module, "__file__", None):
            return not in_library(file)
    return top not in sys.stdlib_module_names


def _module_name(thing: Any) -> str:
    if isinstance(thing, types.ModuleType):
        return thing.__name__
    if isinstance(thing, types.FunctionType):
        return str(thing.__globals__.get("__name__", ""))
    return str(getattr(thing, "__module__", None) or "")


def file_of(thing: Any) -> str:
    """What a message calls the place of a function, class or module of the user's: its file, as seen from the folder
    that it is imported from; the module's name where there is no such file, as in a notebook."""
    name = _module_name(thing)
    file = getattr(sys.modules.get(name), "__file__", None)
    if isinstance(thing, types.FunctionType) and not thing.__code__.co_filename.startswith("<"):
        file = thing.__code__.co_filename
    if not file or not os.path.isfile(file):
        return name or "code without a file"
    path, parts = Path(file), name.split(".")
    if path.name == "__init__.py":
        return "/".join([*parts, path.name])
    return "/".join([*parts[:-1], path.name]) if parts[-1] == path.stem else path.name


def name_of(thing: Any) -> str:
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return f"{file_of(thing)}:{name}" if is_users(thing) else f"{_module_name(thing)}.{name}"


@functools.cache
def names_in(code: types.CodeType) -> Names:
    read, stored, others = (
        set[str](),
        set[str](),
        {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))},
    )
    imports: list[Import] = []
    steps = list(dis.get_instructions(code))
    for i, step in enumerate(steps):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            read.add(step.argval)
        elif step.opname == "STORE_GLOBAL":
            stored.add(step.argval)
        elif step.opname == "IMPORT_NAME":
            imports.append(Import(step.argval, int(steps[i - 2].argval), tuple(steps[i - 1].argval or ())))
    for inner in (part for part in code.co_consts if isinstance(part, types.CodeType)):
        found = names_in(inner)
        read |= found.read
        others |= found.others
        imports += found.imports
    return Names(frozenset(read - stored), frozenset(others), tuple(imports))


def is_special(name: str) -> bool:
    """``__this__``, or ``_this_`` of an enumeration: Python's own."""
    return name.startswith("_") and name.endswith("_")
