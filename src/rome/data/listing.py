"""The images of a folder of class folders: looked for once, remembered, and held in arrays.

A Python list of a million names takes 300 MB, and every process that reads it copies it, for reading counts references.
Arrow's arrays take a tenth of that. A list that is remembered lies in a file of the user's cache, whose pages all
processes of a machine share; the first of them makes it, the others wait for it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock

from rome.core.console import say
from rome.core.files import replace_file, user_folder

if TYPE_CHECKING:
    import pyarrow as pa

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's, whose import takes longer than the rest of a config."""
FRESH = 60.0
"""Seconds. A list of a folder that changed since so little before is not remembered: a further change might leave the
folder's time as it is, where clocks are coarse or differ."""
MANY = 100_000
"""Images from which on it matters that their list cannot be remembered."""
DIGEST = 64
"""Bytes of the checksum before a remembered list."""


@dataclass(frozen=True)
class Listing:
    """Images by number, in the order of a hash of CLASS/FILE: one that mixes the classes and is the same everywhere."""

    names: pa.Array
    """Their files' names, as bytes (large_binary)."""
    places: np.ndarray
    """int32 (N,): the class folder of each, by its number in ``folders``."""
    folders: tuple[str, ...]
    """Class folders with images, by name."""
    rest: str
    """How many files are not read, of which endings, after a semicolon; empty where there are none."""
    misplaced: str
    """An image that is not in CLASS/FILE, where timm and torchvision would give it different labels; or empty."""

    def __getitem__(self, row: int) -> tuple[str, str]:
        """Class folder and file name of an image."""
        return self.folders[self.places[row]], os.fsdecode(self.names[row].as_py())

    def keys(self) -> pa.Array:
        """CLASS/FILE of all, as bytes."""
        import pyarrow as pa
        import pyarrow.compute as pc

        folders = pa.array([os.fsencode(name) for name in self.folders], pa.large_binary())
        return pc.binary_join_element_wise(
            folders.take(pa.array(self.places)), self.names, pa.scalar(b"/", pa.large_binary())
        )


def listed(folder: Path) -> Listing:
    """The images in a folder of class folders: from the user's cache where nothing changed since, which the times of
    all its folders tell."""
    home = user_folder("cache")
    if home is None:
        return _scan(folder)[0]
    place = os.path.realpath(folder)
    file = home / "images" / f"{hashlib.sha256(os.fsencode(place)).hexdigest()[:32]}.arrow"
    with _locked(file):
        found = _remembered(file, place)
        if found is not None:
            return found
        started = time.time()
        found, times = _scan(folder)
        if max(times.values()) > (started - FRESH) * 1e9:
            return found
        try:
            _remember(file, found, {"folder": place, "times": times})
        except OSError as error:
            if len(found.places) >= MANY:
                say(
                    f"the list of {folder} cannot be kept in {file.parent} ({error.strerror or error}), so each "
                    "process makes its own: set ROME_CACHE_HOME to a folder that can be written"
                )
            return found
    return _remembered(file, place) or found


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks and lets this user have them."""
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


def _scan(folder: Path) -> tuple[Listing, dict[str, int]]:
    """The images in a folder, and the times (ns) at which each folder in it changed."""
    import pyarrow as pa

    names, counts, digests = list[Any](), dict[str, int](), bytearray()
    rest, total, misplaced, times = Counter[str](), 0, "", dict[str, int]()
    for place, folders, files in os.walk(folder, followlinks=True):
        inside = Path(place).relative_to(folder).parts
        times["/".join(inside)] = os.stat(place).st_mtime_ns
        below = any(map(hidden, inside))
        images = []
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if below or hidden(name):
                rest["hidden"] += 1
            elif ending not in IMG_EXTENSIONS:
                rest[ending or "without an ending"] += 1
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
    return Listing(joined.take(pa.array(order)), places[order], tuple(known), summary, misplaced), times


def by_hash(digests: bytes | bytearray) -> np.ndarray:
    """The order of SHA-256 digests that stand one after the other: int64 (N,)."""
    words = np.frombuffer(digests, dtype=">u8").reshape(-1, 4)
    return np.lexsort(words.T[::-1])


def _remember(file: Path, found: Listing, facts: dict[str, Any]) -> None:
    import pyarrow as pa

    facts |= {"folders": found.folders, "rest": found.rest, "misplaced": found.misplaced}
    table = pa.table({"name": found.names, "place": pa.array(found.places)})
    table = table.replace_schema_metadata({"rome": json.dumps(facts)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = sink.getvalue().to_pybytes()
    replace_file(file, hashlib.sha256(content).hexdigest().encode() + content)


def _remembered(file: Path, place: str) -> Listing | None:
    """The list in a file, None where there is none or it is damaged or no longer true."""
    import pyarrow as pa

    try:
        content = pa.memory_map(str(file)).read_buffer()
        body = content.slice(DIGEST)
        if hashlib.sha256(body).hexdigest().encode() != content.slice(0, DIGEST).to_pybytes():
            raise ValueError
        batch = pa.ipc.open_stream(pa.BufferReader(body)).read_next_batch()
        facts = json.loads(batch.schema.metadata[b"rome"])
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError, KeyError, StopIteration) as error:
        if getattr(error, "errno", None) != errno.EACCES:
            say(f"{file} is damaged: {place} is listed anew")
        return None
    try:
        same = all(os.stat(os.path.join(place, inside)).st_mtime_ns == at for inside, at in facts["times"].items())
    except OSError:
        same = False
    if not same or facts["folder"] != place:
        say(f"{place} changed since its images were listed: it is listed anew")
        return None
    names, places = batch.column("name"), batch.column("place").to_numpy()
    return Listing(names, places, tuple(facts["folders"]), facts["rest"], facts["misplaced"])


def hidden(name: str) -> bool:
    """What systems and archives leave beside images."""
    return name.startswith(".") or name == "__MACOSX"
