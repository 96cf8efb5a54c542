"""Files that are whole or not there, and nested data under dotted names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, content: bytes) -> None:
    """The whole file or none of it, also when the machine stops."""
    replace_with(path, lambda partial: partial.write_bytes(content))


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """The same for what ``write`` writes into the file it is given. If it fails, what was there stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
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
