"""The images of a folder of class folders: searched for once, cached, and held in arrays.

A Python list of a million names takes 300 MB, and every process that reads it copies it, because reading changes the
reference counts. Arrow's arrays take a tenth of that. A cached list is a file in the user's cache, whose pages all
processes of a machine share; the first process makes it, and the others wait for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from rome.core.console import say
from rome.core.errors import UserError
from rome.core.files import replace_file, user_folder
from rome.data.base import one_line

if TYPE_CHECKING:
    import pyarrow as pa

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's list, copied because importing it takes longer than everything else in a config."""
FRESH = 60.0
"""Seconds. A folder that changed this recently is not cached: where clocks are coarse or differ, a further change might
not change the folder's modification time."""
MANY = 100_000
"""Number of images from which a list that cannot be cached is worth a message."""
DIGEST = 64
"""Bytes of the checksum at the start of a cache file."""


@dataclass(frozen=True)
class Listing:
    """Images by number, in an order that mixes the classes and is the same everywhere: by a hash of CLASS/FILE."""

    names: pa.Array
    """File names, as bytes (large_binary)."""
    places: np.ndarray
    """int32 (N,): the class folder of each image, as an index into ``folders``."""
    folders: tuple[str, ...]
    """Class folders with images, sorted by name."""
    rest: str
    """A remark on the files that are not read, by extension, starting with a semicolon; empty if all are read."""
    misplaced: str
    """An image that is not at CLASS/FILE, for which timm and torchvision would give different labels; or empty."""

    def __getitem__(self, row: int) -> tuple[str, str]:
        """Return class folder and file name of an image."""
        return self.folders[self.places[row]], os.fsdecode(self.names[row].as_py())

    def keys(self) -> pa.Array:
        """Return CLASS/FILE of all images, as bytes."""
        import pyarrow as pa
        import pyarrow.compute as pc

        folders = pa.array([os.fsencode(name) for name in self.folders], pa.large_binary())
        return pc.binary_join_element_wise(
            folders.take(pa.array(self.places)), self.names, pa.scalar(b"/", pa.large_binary())
        )


def list_images(folder: Path) -> Listing:
    """List the images in a folder of class folders, from the user's cache if no folder in it has changed."""
    table, facts = cached(str(folder), lambda: _scan(folder))
    names, places = table.column("name"), table.column("place").to_numpy()
    names = names.chunk(0) if names.num_chunks == 1 else names.combine_chunks()  # the latter copies
    return Listing(names, places, tuple(facts["folders"]), facts["rest"], facts["misplaced"])


Found = tuple["pa.Table", dict[str, Any]]
"""A table, and facts about it that JSON can hold. Fact ``times`` has the modification time (ns) of each file or folder
that the table was made from, by path."""


def cached(source: str, make: Callable[[], Found], *rest: str) -> Found:
    """Return the result of ``make``, from the user's cache if the files and folders it was made from are unchanged.

    Args:
        source: path of the data, also for messages.
        rest: whatever else distinguishes this table from others.
    """
    home, key = user_folder("cache"), "\n".join([os.path.abspath(source), *rest])
    if home is None:
        return make()
    file = home / "data" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.arrow"
    with _locked(file):
        found = _read(file, source)
        if found is not None:
            return found
        started = time.time()
        table, facts = make()
        if max(facts["times"].values()) > (started - FRESH) * 1e9:
            return table, facts
        try:
            _write(file, table, facts)
        except OSError as error:
            if len(table) >= MANY:
                say(
                    f"the list of {source} cannot be cached in {file.parent} ({error.strerror or error}), so each "
                    "process makes its own: set ROME_CACHE_HOME to a writable folder"
                )
            return table, facts
    return _read(file, source) or (table, facts)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Let in one process at a time, if the file system supports locks and this user may create them."""
    lock = None
    with suppress(OSError, NotImplementedError):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{file}.lock")
        lock.acquire()
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _scan(folder: Path) -> Found:
    """Search a folder for the fields of a :class:`Listing`."""
    import pyarrow as pa

    names, counts, digests = list[Any](), dict[str, int](), bytearray()
    rest, total, misplaced, times = Counter[str](), 0, "", dict[str, int]()
    for place, folders, files in os.walk(folder, followlinks=True):
        inside = Path(place).relative_to(folder).parts
        times[os.path.abspath(place)] = os.stat(place).st_mtime_ns
        below = any(map(hidden, inside))
        images = []
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if below or hidden(name):
                rest["hidden"] += 1
            elif ending not in IMG_EXTENSIONS:
                rest[ending or "without an extension"] += 1
            else:
                images.append(os.fsencode(name))
        total += len(files)
        folders[:] = [name for name in folders if not (below and os.path.islink(os.path.join(place, name)))]
        if images and len(inside) != 1:
            misplaced = misplaced or os.path.join(place, os.fsdecode(images[0]))
        elif images:
            label = os.fsencode(inside[0]) + b"/"
            digests += b"".join(hashlib.sha256(label + name).digest() for name in images)
            names.append(pa.array(images, pa.large_binary()))
            counts[inside[0]] = len(images)
    order = by_hash(digests)
    known = sorted(counts)
    number = {name: place for place, name in enumerate(known)}
    places = np.repeat(np.array([number[name] for name in counts], dtype=np.int32), list(counts.values()))
    endings = ", ".join(f"{count} {ending}" for ending, count in rest.most_common())
    summary = f"; {rest.total()} of {total} files are not read: {endings}" if rest else ""
    joined = pa.concat_arrays(names) if names else pa.array([], pa.large_binary())
    table = pa.table({"name": joined.take(pa.array(order)), "place": places[order]})
    return table, {"times": times, "folders": known, "rest": summary, "misplaced": misplaced}


def by_hash(digests: bytes | bytearray) -> np.ndarray:
    """Return the order that sorts concatenated SHA-256 digests: int64 (N,)."""
    words = np.frombuffer(digests, dtype=">u8").reshape(-1, 4)
    return np.lexsort(words.T[::-1])


def mix_classes(labels: np.ndarray) -> np.ndarray:
    """Return the rows in their own order, or, if classes are grouped, in the order of a hash of their numbers.

    Classes are grouped if at most half as many neighbours differ in their labels as in a random order. This includes
    rows that are sorted in pieces.

    Args:
        labels: int64 (N,), one per row.
    """
    n, counts = len(labels), np.bincount(labels).astype(float)
    expected = n - 1 - float((counts * (counts - 1)).sum()) / n  # differing pairs of neighbours, of n - 1
    if not expected > 0 or (labels[1:] != labels[:-1]).sum() > expected / 2:
        return np.arange(n)
    return by_hash(b"".join(hashlib.sha256(str(row).encode()).digest() for row in range(n)))


def _write(file: Path, table: pa.Table, facts: dict[str, Any]) -> None:
    import pyarrow as pa

    table, sink = table.combine_chunks().replace_schema_metadata({"rome": json.dumps(facts)}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = sink.getvalue().to_pybytes()
    replace_file(file, hashlib.sha256(content).hexdigest().encode() + content)


def _read(file: Path, source: str) -> Found | None:
    """Read a cache file; None if there is none, or if it is damaged or outdated."""
    import pyarrow as pa

    try:
        content = pa.memory_map(str(file)).read_buffer()
        body = content.slice(DIGEST)
        if hashlib.sha256(body).hexdigest().encode() != content.slice(0, DIGEST).to_pybytes():
            raise ValueError("checksum")
        table = pa.ipc.open_stream(pa.BufferReader(body)).read_all()
        facts = json.loads(table.schema.metadata[b"rome"])
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError) as error:
        say(f"{file} cannot be used ({one_line(error)}): {source} is searched again")
        return None
    try:
        same = all(os.stat(place).st_mtime_ns == at for place, at in facts["times"].items())
    except OSError:
        same = False
    if not same:
        say(f"{source} changed since its images were listed: it is searched again")
    return (table, facts) if same else None


def class_folders(folder: Path | str) -> set[str]:
    """Return the names of the folders in a folder, without hidden ones.

    Raises:
        UserError: one of them cannot be read, so its images would be missing.
    """
    found = [entry for entry in os.scandir(folder) if entry.is_dir() and not hidden(entry.name)]
    if closed := sorted(entry.path for entry in found if not os.access(entry.path, os.R_OK | os.X_OK)):
        raise UserError(f"class folder {closed[0]} cannot be read: check its permissions")
    return {entry.name for entry in found}


def hidden(name: str) -> bool:
    """Whether a file or folder is hidden or was left by an archive, and so holds no images."""
    return name.startswith(".") or name == "__MACOSX"
