"""The configs that come with rome: the rows of the paper's tables, and small versions of them."""

from __future__ import annotations

from pathlib import Path

from rome.config import load
from rome.errors import UserError


def folder() -> Path:
    """Where they lie: in the checkout, or in the installed package.

    Raises:
        UserError: nowhere.
    """
    package = Path(__file__).parent
    for place in (package.parents[1] / "experiments", package / "_experiments"):
        if place.is_dir():
            return place
    raise UserError("the experiments folder is missing; reinstall rome-robust or work in a checkout")


def files() -> list[Path]:
    """Every experiment; files whose name starts with an underscore are shared bases."""
    return sorted(path for path in folder().rglob("*.yaml") if not path.name.startswith("_"))


def listing() -> list[tuple[str, str]]:
    """Path and description of every experiment, with the paper's numbers where it has some."""
    rows = []
    for path in files():
        config = load(path)
        text = config.about or f"{config.method.kind}{' with experts' if config.experts else ''} on {config.data.kind}"
        if config.paper is not None:
            numbers = ", ".join(f"{name} {value:g}" for name, value in config.paper.numbers.items())
            text += f" [paper {config.paper.table}, {config.paper.row}: {numbers}]"
        rows.append((str(path.relative_to(folder().parent)), text))
    return rows
