"""User code: which functions, classes and modules it is, how messages refer to them, and which names they use."""

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
"""Objects that their name identifies."""
_LIBRARY = tuple(
    os.path.realpath(place) + os.sep
    for place in {
        *map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib")),
        str(Path(__file__).parents[1]),
    }
)


class Import(NamedTuple):
    """``from ..module import a, b``: the module, the number of dots before it, and the imported names."""

    module: str
    level: int
    wanted: tuple[str, ...]


class Names(NamedTuple):
    """The names that a piece of code mentions."""

    read: frozenset[str]
    """Globals that it reads and never assigns; those that it assigns are state, not settings."""
    others: frozenset[str]
    """Attributes, and strings that may name one."""
    imports: tuple[Import, ...]
    """The ``import`` statements inside it."""


@functools.cache
def in_library(file: str) -> bool:
    """Whether a file belongs to Python, to an installed package or to rome."""
    real = Path(os.path.realpath(file))
    if str(real).startswith(_LIBRARY) or {"site-packages", "dist-packages"} & set(real.parts):
        return True
    return any(_holds_packages(folder) for folder in real.parents if str(folder) in sys.path)


@functools.cache
def _holds_packages(folder: Path) -> bool:
    """Whether packages are installed in the folder, as by ``pip install --target``."""
    return any(folder.glob("*.dist-info"))


def is_users(thing: Any) -> bool:
    """Whether a function, class or module is the user's: not from Python, an installed package or rome."""
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
    """Where a user's function, class or module is defined, for messages: its file, relative to the folder that it is
    imported from, or the module's name if there is no such file, as in a notebook."""
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
    """The full name of an object, for messages: ``file.py:name`` for user code, otherwise ``module.name``."""
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    return f"{file_of(thing)}:{name}" if is_users(thing) else f"{_module_name(thing)}.{name}"


@functools.cache
def names_in(code: types.CodeType) -> Names:
    """The names that a code object mentions, including those in functions and classes defined inside it."""
    read, stored, imports = set[str](), set[str](), list[Import]()
    others = {*code.co_names, *(each for each in code.co_consts if isinstance(each, str))}
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
    """Whether a name is special to Python: ``__this__``, or ``_this_`` in an enumeration."""
    return name.startswith("_") and name.endswith("_")
