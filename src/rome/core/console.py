"""Tables on a terminal, and whole in a pipe."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table


def print_table(table: Table, console: Console) -> None:
    """Print a table; a pipe has no width, so nothing is cut or wrapped there."""
    if not console.is_terminal:
        console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    console.print(table)
