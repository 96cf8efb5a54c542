"""Merge a YAML file, its parents and ``key=value`` overrides into plain data, with the place where each value was set.

A file may inherit from one parent with ``extends: base.yaml``. Mappings are merged with the parent's; all other values
replace the parent's, and so do ``paper`` and mappings with a different ``kind``. A different ``model.name`` drops the
parent's ``model.args``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rome.core.errors import UserError
from rome.core.plain_data import Unreadable, comment_after, parse_yaml
from rome.runs.hints import WEIGHTS, what_is
from rome.runs.shipped import located

Places = dict[tuple[str | int, ...], str]
"""Path of a value in the config -> where it was set (file and line, or override), as the prefix of a message."""


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Places]:
    """Read a config file and its overrides without validating the values.

    The overrides are applied as in :func:`rome.runs.config.load`.

    Returns:
        The merged data, and where each value was set.

    Raises:
        UserError: a file is missing or not a YAML mapping, or an override is not ``key=value``.
    """
    places: Places = {}
    data = _read(located(path), places, ())
    for text in sorted(overrides, key=_depth):
        data = _merge(data, _override(text, places))
    return data, places


def _read(path: Path, places: Places, seen: tuple[Path, ...], place: str = "") -> dict[str, Any]:
    if not path.is_file() or path.suffix in (*WEIGHTS, ".py"):
        found = what_is(path, "config ")
        raise UserError(f"{place}a config is a YAML file; {found}" if path.exists() else f"{place}{found}")
    if path.resolve() in seen:
        raise UserError(f"{path} extends itself: {' -> '.join(p.name for p in (*seen, path))}")
    own: Places = {}

    def note(place: tuple[str | int, ...], line: int) -> None:
        own[place] = f"{path}:{line}: "

    try:
        data = parse_yaml(path.read_text(encoding="utf-8"), note)
    except Unreadable as error:
        raise UserError(f"{path}{f':{error.line}' if error.line else ''}: {error}") from error
    except ValueError as error:  # not text
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: a config must be a mapping of keys to values")
    parent = data.pop("extends", None)
    if not isinstance(parent, str | None):
        raise UserError(f"{own[('extends',)]}extends: name one parent file, not {parent!r}")
    place = "" if parent is None else own[("extends",)] + "extends: "
    inherited = {} if parent is None else _read(located(parent, path.parent), places, (*seen, path.resolve()), place)
    places.update(own)
    return _merge(inherited, data)


def _override(text: str, places: Places) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise UserError(f"override {text!r}: write key=value, such as epochs=5 or attack.steps=10")
    try:
        result = parse_yaml(value)
    except Unreadable as error:
        raise UserError(f"override {text!r}: {value!r} is not a valid value ({error})") from error
    if comment := comment_after(value):
        raise UserError(f"override {text!r}: {comment!r} would be a comment; quote the value: '\"{value}\"'")
    for depth in range(len(parts), 0, -1):
        places[tuple(parts[:depth])] = f"override {text!r}: "
        result = {parts[depth - 1]: result}
    return dict(result)


def _depth(override: str) -> int:
    """Sort key for overrides: the depth of the mapping that they change. Those that replace a whole mapping
    (``attack=apgd``, ``attack.kind=apgd``, ``model.name=...``) are applied before those that change a part of it, which
    would otherwise be lost."""
    parts = override.partition("=")[0].strip().split(".")
    return len(parts) - (parts[-1] in ("kind", "name"))


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    if "kind" in change and "kind" in base and change["kind"] != base["kind"]:
        return change
    merged = dict(base)
    if change.get("name", base.get("name")) != base.get("name"):
        merged.pop("args", None)  # they belong to the previous model
    for key, value in change.items():
        old = None if key == "paper" else merged.get(key)  # the paper's numbers are valid for one row only
        if isinstance(value, dict) and isinstance(old, str):
            old = {"kind": old}  # `attack: pgd` is short for `attack: {kind: pgd}`
        merged[key] = _merge(old, value) if isinstance(value, dict) and isinstance(old, dict) else value
    return merged
