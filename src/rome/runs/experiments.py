"""The configs that come with rome: the rows of the paper's tables, and small versions of them."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Iterable
from os.path import normpath
from pathlib import Path
from typing import Any

from rome.core.errors import UserError, some
from rome.core.files import replace_file
from rome.core.plain_data import parse_yaml
from rome.runs.shipped import folder

SCHEMA = "schema.json"
"""The JSON schema in the experiments folder, with which editors check the configs (:mod:`rome.runs.schema`)."""


def files(pattern: str = "*") -> list[Path]:
    """List all experiments, or those with the pattern (``table4``, ``rome-*``) anywhere in their path.

    Files whose name starts with an underscore are shared bases and left out.
    """
    found = sorted(path for path in folder().rglob("*.yaml") if not path.name.startswith("_"))
    return [path for path in found if fnmatch.fnmatch(path_of(path), f"*{pattern}*")]


def path_of(path: Path) -> str:
    """Return the path by which users name an experiment, such as ``experiments/table1/max-pgd.yaml``."""
    return str("experiments" / path.relative_to(folder()))


def listing(pattern: str = "*") -> list[tuple[str, str]]:
    """Path and description of each experiment that matches (:func:`files`), with the paper's numbers if there are any.

    The configs are read as plain data, because validating them would import torch.
    """
    rows = []
    for path in files(pattern):
        facts = _plain(path)
        text = facts["about"]
        if paper := facts.get("paper"):
            numbers = ", ".join(f"{name} {value:g}" for name, value in paper.get("numbers", {}).items())
            text += f" [paper {paper['table']}, {paper['row']}: {numbers}]"
        rows.append((path_of(path), text))
    return rows


@functools.cache
def _plain(path: Path) -> dict[str, Any]:
    """Read a file and its parents, merged at the top level only, which is enough for keys that are not nested."""
    data: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"))
    parent = data.get("extends")
    return {**_plain((path.parent / parent).resolve()), **data} if parent else data


def copy_to(out: Path, patterns: Iterable[str] = ("*",), overwrite: bool = False) -> list[Path]:
    """Copy the experiments that match any of the patterns, with the bases they extend and the schema they refer to.

    Returns:
        Paths of the copies.

    Raises:
        UserError: a pattern matches no experiment, or a copy would replace a different file.
    """
    chosen = {folder() / SCHEMA}
    for pattern in patterns:
        found = files(pattern)
        if not found:
            raise UserError(f"no experiment matches {pattern!r}; try 'table4' or 'rome-*' (rome list experiments)")
        for file in found:
            while file not in chosen:  # follow `extends` up to a base that is already chosen
                chosen.add(file)
                parent = parse_yaml(file.read_text(encoding="utf-8")).get("extends")
                file = file if parent is None else Path(normpath(file.parent / parent))
    copies = {out / file.relative_to(folder()): file.read_bytes() for file in sorted(chosen)}
    other = [str(copy) for copy, text in copies.items() if copy.exists() and copy.read_bytes() != text]
    if other and not overwrite:
        raise UserError(f"{some(other)} would be replaced; choose another folder or pass --overwrite")
    for copy, text in copies.items():
        replace_file(copy, text)
    return list(copies)
