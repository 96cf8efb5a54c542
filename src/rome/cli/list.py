"""``rome list``: the names that configs accept."""

from __future__ import annotations

from fnmatch import fnmatch
from typing import Annotated, Literal

import typer

from rome.cli.app import app
from rome.core.errors import UserError

Family = Literal["methods", "attacks", "models", "data", "suites", "loggers", "launchers", "experiments"]


def choices(family: Family, pattern: str = "*") -> list[tuple[str, str]]:
    """Names in a family, each with a one-line description.

    Args:
        pattern: only names that match, such as ``vit_*``; for experiments a part of the name, such as ``table4``.

    Raises:
        UserError: nothing in the family matches.
    """
    if family == "models":
        import timm

        from rome.core.component import summary
        from rome.models.backbones import BACKBONES

        own = [(name, f"own: {summary(BACKBONES[name])}") for name in BACKBONES if fnmatch(name, pattern)]
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
        found = [(kind, member.summary()) for kind, member in members.items() if fnmatch(kind, pattern)]
        hint = ", ".join(members)
    if not found:
        raise UserError(f"nothing in {family} matches {pattern!r}; try {hint}")
    return found


@app.command("list")
def list_(
    family: Annotated[Family, typer.Argument(help="What to list.")],
    pattern: Annotated[
        str, typer.Argument(help="Only names like 'vit_*'; for experiments a part like 'table4'.")
    ] = "*",
    cost: Annotated[bool, typer.Option("--cost", help="Estimate what experiments cost; some seconds each.")] = False,
) -> None:
    """List the methods, attacks, models, data, ... that configs can name."""
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
