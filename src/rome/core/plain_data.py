"""Parsing of JSON and YAML of unknown origin into plain data, with limits on length, depth and number of values."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from rome.core.component import mistakes
from rome.core.errors import UserError, first_line

DEEPEST, MOST = 60, 100_000
"""Maximum nesting depth and maximum number of values of plain data."""
LONGEST_JSON, LONGEST_YAML = 16_000_000, 1_000_000
"""Maximum lengths of the text in characters; parsing YAML is a hundred times slower."""


_AMBIGUOUS = re.compile(r"[-+]?(0[0-9_]*[0-9]|[0-9_]+(:[0-9_.]+)+)$")
"""Matches integers in base 8 and 60 in YAML 1.1 (010 = 8, 1:30 = 90), which are 10 and a text in YAML 1.2."""


class Unreadable(ValueError):  # noqa: N818
    """The text is not plain data. ``line`` counts from 1; 0 if no single line is wrong."""

    def __init__(self, message: str, line: int = 0) -> None:
        super().__init__(message)
        self.line = line


def parse_json(text: str | bytes) -> Any:
    """Parse JSON into plain data.

    Raises:
        Unreadable: the text is not JSON, is too long or too deeply nested, or has too many values.
    """
    try:
        data = json.loads(_short_enough(text, LONGEST_JSON))
    except RecursionError:
        raise Unreadable(f"nested more than {DEEPEST} deep") from None
    except ValueError as error:
        raise Unreadable(f"not valid JSON: {error}") from error
    values, left = [(data, 0)], MOST
    while values:
        value, depth = values.pop()
        left = _counted(depth, left)
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        values.extend((part, depth + 1) for part in inner)
    return data


Place = tuple[str | int, ...]


def parse_yaml(text: str, note: Callable[[Place, int], None] = lambda place, line: None) -> Any:
    """Parse YAML into plain data. Aliases count each time they are used, so that a few lines cannot become billions of
    values.

    Args:
        note: called with the place and the line of every value and of every key.

    Raises:
        Unreadable: the text is not YAML, gives a key twice in one mapping, or is too long, deep or large for a config.
    """
    loader = yaml.SafeLoader("")
    left = MOST

    def plain(node: yaml.Node, place: Place) -> Any:
        nonlocal left
        left = _counted(len(place), left)
        note(place, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [plain(child, (*place, number)) for number, child in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            value = loader.construct_object(node)
            if isinstance(value, (int, float)) and _AMBIGUOUS.match(node.value):
                raise Unreadable(
                    f"{node.value} is {value} in this version of YAML and not what it looks like: write {value}, or "
                    f"'{node.value}' for text",
                    node.start_mark.line + 1,
                )
            if isinstance(value, int) and value.bit_length() > 1024:  # Python refuses to print larger ones
                raise Unreadable("a number of more than 1024 bits", node.start_mark.line + 1)
            return value
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise Unreadable("not valid YAML for a config: a key must be a word", key_node.start_mark.line + 1)
            key = str(key_node.value)
            if key in found:
                raise Unreadable(f"{key!r} is given twice; keep one", key_node.start_mark.line + 1)
            found[key] = plain(value_node, (*place, key))
            note((*place, key), key_node.start_mark.line + 1)
        return found

    try:
        node = _compose(_short_enough(text, LONGEST_YAML))
        return None if node is None else plain(node, ())
    except Unreadable:
        raise
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: an invalid date
        mark = getattr(error, "problem_mark", None)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise Unreadable(f"not valid YAML: {problem}", mark.line + 1 if mark else 0) from error


def _compose(text: str) -> Any:
    """Parse YAML into nodes. libyaml is ten times faster than PyYAML's own parser, but crashes on deep nesting and
    explains less: such texts, and those with mistakes, are left to PyYAML."""
    if (loader := getattr(yaml, "CSafeLoader", None)) is not None:
        with suppress(yaml.YAMLError):
            depth = 0
            for event in yaml.parse(text, Loader=loader):
                depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
                if depth > DEEPEST:
                    break
            else:
                return yaml.compose(text, Loader=loader)
    return yaml.compose(text, Loader=yaml.SafeLoader)


def read_plain(file: Path, schema: Any, advice: str, parse: Callable[[str], Any] = parse_json) -> Any:
    """Read a file of plain data that rome wrote itself, and that may have been damaged or edited since.

    Args:
        schema: type of the data, such as ``dict[str, str]``; the data are returned as they are in the file.
        advice: end of the error message, which says how to replace the file.

    Raises:
        UserError: the file cannot be read, or its data are not of this type.
    """
    try:
        data = parse(file.read_text(encoding="utf-8"))
        TypeAdapter(schema).validate_python(data, strict=True)
        return data
    except ValidationError as error:
        place, message = next(iter(mistakes(error).items()))
        message = message.partition(" or instance of")[0]
        reason = f"is damaged ({'.'.join(map(str, place))}{': ' if place else ''}{message})"
    except ValueError as error:
        reason = f"is damaged ({first_line(error)})"
    except OSError as error:
        reason = f"cannot be read ({error.strerror or first_line(error)})"
    raise UserError(f"{file} {reason}: {advice}")


def comment_after(text: str) -> str:
    """The comment that follows a value in YAML, such as the rest of a path that contains " #"; empty if none does."""
    ends = (yaml.StreamEndToken, yaml.BlockEndToken)
    rest = text[max(token.end_mark.index for token in yaml.scan(text) if not isinstance(token, ends)) :]
    return rest.strip()


def _short_enough(text: Any, longest: int) -> Any:
    """Return the text unless it is too long."""
    if len(text) > longest:
        raise Unreadable(f"{len(text):,} characters, more than {longest:,}")
    return text


def _counted(depth: int, left: int) -> int:
    """Count one more value at this depth, and return how many are left."""
    if depth > DEEPEST:
        raise Unreadable(f"nested more than {DEEPEST} deep")
    if not left:
        raise Unreadable(f"more than {MOST:,} values, aliases counted as often as they are used")
    return left - 1
