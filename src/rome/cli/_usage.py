"""Usage errors of the command line, worded like all other messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import typer

from rome.core.errors import did_you_mean, nearest

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""Base class of typer's usage errors: its own class or click's, depending on the version."""

_QUOTED = r"'([^']*)'"


def explain(error: Any, arguments: Sequence[str]) -> str:
    """One line that says what is wrong with the arguments and what was probably meant."""
    context = getattr(error, "ctx", None)
    command = None if context is None else context.command
    if command is not None and getattr(error, "option_name", None) and hasattr(error, "possibilities"):
        text = _unknown_option(error.option_name, command, arguments)
    elif choice := re.search(r"for '?([^':]*)'?: .*?'([^']*)' is not one of (.*)\.", error.format_message()):
        text = f"{choice[1]} cannot be {choice[2]!r}.{did_you_mean(choice[2], re.findall(_QUOTED, choice[3]))}"
    else:
        text = error.format_message()
        text = text[:1].lower() + text[1:]
    return text if context is None else f"{text.rstrip('.')} (see {context.command_path} --help)"


def _unknown_option(option: str, command: Any, arguments: Sequence[str]) -> str:
    options = [name for each in command.params for name in each.opts if name.startswith("--")]
    takes_settings = any("key=value" in (each.metavar or "") for each in command.params)
    if not takes_settings or nearest(option, options, cutoff=0.8):
        return f"there is no option {option}.{did_you_mean(option, options)}"
    given = next((each for each in arguments if each.partition("=")[0] == option), option)
    _, equals, value = given.partition("=")
    following = [*arguments, ""][list(arguments).index(given) + 1] if given in arguments and not equals else value
    value = "..." if not following or following.startswith("-") else following
    return f"there is no option {option}; write config settings without dashes: {option[2:].replace('-', '_')}={value}"
