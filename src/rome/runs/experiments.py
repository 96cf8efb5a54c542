"""The configs that come with rome: the rows of the paper's tables, and small versions of them."""

from __future__ import annotations

import fnmatch
import functools
from pathlib import Path
from typing import Any

from rome.core.errors import UserError
from rome.core.plain_data import parse_yaml


def folder() -> Path:
    """Where they lie: in the checkout, or in the installed package.

    Raises:
        UserError: nowhere.
    """
    package = Path(__file__).parents[1]
    for place in (package.parents[1] / "experiments", package / "_experiments"):
        if place.is_dir():
            return place
    raise UserError("the experiments folder is missing; reinstall rome-robust or work in a checkout")


def files(pattern: str = "*") -> list[Path]:
    """Every experiment, or those whose path has a part like the pattern (``table4``, ``rome-*``); files whose name
    starts with an underscore are shared bases."""
    found = sorted(path for path in folder().rglob("*.yaml") if not path.name.startswith("_"))
    return [path for path in found if fnmatch.fnmatch(path_of(path), f"*{pattern}*")]


def path_of(path: Path) -> str:
    """``experiments/table1/max-pgd.yaml``."""
    return str(path.relative_to(folder().parent))


def listing(pattern: str = "*") -> list[tuple[str, str]]:
    """Path and description of the experiments, with the paper's numbers where it has some; ``pattern`` as above.

    Read as plain data: to validate them would take the import of torch.
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
    """A file and what it extends, joined at the top level only: enough for what is not nested."""
    data: dict[str, Any] = parse_yaml(path.read_text(encoding="utf-8"))
    parent = data.get("extends")
    return {**_plain((path.parent / parent).resolve()), **data} if parent else data
