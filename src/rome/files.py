"""Files that are whole or not there, and nested data under dotted names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    """The whole file or none of it, also when the machine stops."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":  # make the new name itself durable
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested data as dotted names; the entries of a list go by their ``name`` or number."""
    if isinstance(value, list):
        value = {str(part.get("name", i) if isinstance(part, dict) else i): part for i, part in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= flatten(part, f"{prefix}.{name}" if prefix else name)
    return flat
