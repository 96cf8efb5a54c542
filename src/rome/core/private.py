"""Removal of this machine's paths and name from data that is to be shared."""

from __future__ import annotations

import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

PATH, HOST = "PATH", "HOST"
"""Placeholders for paths and for the machine's name."""
_FILES = r"\.(?:py|ya?ml|json|pt|pth|ckpt|bin|tar|safetensors|parquet|npz|ts|pt2)"
_ROOT = r"(?:file:/+|~\w*/|/(?=[A-Za-z_.~])|[A-Za-z]:[\\/](?!/)|\\\\)"
"""Start of an absolute path: a URL of a file, a home folder, Unix, a Windows drive or a network share."""


def cleaner(places: Iterable[str | Path] = ()) -> Callable[[Any], Any]:
    """Return a function that copies plain data (JSON), keys included, without paths and without the machine's name.

    Every non-empty value under a key ``path`` becomes ``PATH``, and so does every absolute path in any text; of a path
    that ends in a file of code, settings or weights, the name of that file is kept.

    Args:
        places: further paths to remove, which may contain spaces; relative ones are removed as written and as absolute
            paths.
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
    """The file name at the end of a path, with ``:function`` if given; ``PATH`` unless its extension is a known one."""
    name = re.split(r"[\\/]", found.group())[-1]
    return name if re.search(rf".{_FILES}(:\w+)?$", name) else PATH


def _forms(place: str | Path) -> Iterator[str]:
    """The ways to write a path: as given, and absolute. Single words are left out: they could mean anything else."""
    text = str(place)
    full = {os.path.abspath(os.path.expanduser(text)), os.path.realpath(os.path.expanduser(text))}
    yield from (each for each in {text, *full} if re.search(r"[\\/]", each.rstrip("\\/")) and each.strip("./\\"))
