"""Hints for invalid settings and paths: where settings of that name exist, and what was found at a path."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import get_origin

from rome.core.component import UNKNOWN_KEY, Component, Settings, types_in
from rome.core.errors import nearest, some
from rome.runs.shipped import located

DEEPEST = 3
"""Maximum number of parts in the dotted names of :func:`dotted`, which would otherwise recurse forever: threats hold
attacks, which hold threats."""
WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin")
"""Suffixes of files with weights."""


def explained(message: str, key: str, override: str, root: type[Settings]) -> str:
    """Add a hint about the probable intention to an error message about a setting.

    Args:
        key: last part of the setting's dotted name.
        override: the ``key=value`` argument that set it, or empty.
        root: class of the complete config.
    """
    if message.startswith(UNKNOWN_KEY):
        paths = sorted(
            {path for path in dotted(root) if path.rpartition(".")[2] == key}, key=lambda path: (path.count("."), path)
        )
        rest = message[message.index(" Valid: ") :]
        return f"{UNKNOWN_KEY} Did you mean {some(paths, between=' or ')}?{rest}" if paths else message
    value = override.partition("=")[2]
    if "," in value and not value.startswith(("[", "{")):
        return f"{message}; several values make a sweep: rome sweep CONFIG {override}"
    return message


def dotted(settings: type[Settings], prefix: str = "") -> Iterator[str]:
    """Yield the names of all settings that an override can change, such as ``optimizer.lr``, for every kind."""
    for name, field in settings.model_fields.items():
        path = f"{prefix}{name}"
        yield path
        named = path.count(".") < DEEPEST - 1 and get_origin(field.annotation) is not tuple  # items of a list have none
        inner = [part for part in types_in(field.annotation) if isinstance(part, type) and issubclass(part, Settings)]
        for part in inner if named else ():
            for member in [part, *(part.members().values() if issubclass(part, Component) else ())]:
                yield from dotted(member, f"{path}.")


def what_is(path: Path, wanted: str = "") -> str:
    """Describe what is at a path and which command takes it, or suggest the nearest name if the path does not exist.

    Args:
        wanted: description of what was expected, with a trailing space, such as ``"config "``.
    """
    if path.is_dir():
        configs = sorted(each.name for each in path.glob("*.yaml") if not each.name.startswith("_"))
        if (path / "config.yaml").is_file():
            return f"{path} is the folder of a run: rome train --resume {path}, or rome evaluate {path}"
        if (path / "settings.json").is_file():
            return f"{path} is the folder of an evaluation: rome report {path}"
        return f"{path} is a folder with {f'the configs {some(configs)}' if configs else 'neither run nor config'}"
    if path.is_file():
        if path.suffix in (".yaml", ".yml"):
            return f"{path} is a config: rome train {path}"
        if path.suffix in WEIGHTS:
            return f"{path} is a file of weights: rome evaluate {path}, or model.weights={path} in a config"
        if path.suffix == ".py":
            return f"{path} is a Python file: name its function, {path}:{(functions_in(path) or ['FUNCTION'])[0]}"
        return f"{path} is a file that is neither config nor weights"
    folder = located(path.parent)
    beside = folder.iterdir() if folder.is_dir() else ()
    near = nearest(path, [str(path.parent / each.name) for each in beside if each.suffix == path.suffix])
    return f"there is no {wanted}{path}.{f' Did you mean {near!r}?' if near else ''}"


def functions_in(file: Path) -> list[str]:
    """List the public functions and classes in a Python file without running it."""
    with suppress(OSError, SyntaxError, ValueError):
        body = ast.parse(file.read_bytes()).body
        return [each.name for each in body if isinstance(each, ast.FunctionDef | ast.ClassDef) and each.name[0] != "_"]
    return []
