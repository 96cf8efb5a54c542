"""Where the configs shipped with rome are, and which file a path such as ``experiments/digits/max.yaml`` means."""

from __future__ import annotations

from pathlib import Path

from rome.core.errors import UserError


def folder() -> Path:
    """Folder of the experiments in the checkout or the installed package.

    Raises:
        UserError: there is none.
    """
    package = Path(__file__).parents[1]
    for place in (package.parents[1] / "experiments", package / "_experiments"):
        if place.is_dir():
            return place
    raise UserError("the experiments folder is missing; reinstall rome-robust or work in a checkout")


def located(path: str | Path, beside: Path = Path()) -> Path:
    """Resolve a path relative to ``beside``; if nothing is there, fall back to the file of that name shipped with rome.

    So a path ``experiments/...`` works in any folder, also without a checkout; the user's own file of that name takes
    precedence.
    """
    own, parts = beside / path, Path(path).parts
    if own.exists() or parts[:1] != ("experiments",):
        return own
    ours = folder().joinpath(*parts[1:])
    return ours if ours.exists() else own
