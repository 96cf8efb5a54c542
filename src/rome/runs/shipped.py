"""Location of the configs that come with rome, and resolution of paths such as ``experiments/digits/max.yaml``."""

from __future__ import annotations

from pathlib import Path

from rome.core.errors import UserError


def folder() -> Path:
    """Return the experiments folder of the checkout, or of the installed package.

    Raises:
        UserError: there is no such folder.
    """
    package = Path(__file__).parents[1]
    for place in (package.parents[1] / "experiments", package / "_experiments"):
        if place.is_dir():
            return place
    raise UserError("the experiments folder is missing; reinstall rome-robust or work in a checkout")


def located(path: str | Path, beside: Path = Path()) -> Path:
    """Resolve a path relative to ``beside``; if nothing exists there, ``experiments/...`` is a config that rome ships.

    So these paths work everywhere, also with an installed wheel. A user's own file of that name takes precedence.
    """
    own, parts = beside / path, Path(path).parts
    if own.exists() or parts[:1] != ("experiments",):
        return own
    ours = folder().joinpath(*parts[1:])
    return ours if ours.exists() else own
