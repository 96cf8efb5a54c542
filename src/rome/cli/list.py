"""``rome list``: what configs can name."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from rome.cli.app import app
from rome.core.errors import UserError

Family = Literal["methods", "attacks", "models", "data", "suites", "loggers", "launchers", "experiments"]


def choices(family: Family, pattern: str = "*") -> list[tuple[str, str]]:
    """Names of a family and a line on each.

    Args:
        pattern: only names like ``vit_*``; of experiments a part such as ``table4``.

    Raises:
        UserError: no model or experiment matches.
    """
    if family == "models":
        from fnmatch import filter as matching

        import timm

        from rome.core.component import summary
        from rome.models.backbones import BACKBONES

        own = [(name, f"own: {summary(BACKBONES[name])}") for name in matching(BACKBONES, pattern)]
        found = [*own, *((name, "timm") for name in timm.list_models(pattern))]
        hint = "'vit_*' or '*resnet*'"
    elif family == "experiments":
        from rome.runs.experiments import listing

        found, hint = listing(pattern), "'table4' or 'rome-*'"
    else:
        from rome.attacks import Attack
        from rome.attacks.suites import Suite
        from rome.data import Data
        from rome.methods import Method
        from rome.runs.launchers import Launcher
        from rome.runs.loggers import Logger

        families = {"methods": Method, "attacks": Attack, "data": Data, "suites": Suite, "loggers": Logger}
        families["launchers"] = Launcher
        members = families[family].members()
        return [(kind, member.summary()) for kind, member in members.items()]
    if not found:
        raise UserError(f"no {family[:-1]} matches {pattern!r}; try {hint}")
    return found


@app.command("list")
def list_(
    family: Annotated[Family, typer.Argument(help="What to list.")],
    pattern: Annotated[str, typer.Argument(help="Only names like 'vit_*'; of experiments a part, 'table4'.")] = "*",
    cost: Annotated[
        bool, typer.Option("--cost", help="Of experiments: what they cost; some seconds for each.")
    ] = False,
) -> None:
    """List what configs can name."""
    from rich.text import Text

    from rome.core.console import print_table

    if cost:
        if family != "experiments":
            raise UserError(f"--cost is for experiments, not {family}")
        choices(family, pattern)
        from rome.report.passes import RATES_ARE_FOR, priced

        titles = ("experiment", "parameters", "an update", "of an H200", "evaluation, at most")
        print_table(list(priced(pattern)), titles, left=range(1), wrapped=(), gap=2)
        print(RATES_ARE_FOR)
        return

    print_table(
        [(Text(name, style="bold"), text) for name, text in choices(family, pattern)], left=(0, 1), wrapped=(1,)
    )
