"""Output of the commands, and their exit codes."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from rome.core.errors import Incomplete, Interrupted, UserError, first_line, printable
from rome.core.files import explain
from rome.core.launched import is_first
from rome.core.signals import Stopped, handled

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
    """Print rows of cells, which are plain text, not markup. In a pipe nothing is cut, wrapped or padded.

    Args:
        titles: one for each column; without them the table has no header.
        left: indices of left-justified columns; all others are right-justified.
        wrapped: indices of columns that may wrap on a narrow terminal.
        gap: spaces between columns.
    """
    from rich.console import Console
    from rich.table import Table

    console = console or Console(highlight=False, markup=False)
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), show_header=bool(titles))
    rows = list(rows)
    for i, title in enumerate(titles or [""] * max(map(len, rows), default=0)):
        table.add_column(
            title,
            justify="left" if i in left else "right",
            no_wrap=i not in wrapped,
            overflow="fold",
            min_width=8 if i in wrapped and titles else None,
        )
    for row in rows:
        table.add_row(*row)
    if console.is_terminal:
        console.print(table)
        return
    console.width = max(console.width, console.measure(table, options=console.options.update(width=10_000)).maximum)
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        print(line.rstrip(), file=console.file)


def say(text: str) -> None:
    """Print to standard error: standard output holds only results. Of several processes, only the first prints."""
    if is_first():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def exiting() -> Iterator[None]:
    """Turn an error or signal that ends a command into one line on standard error and an exit code."""
    try:
        with handled(Stopped.at_once):
            yield
    except (UserError, OSError) as error:
        line = explain(error) if isinstance(error, OSError) else printable(str(error))
        if line is None:
            raise
        _end(f"error: {line}", 2)
    except (Incomplete, FloatingPointError) as failed:  # FloatingPointError: NaN gradients in every case
        _end(f"error: {failed}", 1)
    except Interrupted as stopped:
        _end(str(stopped), stopped.code)
    except Stopped as stop:
        _end(str(stop), stop.code)
    except KeyboardInterrupt:
        _end("stopped", 130)
    except Exception as error:
        from rome.core.device import out_of_memory  # imports torch

        if not out_of_memory(error):
            raise
        advice = "use a smaller batch size (rome evaluate finds one with --batch-size auto); finished work is kept"
        _end(f"error: not enough memory ({first_line(error)}): {advice}", 2)


def _end(text: str, code: int) -> NoReturn:
    """Print a line to standard error and exit."""
    print(text, file=sys.stderr)
    sys.exit(code)
