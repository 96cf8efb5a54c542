"""What a command prints, and how it ends."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rome.core.errors import Incomplete, Interrupted, UserError, printable
from rome.core.files import explain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def print_table(
    rows: Iterable[Sequence[str | Text]],
    titles: Sequence[str | Text] = (),
    *,
    left: Container[int] = (0,),
    wrapped: Container[int] = (0,),
    gap: int = 1,
    console: Console | None = None,
) -> None:
    """Print rows of cells, which are text and not markup. A pipe has no width, so nothing is cut or wrapped there.

    Args:
        titles: of the columns; without them the table has no head.
        left: columns that are justified to the left; all others to the right.
        wrapped: columns that may be wrapped on a narrow terminal.
        gap: spaces between columns.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=bool(titles))
    rows = list(rows)
    for i, title in enumerate(titles or [""] * max(map(len, rows), default=0)):
        at_will = i in wrapped
        table.add_column(
            title,
            justify="left" if i in left else "right",
            no_wrap=not at_will,
            overflow="fold",
            min_width=8 if at_will and titles else None,
        )
    for row in rows:
        table.add_row(*row)
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
