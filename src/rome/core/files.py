"""Atomic writes of files, advice on file system errors, file names, and plain data as dotted names or CSV."""

from __future__ import annotations

import csv
import datetime
import errno
import hashlib
import io
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from rome.core.errors import UserError

ROOM = 2**20
"""Bytes that must be free in a folder for results before the work begins."""
LONGEST_NAME = 150
"""Maximum length in bytes of a name for folders and files; file systems allow 255, and suffixes are added to it."""
_FULL = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EFBIG: "raise the limit on file sizes"}
_TRANSIENT = {errno.EIO, errno.ESTALE, errno.EACCES, errno.EBUSY, errno.EAGAIN, errno.ETIMEDOUT}
"""Error numbers of renames on NFS that may succeed a moment later."""
PAUSES = (0.1, 0.5, 2.0)
"""Seconds to wait before each retry of a rename."""
_ADVICE = {
    **_FULL,
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOENT: "check the path",
    errno.EROFS: "choose another folder",
    errno.EACCES: "check its permissions, or choose another path",
    errno.EPERM: "check its permissions, or choose another path",
}


def replace_file(path: Path, content: bytes) -> None:
    """Write a file atomically: its whole content or nothing, even if the machine stops."""
    replace_with(path, lambda partial: partial.write_bytes(content))


def replace_with(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file atomically by what ``write`` writes to the path passed to it. If that fails, the old file stays.

    Raises:
        OSError: the file cannot be written; the error's ``filename`` is ``path``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"  # processes on two machines may have the same number
    whole = path.absolute()  # "." alone has no name
    partial = whole.with_name(f".{whole.name}.{unique}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        write(partial)
        partial.chmod(mode)  # safetensors writes files that nobody else may read
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        _rename(partial, whole)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk gives none, other errors that of the partial file
        raise
    if os.name == "posix":  # make the new name itself durable
        with suppress(OSError):  # some network and user-space file systems cannot; the file is written
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def _rename(source: Path, target: Path) -> None:
    """Rename a file. A transient failure of a network file system is retried; if only its reply was lost, the rename
    counts as done."""
    inode = source.stat().st_ino
    for pause in (*PAUSES, None):
        try:
            return os.replace(source, target)
        except OSError as error:
            if not source.exists() and target.exists() and target.stat().st_ino == inode:
                return
            if pause is None or error.errno not in _TRANSIENT:
                raise
            time.sleep(pause)


def remove_partials(folder: Path, age: float = 600) -> None:
    """Remove the partial files that killed processes left in a folder: those not written to for ``age`` seconds, by the
    clock of the file system, which may be another machine's."""
    partials = list(folder.glob(".*.[0-9]*.partial"))
    with suppress(OSError), TemporaryFile(dir=folder) if partials and age else nullcontext() as probe:
        present = os.fstat(probe.fileno()).st_mtime if probe else 0.0
        for partial in partials:
            with suppress(OSError):  # renamed by now, or the folder is read-only
                if not age or present - partial.stat().st_mtime >= age:
                    partial.unlink()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def user_folder(kind: Literal["state", "cache"]) -> Path | None:
    """The folder for this user's state or cache: ``ROME_STATE_HOME`` or ``ROME_CACHE_HOME``, otherwise a folder in the
    XDG directory, by default in the home directory; None if there is none. Relative paths are ignored, since they would
    depend on the working folder."""
    for variable, inside in ((f"ROME_{kind.upper()}_HOME", ""), (f"XDG_{kind.upper()}_HOME", "rome")):
        if (folder := Path(os.environ.get(variable, ""))).is_absolute():
            return folder / inside
    try:
        return Path.home() / {"state": ".local/state", "cache": ".cache"}[kind] / "rome"
    except RuntimeError:
        return None


def make_folder(folder: Path) -> None:
    """Create a folder for results, check that it can be written, and remove what killed processes left there.

    Raises:
        UserError: it is a file, or cannot be created or written, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder, prefix=".", suffix=f".{os.getpid()}.partial") as file:
            file.write(bytes(ROOM))
        remove_partials(folder)
    except OSError as error:
        reason = "it is a file" if isinstance(error, FileExistsError) else error.strerror or error
        advice = _FULL.get(error.errno or 0, "choose another --out")
        raise UserError(f"nothing can be written in {folder} ({reason}): {advice}") from error


def explain(error: OSError) -> str | None:
    """A file system error on one line: path, reason and advice; None for an OSError that no file caused."""
    if error.filename is None and error.errno not in _FULL:
        return None
    reason, advice = error.strerror or str(error), _ADVICE.get(error.errno or 0, "check the path")
    return f"{reason}: {advice}" if error.filename is None else f"{error.filename}: {reason}: {advice}"


def check_name(name: str) -> str:
    """Return the name unchanged if it can be the name of a folder.

    Raises:
        ValueError: it would lead out of its folder, is too long, or contains characters that file names must not have.
    """
    wrong = [letter for letter in name if letter in "/\\" or not letter.isprintable()]
    if wrong:
        raise ValueError(f"{name[:40]!r} contains {wrong[0]!r}; it names a folder, so use letters, digits, - and _")
    if name in (".", ".."):
        raise ValueError(f"{name!r} cannot be the name of a folder; use letters, digits, - and _")
    if len(name.encode()) > LONGEST_NAME:
        raise ValueError(f"{name[:40]!r}... is {len(name.encode())} bytes long; at most {LONGEST_NAME}")
    return name


def as_file_name(text: str) -> str:
    """Turn a text into the name of a file or folder: invalid characters are replaced, spaces removed, and a name that
    would be too long is cut and ends in a hash."""
    name = "".join("_" if letter in "/\\" or not letter.isprintable() else letter for letter in text).replace(" ", "")
    if len(name.encode()) <= LONGEST_NAME:
        return name
    start = name.encode()[: LONGEST_NAME - 13].decode(errors="ignore")
    return f"{start}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested data as a flat dict with dotted names; the entries of a list are named by their ``name`` or number."""
    if isinstance(value, list):
        value = {str(part.get("name", i) if isinstance(part, dict) else i): part for i, part in enumerate(value)}
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, part in value.items():
        flat |= flatten(part, f"{prefix}.{name}" if prefix else name)
    return flat


def csv_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV, with a column for every key that occurs; missing values are empty."""
    rows, text = list(rows), io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def now() -> str:
    """The current date and time to the minute, as written in results and messages."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
