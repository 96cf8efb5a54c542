"""Jinja templates for pages, tables and sentences (folder ``templates``). A module whose templates need further filters
adds them to :data:`TEMPLATES`."""

from __future__ import annotations

import re
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, select_autoescape


def markdown(value: object) -> str:
    """Escape text so that Markdown, including its tables and embedded HTML, shows it literally."""
    text = str(value).replace("&", "&amp;").replace("<", "&lt;")
    return " ".join(re.sub(r"[\\`*\[\]|$~]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text).split())


def filled(template: str, **values: Any) -> str:
    """Fill a template; one whose name ends in ``.html`` escapes its values."""
    return TEMPLATES.get_template(template).render(values)


def sentences(template: str, **values: Any) -> list[str]:
    """Fill a template and return its non-empty lines."""
    return [line for line in map(str.strip, filled(template, **values).splitlines()) if line]


TEMPLATES = Environment(
    loader=PackageLoader("rome.report"),
    autoescape=select_autoescape(),
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"md": markdown, "yaml": lambda config: yaml.safe_dump(config.dump(), sort_keys=False)}
