"""The command-line application. Each command has its own file in this package and registers itself here."""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
import sys
from typing import Annotated, Any

import typer

import rome.cli
from rome.cli._usage import UsageError, explain
from rome.core.console import exiting
from rome.core.errors import UserError
from rome.core.version import __version__

app = typer.Typer(
    help="Train, evaluate and compare image classifiers that are robust to several perturbations at once.",
    epilog="Start with [bold]rome demo[/bold], which needs no data, or with [bold]rome train "
    "experiments/digits/rome-random.yaml[/bold]; [bold]rome list experiments[/bold] lists all experiments.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


ORDER = (
    "demo",
    "train",
    "evaluate",
    "sweep",
    "bench",
    "report",
    "table",
    "figures",
    "explore",
    "cost",
    "check",
    "schema",
    "push",
    "list",
    "init",
)
"""Order of the commands in the help; commands from further files come last."""


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rome {__version__}")
        raise typer.Exit


@app.callback()
def rome_(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line.

    Exit codes: 0 success; 1 some cases failed, or another process of the job ended; 2 a mistake that the message
    explains; 75 stopped by SIGTERM, SIGUSR1 or SIGUSR2, to be started again; 130 stopped by Ctrl-C.
    """
    files = [each.name for each in pkgutil.iter_modules(rome.cli.__path__) if not each.name.startswith("_")]
    for name in (*ORDER, *files):
        importlib.import_module(f"rome.cli.{name}")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # characters that the encoding lacks must not end a report
            stream.reconfigure(errors="backslashreplace" if stream is sys.stderr else "replace")
    given = list(map(_expand_home, sys.argv[1:] if arguments is None else arguments))
    with exiting():
        try:
            sys.exit(app(given, prog_name="rome", standalone_mode=False) or 0)
        except UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":  # `rome` without arguments has printed its help
                sys.exit(2)
            raise UserError(explain(error, given)) from None


def _expand_home(argument: str) -> str:
    """Expand the tilde in ``--out=~/x``; shells expand it only in ``--out ~/x``."""
    option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{option}{equals}{os.path.expanduser(value)}"
