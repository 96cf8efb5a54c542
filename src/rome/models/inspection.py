"""Identification of values and of the user's code that they run, by texts and hashes that other processes reproduce.

Code is followed from object to object: from a class to its methods, from a function to its defaults, its closure, the
globals and modules that it names, and on from there. The hash is that of the compiled code in memory, not of the file,
which may have been edited since it was imported. Python's library, installed packages and rome itself are identified by
their versions and not followed; nor is anything that a function reads while it runs, such as files or the environment.
"""

from __future__ import annotations

import copyreg
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import threading
import types
import warnings
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor, nn

from rome.core.user_code import Import, Known, file_of, in_library, is_special, is_users, name_of, names_in
from rome.models.module_tree import attributes, tensor_bytes, tensors, walk

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), torch.dtype)
_DESCRIPTORS = (types.FunctionType, property, staticmethod, classmethod, functools.cached_property)
_SLOTS = (types.MemberDescriptorType, types.GetSetDescriptorType, types.WrapperDescriptorType)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_VERSIONED = {"rome", "torch", "numpy", "timm", "pydantic"}
"""Packages that are not recorded here: every evaluation records their versions anyway, or they compute nothing."""


class Inspection:
    """Hashes values and follows the code that they run; afterwards :attr:`code` lists the code that was found."""

    def __init__(self) -> None:
        self.unknown: dict[str, None] = {}
        """Places and types of objects that cannot be told apart from others of their type (an ordered set)."""
        self._files: defaultdict[str, set[str]] = defaultdict(set)
        self._values: defaultdict[str, set[str]] = defaultdict(set)
        self._packages: dict[str, str] = {}
        self._where = ""
        self._alive: list[object] = []  # ids are unique only among objects that are alive
        self._hashes: dict[int, str] = {}
        self._active: list[int] = []
        self._paths: dict[int, str] = {}
        self._followed: set[tuple[int, object]] = set()

    @property
    def code(self) -> dict[str, str]:
        """The code found so far: ``file.py`` with the hash of its code, ``file.py:NAME`` with the value of a global or
        class attribute, ``package`` with its version, and ``python`` with its version if any code is the user's, since
        versions of Python compile differently."""
        files = {name: _shown(_hash(*sorted(parts))) for name, parts in self._files.items()}
        values = {name: " or ".join(sorted(texts)) for name, texts in self._values.items()}
        python = {"python": ".".join(map(str, sys.version_info[:2]))} if files else {}
        return dict(sorted({**files, **values, **self._packages, **python}.items()))

    def text(self, value: object) -> str:
        """Return the value itself if it is short and plain, its name if it is a library's, otherwise its hash."""
        if _is_plain(value) and len(shown := repr(value)) <= 60:
            return shown
        digest = self.of(value)
        from_library = isinstance(value, Known) and not is_users(value)
        return name_of(value) if from_library and not getattr(value, "__closure__", None) else _shown(digest)

    def of(self, value: object) -> str:
        """SHA-256 of a value, including everything it refers to and the code of the user's functions and classes."""
        key = id(value)
        if key in self._paths:
            return _hash("module", self._paths[key])
        if key in self._active:
            return _hash("within", len(self._active) - self._active.index(key))
        if key not in self._hashes:
            self._alive.append(value)
            self._active.append(key)
            try:
                self._hashes[key] = _hash(type(value).__qualname__, *self._parts(value))
            except RecursionError:
                self._hashes[key] = self._unidentified(value)
            finally:
                self._active.pop()
        return self._hashes[key]

    def _parts(self, value: Any) -> Iterable[str]:
        """Texts and hashes that together identify a value among those of its type."""
        kind = type(value)
        if kind in _PLAIN:
            return (repr(value),)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.device):  # each process of an evaluation has its own
            return (value.type,)
        if isinstance(value, np.ndarray) and not value.dtype.hasobject:
            return value.dtype.str, str(value.shape), hashlib.sha256(value.tobytes()).hexdigest()
        if kind in (dict, types.MappingProxyType):
            return sorted(self.of(key) + self.of(each) for key, each in value.items())
        if kind in (list, tuple):
            return [self.of(each) for each in value]
        if kind in (set, frozenset):
            return sorted(map(self.of, value))
        if isinstance(value, type):
            return self._class(value)
        if kind is types.FunctionType:
            return self._function(value)
        if kind is types.MethodType:
            return self.of(value.__func__), self.of(value.__self__)
        if kind in (types.BuiltinFunctionType, types.MethodWrapperType):
            owner = value.__self__
            plain = owner is None or isinstance(owner, (types.ModuleType, type))
            return name_of(value), "" if plain else self.of(owner)
        if isinstance(value, types.ModuleType):
            self._module(value, frozenset(vars(value)) if is_users(value) else frozenset())
            return (value.__name__,)
        if kind is types.CodeType:
            return self._compiled(value)
        if kind is types.CellType:
            return (self.of(value.cell_contents) if value != types.CellType() else "",)
        if isinstance(value, property):
            return self.of(value.fget), self.of(value.fset)
        if isinstance(value, functools.cached_property):
            return (self.of(value.func),)
        if isinstance(value, nn.Module):
            return str(self.model(value)), self.of(tensors(value))
        if isinstance(value, BaseModel):
            own = value.__pydantic_private__ if is_users(kind) else None
            return self.of(kind), self.of({name: getattr(value, name) for name in kind.model_fields}), self.of(own)
        if isinstance(value, weakref.ref):
            return (self.of(value()),)
        if isinstance(value, (torch.jit.ScriptFunction, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return (str(getattr(value, "code", value)),)
        if kind in _LOCKS:
            return ()
        if callable(getattr(value, "__wrapped__", None)):
            return (self.of(value.__wrapped__),)
        return self._pickled_parts(value)

    def _pickled_parts(self, value: Any) -> Iterable[str]:
        """Parts of any other object, as pickle would take it apart."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reduce = copyreg.dispatch_table.get(type(value))
                taken = reduce(value) if reduce else value.__reduce_ex__(4)
                if isinstance(taken, str):
                    return type(value).__module__, taken
                made, arguments, state, items, pairs = (*taken, None, None, None)[:5]
                held = list(items or ()), dict(pairs or ())
        except RecursionError:
            raise
        except Exception:  # other people's code can raise anything
            return (self._unidentified(value),)
        return [self.of(part) for part in (made, arguments, state, *held)]

    def _unidentified(self, value: object) -> str:
        self.unknown[f"{self._where or 'an object'} ({type(value).__module__}.{type(value).__qualname__})"] = None
        return ""

    def _tensor(self, value: Tensor) -> Iterable[str]:
        try:
            content = "" if value.is_meta else hashlib.sha256(tensor_bytes(value)).hexdigest()
        except (RuntimeError, TypeError, NotImplementedError):
            content = self._unidentified(value)
        return str(value.dtype), str(tuple(value.shape)), content

    # -------- code

    def _class(self, cls: type) -> list[str]:
        parts = [name_of(cls)]
        for each in cls.__mro__:
            if is_users(each):
                parts += [name_of(each), *self._members(each)]
            else:
                self._package(each.__module__)
                parts += self._patched(each)
        return parts

    def _members(self, cls: type) -> Iterator[str]:
        for name, value in sorted(vars(cls).items()):
            code = isinstance(value, _DESCRIPTORS)
            if isinstance(value, _SLOTS) or name == "_abc_impl" or (is_special(name) and not code):
                continue
            if not code:
                self._values[f"{name_of(cls)}.{name}"].add(self.text(value))
            yield f"{name} {self.of(value)}"

    def _patched(self, cls: type) -> list[str]:
        """Hashes of the user's functions that replace methods of a library's class."""
        own = {name: each for name, each in vars(cls).items() if isinstance(each, types.FunctionType)}
        foreign = "" if cls.__module__ == "builtins" else cls.__module__
        return [f"{name} {self.of(each)}" for name, each in own.items() if foreign and is_users(each)]

    def _function(self, function: types.FunctionType) -> list[str]:
        parts = [name_of(function)]
        if is_users(function):
            parts.append(self.of(function.__code__))
            self._follow(function)
            parts.append(self.of(vars(function)))
        else:
            self._package(function.__module__)
        parts += [self.of(function.__defaults__), self.of(function.__kwdefaults__)]
        return parts + [self.of(cell) for cell in function.__closure__ or ()]

    def _compiled(self, code: types.CodeType) -> list[str]:
        parts: list[object] = [code.co_code.hex(), code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars]
        parts += [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
        parts.append(getattr(code, "co_exceptiontable", b"").hex())
        return [*map(str, parts), *map(self.of, code.co_consts)]

    def _follow(self, function: types.FunctionType) -> None:
        """Follow the globals and modules that a function names."""
        code, space = function.__code__, function.__globals__
        if not self._first_visit(code, id(space)):
            return
        place, names = file_of(function), names_in(code)
        self._files[place].add(f"{function.__qualname__} {self.of(code)}")
        for name in sorted(names.read & space.keys()):
            self._global(place, name, space[name], names.others)
        for statement in names.imports:
            self._imported(place, statement, space, names.others)

    def _global(self, place: str, name: str, value: Any, others: frozenset[str]) -> None:
        before, self._where = self._where, f"{place}:{name}"
        if isinstance(value, types.ModuleType):
            self._files[place].add(f"{name} is {file_of(value) if is_users(value) else value.__name__}")
            self._module(value, others)
        elif isinstance(value, Known) and "<locals>" not in value.__qualname__:
            self._files[place].add(f"{name} is {name_of(value)}")
            self.of(value)
        else:
            self._values[f"{place}:{name}"].add(self.text(value))
        self._where = before

    def _module(self, module: types.ModuleType, names: frozenset[str]) -> None:
        """Follow the names of a module that code may use."""
        if not is_users(module):
            self._package(module.__name__)
            return
        file = getattr(module, "__file__", None) or ""
        if file.endswith((".so", ".pyd")):
            self._files[file_of(module)].add(hashlib.sha256(Path(file).read_bytes()).hexdigest())
        for name in sorted(names & vars(module).keys()):
            if not is_special(name) and self._first_visit(module, name):
                self._global(file_of(module), name, vars(module)[name], names)

    def _imported(self, place: str, statement: Import, space: Mapping[str, Any], others: frozenset[str]) -> None:
        """Follow what a function imports while it runs. The user's modules are imported now, to be inspected."""
        name, level, wanted = statement
        try:
            full = importlib.util.resolve_name("." * level + name, space.get("__package__") or "")
            top = full.partition(".")[0]
            if top not in sys.modules:
                spec = importlib.util.find_spec(top)
                where = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
                if where and (where in ("built-in", "frozen") or in_library(where)):
                    self._package(top)
                    return
            module = importlib.import_module(full) if top not in sys.modules or is_users(sys.modules[top]) else None
            for each in wanted if module is not None else ():
                if not hasattr(module, each):
                    importlib.import_module(f"{full}.{each}")
        except Exception as error:  # its code can raise anything
            self._files[place].add(f"{name} cannot be imported: {type(error).__name__}")
            return
        self._module(module or sys.modules[top], others | set(wanted))

    def _package(self, module: str) -> None:
        top = module.partition(".")[0]
        if top in self._packages or top in _VERSIONED or top in sys.stdlib_module_names:
            return
        version = getattr(sys.modules.get(top), "__version__", None)
        with suppress(importlib.metadata.PackageNotFoundError, ValueError):
            self._packages[top] = str(version or importlib.metadata.version(top))

    def _first_visit(self, owner: object, key: object) -> bool:
        """Whether this is the first call for an owner and a key."""
        self._alive.append(owner)
        seen = (id(owner), key) in self._followed
        self._followed.add((id(owner), key))
        return not seen

    # -------- modules of torch

    def model(self, model: nn.Module) -> dict[str, Any]:
        """Describe what a module's output depends on besides its tensors.

        Returns:
            ``layers``: number of modules of each class. ``structure``: hash of their names and classes, in order.
            ``attributes``: by ``Class.name``, the attribute's value if it is the same in all modules of the class,
            otherwise a hash of its values.
        """
        tree = list(walk(model))
        first = {id(module): path for path, module in reversed(tree)}
        fresh = [(path, module) for path, module in tree if first[id(module)] == path and id(module) not in self._paths]
        self._paths |= {id(module): path for path, module in fresh}
        self._alive.append(model)
        held: defaultdict[str, dict[str, object]] = defaultdict(dict)
        for path, module in fresh:
            for name, value in attributes(module):
                held[f"{type(module).__qualname__}.{name}"][path] = value
        if hooks := list(torch.nn.modules.module._global_forward_hooks.values()):
            held["torch.nn.Module.hooks"][""] = hooks
        texts_of = {}
        for name, values in held.items():
            before, self._where = self._where, name
            texts = {path: self.text(value) for path, value in values.items()}
            self._where = before
            distinct = set(texts.values())
            texts_of[name] = distinct.pop() if len(distinct) == 1 else _shown(_hash(*map(str, texts.items())))
        for _, module in fresh:
            self.of(type(module))
        return {
            "layers": dict(sorted(Counter(type(module).__qualname__ for _, module in fresh).items())),
            "structure": _shown(_hash(*(f"{path} {first[id(each)]} {name_of(type(each))}" for path, each in tree))),
            "attributes": dict(sorted(texts_of.items())),
        }


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return len(value) <= 20 and all(map(_is_plain, value))
    if type(value) is dict:
        return len(value) <= 20 and all(map(_is_plain, (*value, *value.values())))
    return type(value) in _PLAIN


def _hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode(errors="surrogatepass")).hexdigest()


def _shown(digest: str) -> str:
    return f"sha256:{digest[:16]}"
