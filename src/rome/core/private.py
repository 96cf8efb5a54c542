"""Taking out of data what says where it was made: paths of this machine, and its name."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PATH, HOST = "PATH", "HOST"
"""What stands in their place."""
_FILES = r"\.(?:py|ya?ml|json|pt|pth|ckpt|bin|tar|safetensors|parquet|npz|ts|pt2)"
_ROOT = r"(?:file:/+|~\w*/|/(?=[A-Za-z_.~])|[A-Za-z]:[\\/](?!/)|\\\\)"
"""How a path begins that does not depend on a working folder: in Unix, in a home, in Windows, on a server."""


def cleaner(places: Iterable[str | Path] = ()) -> Callable[[Any], Any]:
    """A function that copies plain data (JSON) without paths and without the machine's name, in keys too.

    Whatever stands under a key ``path`` becomes ``PATH``, and so does every absolute path in any text, but for the name
    of a file of code, settings or weights at its end.

    Args:
        places: further paths that are not to be found, which may have blanks in them; relative ones as they are written
            and as they are on this machine.
    """
    known = {str(each) for place in (Path.home(), Path.cwd(), tempfile.gettempdir(), *places) for each in _forms(place)}
    own = "|".join(re.escape(each) for each in sorted(known, key=len, reverse=True))
    start, end = r"(?<![\w.:/\\~<-])", r"[^\s'\"`,;:()\[\]{}<>|]*"
    paths = re.compile(rf"{start}(?:{own}){end}|(?<=['\"]){_ROOT}[^'\"]*(?=['\"])|{start}{_ROOT}{end}")
    hosts = {name for name in (socket.gethostname(), socket.getfqdn()) if re.search(r"[\d.-]", name)}
    machine = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in sorted(hosts, key=len, reverse=True)) or "(?!)")

    def text(value: str) -> str:
        return machine.sub(HOST, paths.sub(_last, value))

    def clean(value: Any) -> Any:
        if isinstance(value, str):
            return text(value)
        if isinstance(value, dict):
            return {text(key): PATH if key == "path" and each else clean(each) for key, each in value.items()}
        return [clean(each) for each in value] if isinstance(value, (list, tuple)) else value

    return clean


def _last(found: re.Match[str]) -> str:
    """The name of the file that a path leads to, if it says what kind of file it is, with a function of it."""
    name = re.split(r"[\\/]", found.group())[-1]
    return name if re.search(rf".{_FILES}(:\w+)?$", name) else PATH


def _forms(place: str | Path) -> Iterator[str]:
    """How a path may be written: as it is, and in full. A single word could be anything."""
    text = str(place)
    full = {os.path.abspath(os.path.expanduser(text)), os.path.realpath(os.path.expanduser(text))}
    yield from (each for each in {text, *full} if re.search(r"[\\/]", each.rstrip("\\/")) and each.strip("./\\"))
