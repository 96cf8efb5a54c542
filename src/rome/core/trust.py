"""Which code may run: code that the user names, but not code that is named inside a file.

The weights of a run say in their metadata how to build the model, the folder of a run contains its config, and that of
an evaluation its command. So all of them could name code: ``imports``, ``file.py:function``, any function of any
package, a model from a hub. Without permission, only contents that can be nothing but data are used: timm's and rome's
models by name, registered kinds, numbers and words. Everything else needs the user's permission for this call
(``--trust-code``, ``trust_code=True``) or a record that this user's own rome wrote exactly these bytes on this machine.
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
"""File extensions of TorchScript and torch.export models. Such files are code, and the latter may contain pickles."""
_allowed = ContextVar("rome_trust_code", default=False)
_written: set[str] = set()
"""SHA-256 of the files that this process wrote, even if the record could not be saved."""


def allowed() -> bool:
    """Whether the current call trusts code that is named inside files."""
    return _allowed.get()


@contextmanager
def trusting(yes: bool) -> Iterator[None]:
    """Trust code that is named inside files if ``yes``, or if an enclosing call trusts it already."""
    before = _allowed.set(yes or allowed())
    try:
        yield
    finally:
        _allowed.reset(before)


def opens_files(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator for functions with a keyword argument ``trust_code: bool = False``: if it is true, code that is named
    inside the files that the function opens is trusted."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with trusting(bool(kwargs.get("trust_code"))):
            return function(*args, **kwargs)

    return wrapped


def names_code(model: object) -> bool:
    """Whether a model's name refers to code or a hub (``file.py:function``, ``package.module:function``,
    ``robustbench:NAME``) and not to a model listed by timm or rome."""
    return isinstance(model, str) and ":" in model


def check(file: Path, contents: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the contents if the code they name may run. Nothing is imported to find out.

    Args:
        contents: plain data of the file. Only ``config`` and ``model`` (the arguments of :func:`rome.create_model`) are
            checked.

    Raises:
        UserError: they name code, which neither this call nor the record of the user's own files allows.
    """
    named = code_in(contents)
    if not named or allowed() or is_own(file):
        return contents
    raise UserError(
        f"{file} would run code: {some(named)}. Only files that your own training wrote on this "
        "machine may do so; if you know whose code that is and trust it, add --trust-code (in Python trust_code=True)"
    )


def is_own(file: Path) -> bool:
    """Whether :func:`record` knows that this user's rome wrote these bytes on this machine."""
    return file_hash(file) in _records()


def record(file: Path, contents: Mapping[str, Any]) -> None:
    """Record that this user's rome wrote the file, if it names code. If the record cannot be saved, only this process
    remembers it."""
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
    """The code that using these contents would run or download, as ``imports: x``, ``model: x.py:f``."""
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
    """Import a module that the user named, from Python's path or from the working folder.

    The working folder is added to the path only now: it may contain files of strangers, which earlier imports of
    optional packages that are not installed would have found.

    Raises:
        UserError: the module cannot be imported; it can raise anything.
    """
    if not sys.flags.safe_path and "" not in sys.path:
        sys.path.append("")
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise UserError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error


@cache
def _builder_options() -> frozenset[str]:
    """The options that timm's builder itself uses, such as checkpoints to read and hubs to download from, rather than
    the architecture."""
    import timm
    from timm.models import build_model_with_cfg

    known = {*inspect.signature(timm.create_model).parameters, *inspect.signature(build_model_with_cfg).parameters}
    return frozenset(known - {"pretrained", "kwargs"})


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _records() -> set[str]:
    """SHA-256 of the files that this user's rome wrote. A record that other users could have written is ignored."""
    kept = _record_file()
    try:
        if kept is None or (os.name == "posix" and ((of := kept.stat()).st_mode & 0o022 or of.st_uid != os.getuid())):
            return _written
        return _written | set(kept.read_text(encoding="ascii").split())
    except (OSError, ValueError):
        return _written


def _record_file() -> Path | None:
    """The file with the record, outside all folders whose files it lists; None if the user has no folder for it."""
    folder = user_folder("state")
    return None if folder is None else folder / "written"
