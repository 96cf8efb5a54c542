"""What a command prints, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rome.core.errors import Incomplete, Interrupted, UserError, printable
from rome.core.files import explain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_table(table: Table, console: Console) -> None:
    """Print a table; a pipe has no width, so nothing is cut or wrapped there."""
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)


def say(text: str) -> None:
    """To standard error, so that standard output holds results only."""
    print(text, file=sys.stderr)


@contextmanager
def exiting() -> Iterator[None]:
    """Turn what ends a command into one line and its exit code."""
    try:
        yield
    except (UserError, OSError) as error:
        line = explain(error) if isinstance(error, OSError) else printable(str(error))
        if line is None:
            raise
        say(f"error: {line}")
        sys.exit(2)
    except (Incomplete, FloatingPointError) as failed:  # the latter where every case met gradients that are NaN
        say(f"error: {failed}")
        sys.exit(1)
    except Interrupted as stopped:
        say(str(stopped))
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        say("stopped")
        sys.exit(130)
