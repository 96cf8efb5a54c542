"""Mistakes in the use of a command, in the words and the form of all other messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import typer

from rome.core.errors import did_you_mean, nearest

UsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""What typer raises: its own class or click's, which depends on the version."""

_QUOTED = r"'([^']*)'"


def in_our_words(error: Any, arguments: Sequence[str]) -> str:
    """What is wrong with these arguments, and what was meant."""
    context = getattr(error, "ctx", None)
    command = None if context is None else context.command
    if command is not None and getattr(error, "option_name", None) and hasattr(error, "possibilities"):
        text = _no_option(error.option_name, command, arguments)
    elif choice := re.search(r"for '?([^':]*)'?: .*?'([^']*)' is not one of (.*)\.", error.format_message()):
        text = f"{choice[1]} cannot be {choice[2]!r}.{did_you_mean(choice[2], re.findall(_QUOTED, choice[3]))}"
    else:
        text = error.format_message()
        text = text[:1].lower() + text[1:]
    return text if context is None else f"{text.rstrip('.')} ({context.command_path} --help says more)"


def _no_option(option: str, command: Any, arguments: Sequence[str]) -> str:
    options = [name for each in command.params for name in each.opts if name.startswith("--")]
    settings = any("key=value" in (each.metavar or "") for each in command.params)
    if not settings or nearest(option, options, cutoff=0.8):
        return f"there is no option {option}.{did_you_mean(option, options)}"
    given = next((each for each in arguments if each.partition("=")[0] == option), option)
    _, equals, value = given.partition("=")
    following = [*arguments, ""][list(arguments).index(given) + 1] if given in arguments and not equals else value
    value = "..." if not following or following.startswith("-") else following
    return f"there is no option {option}; settings of a config have no dashes: {option[2:].replace('-', '_')}={value}"
