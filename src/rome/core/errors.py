"""The error for mistakes of the user, hints for its message, and other ways in which a command ends."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Sequence

REQUEUE = 75
"""Exit code of a command that saved its work and should be started again: EX_TEMPFAIL of sysexits.h."""


class UserError(Exception):
    """Something the user provided cannot be used: config, data, checkpoint, shapes or an existing run.

    The message says what was given, what is valid and what to do. The command line prints it without a traceback
    and exits with code 2.
    """


class Interrupted(Exception):  # noqa: N818
    """A signal, or the end of another process, stopped the work; finished work is saved. ``code`` is the conventional
    exit code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Incomplete(Exception):  # noqa: N818
    """The work is done except for parts that failed; other results are saved. The command line exits with code 1."""


def did_you_mean(given: object, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid name, if one is near, and all valid names."""
    names = sorted(valid)
    near = nearest(given, names)
    return f"{f' Did you mean {near!r}?' if near else ''} Valid: {', '.join(names) or 'none'}."


def nearest(given: object, valid: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The valid name most similar to ``given``; None if no similarity reaches ``cutoff`` (1: identical)."""
    return next(iter(difflib.get_close_matches(str(given), list(valid), n=1, cutoff=cutoff)), None)


def some(names: Sequence[str], shown: int = 3, between: str = ", ") -> str:
    """Join names, showing only the first few: ``a, b, c and 7 more``."""
    return between.join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def short(value: object, longest: int = 60) -> str:
    """A value as JSON, cut to ``longest`` characters."""
    try:
        text = json.dumps(value)
    except TypeError:
        text = repr(value)
    return text if len(text) <= longest else text[: longest - 3] + "..."


def printable(text: str) -> str:
    """Text of unknown origin, with characters that control a terminal replaced."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
