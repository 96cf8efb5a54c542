"""``rome list``: what configs can name."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from rome.cli.app import app
from rome.core.errors import UserError

if TYPE_CHECKING:
    from rome.core.component import Component


class Family(StrEnum):
    """What `rome list` can list."""

    methods = "methods"
    attacks = "attacks"
    models = "models"
    data = "data"
    suites = "suites"
    experiments = "experiments"


def choices(family: Family, pattern: str = "*") -> list[tuple[str, str]]:
    """Names of a family and a line on each.

    Args:
        pattern: only names like ``vit_*``; of experiments a part such as ``table4``.

    Raises:
        UserError: no model or experiment matches.
    """
    if family is Family.models:
        from fnmatch import filter as matching

        import timm

        from rome.core.component import summary
        from rome.models.backbones import BACKBONES

        own = [(name, f"own: {summary(BACKBONES[name])}") for name in matching(BACKBONES, pattern)]
        names = timm.list_models(pattern)
        if not own and not names:
            raise UserError(f"no model matches {pattern!r}; try 'vit_*' or '*resnet*'")
        return [*own, *((name, "timm") for name in names)]
    if family is Family.experiments:
        from rome.runs.experiments import listing

        rows = listing(pattern)
        if not rows:
            raise UserError(f"no experiment matches {pattern!r}; try 'table4' or 'rome-*'")
        return rows
    from rome.attacks import Attack
    from rome.data import Data
    from rome.evaluation.evaluate import Suite
    from rome.methods import Method

    families: dict[Family, type[Component]] = {
        Family.methods: Method,
        Family.attacks: Attack,
        Family.data: Data,
        Family.suites: Suite,
    }
    return [(kind, member.summary()) for kind, member in families[family].members().items()]


@app.command("list")
def list_(
    family: Annotated[Family, typer.Argument(help="What to list.")],
    pattern: Annotated[str, typer.Argument(help="Only names like 'vit_*'; of experiments a part, 'table4'.")] = "*",
) -> None:
    """List what configs can name."""
    from rich.text import Text

    from rome.core.console import print_table

    print_table(
        [(Text(name, style="bold"), text) for name, text in choices(family, pattern)], left=(0, 1), wrapped=(0, 1)
    )
