"""Where the configs that come with rome lie, and which file a path such as ``experiments/digits/max.yaml`` means."""

from __future__ import annotations

from pathlib import Path

from rome.core.errors import UserError


def folder() -> Path:
    """The experiments of the checkout, or of the installed package.

    Raises:
        UserError: there are none.
    """
    package = Path(__file__).parents[1]
    for place in (package.parents[1] / "experiments", package / "_experiments"):
        if place.is_dir():
            return place
    raise UserError("the experiments folder is missing; reinstall rome-robust or work in a checkout")


def located(path: str | Path, beside: Path = Path()) -> Path:
    """The path below ``beside`` as it is, or where nothing lies there, what comes with rome under the same name.

    A path ``experiments/...`` means the same everywhere, so that a wheel needs no checkout; a file of the user's own
    under that name counts first.
    """
    own, parts = beside / path, Path(path).parts
    if own.exists() or parts[:1] != ("experiments",):
        return own
    ours = folder().joinpath(*parts[1:])
    return ours if ours.exists() else own
