"""Whose code runs: what a person names, never what the contents of a file name.

The weights of a run say in their metadata how their model is built, the folder of a run keeps its config, and that of
an evaluation keeps its command, so all of them could name code: ``imports``, ``file.py:function``, any function of any
package, a model of a hub. Followed by itself is only what can be nothing but data: timm's and rome's models by name,
registered kinds, numbers and words. The rest needs the user's word for this call (``--trust-code``,
``trust_code=True``), or a record that this user's own rome wrote these very bytes on this machine.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from rome.core.errors import UserError, printable, some
from rome.core.files import file_hash, user_folder

P = ParamSpec("P")
R = TypeVar("R")
PROGRAMS = (".pt", ".ts", ".pth", ".torchscript", ".pt2")
"""Endings of files of TorchScript and torch.export, where a model is named: code, and the latter may hold pickles."""
_allowed = ContextVar("rome_trust_code", default=False)
_written: set[str] = set()
"""SHA-256 of what this process wrote, whether or not the record could be written."""


def allowed() -> bool:
    """Whether the call under way trusts code in files."""
    return _allowed.get()


@contextmanager
def trusting(yes: bool) -> Iterator[None]:
    """Trust code in files inside, if ``yes`` or if it is trusted outside already."""
    before = _allowed.set(yes or allowed())
    try:
        yield
    finally:
        _allowed.reset(before)


def opens_files(function: Callable[P, R]) -> Callable[P, R]:
    """For a function with ``trust_code: bool = False`` (by keyword): what it opens is trusted if that is true."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with trusting(bool(kwargs.get("trust_code"))):
            return function(*args, **kwargs)

    return wrapped


def names_code(model: object) -> bool:
    """Whether a model's name stands for code or a hub (``file.py:function``, ``package.module:function``,
    ``robustbench:NAME``) and not for a model in timm's or rome's lists."""
    return isinstance(model, str) and ":" in model


def check(file: Path, contents: Mapping[str, Any]) -> Mapping[str, Any]:
    """The contents, if they may be followed. Nothing has been imported before.

    Args:
        contents: plain data of the file. Looked at are ``config`` and ``model`` (the arguments of
            :func:`rome.create_model`).

    Raises:
        UserError: they name code, and neither this call nor the record of own files allows it.
    """
    named = code_in(contents)
    if not named or allowed() or is_own(file):
        return contents
    raise UserError(
        f"{file} would run code: {some(named)}. Only files that your own training wrote on this "
        "machine may do so; if you know whose code that is and trust it, add --trust-code (in Python trust_code=True)"
    )


def is_own(file: Path) -> bool:
    """Whether this user's rome wrote these bytes on this machine, and :func:`record` remembers it."""
    return file_hash(file) in _records()


def record(file: Path, contents: Mapping[str, Any]) -> None:
    """Remember that this user's rome wrote the file, if it names code. Failure costs nothing but the memory."""
    if not code_in(contents):
        return
    with suppress(OSError):
        digest, kept = file_hash(file), _record_file()
        _written.add(digest)
        if kept is not None:
            kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            opened = os.open(kept, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            with open(opened, "wb", buffering=0) as file_of_lines:
                file_of_lines.write(f"{digest}\n".encode())  # at once: processes append side by side


def code_in(contents: Mapping[str, Any]) -> list[str]:
    """What would run or be fetched if these contents were followed, as ``imports: x``, ``model: x.py:f``."""
    config = _mapping(contents.get("config"))
    modules = config.get("imports") or ()
    found = [f"imports: {name}" for name in (modules if isinstance(modules, (list, tuple)) else (modules,))]
    settings = _mapping(config.get("model"))
    for recipe in (_mapping(contents.get("model")), settings, _mapping(settings.get("args"))):
        if names_code(recipe.get("name")) or Path(str(recipe.get("name"))).suffix in PROGRAMS:
            found.append(f"model: {recipe['name']}")
        found += [f"{key}: {recipe[key]}" for key in sorted(recipe.keys() & _builder_options()) if recipe[key]]
    return [" ".join(printable(each).split())[:100] for each in dict.fromkeys(found)]


def import_own(name: str) -> ModuleType:
    """A module that the user named, from where Python finds packages or from the working folder.

    That folder is looked into from now on alone: before, it may be a stranger's, and packages that are tried but not
    installed would be found there.
    """
    if not sys.flags.safe_path and "" not in sys.path:
        sys.path.append("")
    return importlib.import_module(name)


@cache
def _builder_options() -> frozenset[str]:
    """What timm takes for itself and not for an architecture: checkpoints to read, hubs to ask."""
    import timm
    from timm.models import build_model_with_cfg

    known = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    return frozenset(known - {"pretrained", "kwargs"})


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _records() -> set[str]:
    """SHA-256 of the files that this user's rome wrote. A record that others could have written is none."""
    kept = _record_file()
    try:
        if kept is None or (os.name == "posix" and ((of := kept.stat()).st_mode & 0o022 or of.st_uid != os.getuid())):
            return _written
        return _written | set(kept.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return _written


def _record_file() -> Path | None:
    """Outside all files it speaks of."""
    folder = user_folder("state")
    return None if folder is None else folder / "written"
