"""The templates of pages, tables and sentences (``templates``). Modules that fill them with more than text and numbers
add their filters to :data:`TEMPLATES`."""

from __future__ import annotations

import re
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape


def markdown(value: object) -> str:
    """Text that Markdown, its tables and a renderer of HTML leave as it is."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(re.sub(r"[\\`*\[\]|$~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text).split())


def filled(template: str, **values: Any) -> str:
    """A template filled; in one whose name ends in ``.html`` values are text and no markup."""
    return TEMPLATES.get_template(template).render(values)


def sentences(template: str, **values: Any) -> list[str]:
    """The lines of a filled template, without those that are empty."""
    return [line for line in map(str.strip, filled(template, **values).splitlines()) if line]


TEMPLATES = Environment(
    loader=PackageLoader("rome.report"),
    autoescape=select_autoescape(),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"md": markdown, "yaml": lambda config: yaml.safe_dump(config.dump(), sort_keys=False)}
