"""Parquet files of images as the Hugging Face Hub keeps them: one row an image, encoded, and its label."""

from __future__ import annotations

import filecmp
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from rome.core.errors import UserError
from rome.data.base import one_line
from rome.data.pixels import read_rgb

if TYPE_CHECKING:
    import pyarrow as pa

_FOLDERS = ("", "plain_text", "data")
_COLUMNS = ("img", "image")
_PIECE = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")


@dataclass(frozen=True)
class ImageTable:
    """The images of some files as they are encoded, one after the other, and their labels."""

    files: tuple[Path, ...]
    images: tuple[pa.ChunkedArray, ...]
    """The bytes, for each file."""
    labels: Tensor
    """int64 (N,), none of them negative."""
    names: tuple[str, ...]
    """Of the classes, as the files say; empty if they do not."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> IO[bytes]:
        return io.BytesIO(self._bytes(row))

    def filename(self, row: int) -> str:
        """Its file and its number there."""
        file, place = self._place(row)
        return f"{self.files[file]}: row {place}"

    def picture(self, row: int) -> Image.Image:
        """An image in RGB.

        Raises:
            UserError: it is none. Pillow, because torchvision's decoder crashes on some broken files.
        """
        try:
            return read_rgb(self[row])
        except Exception as error:  # Pillow raises almost any kind for a broken file
            problem = one_line(error) if self._bytes(row) else "no bytes"
            raise UserError(f"{self.filename(row)} is not an image ({problem}); download the file again") from None

    @property
    def source(self) -> str:
        """The first file, and how many more."""
        return f"{self.files[0]}{f' and {len(self.files) - 1} more' if len(self.files) > 1 else ''}"

    def remarks(self) -> list[str]:
        """That more than one of a hundred images is there twice, as where a piece is: by their last bytes (which depend
        on all pixels in most formats), and then by all."""
        import pyarrow as pa
        import pyarrow.compute as pc

        encoded = pa.chunked_array([chunk for images in self.images for chunk in images.chunks], pa.large_binary())
        again = 0
        for images in (pc.binary_slice(encoded, -64, None), encoded):
            again = len(self) - pc.count_distinct(images, mode="all").as_py()
            if again <= len(self) // 100:
                return []
        return [f"{self.files[0].parent}: {again} of {len(self)} images repeat another one: is a piece there twice?"]

    def _bytes(self, row: int) -> bytes:
        file, place = self._place(row)
        return self.images[file][place].as_py() or b""

    def _place(self, row: int) -> tuple[int, int]:
        """The file of a row, and its number there."""
        for file, images in enumerate(self.images):
            if row < len(images):
                return file, row
            row -= len(images)
        raise IndexError(row)


def find_tables(root: Path, *names: str) -> list[Path]:
    """The files of the first of these splits that is there, such as ``train-*.parquet``, also in ``plain_text`` and
    ``data``. Empty where there is none.

    Raises:
        UserError: some of the pieces they are numbered by are missing or there twice.
    """
    patterns = [(folder, name) for name in names for folder in _FOLDERS]
    found = ([*root.joinpath(folder).glob(f"{name}[.-]*parquet")] for folder, name in patterns)
    files = sorted(next(filter(None, found), []))
    pieces = [_PIECE.search(file.name) for file in files]
    numbered = [piece for piece in pieces if piece]
    if numbered:
        name, total = numbered[0].string[: numbered[0].start()], numbered[0][2]
        if {int(piece[1]) for piece in numbered if piece[2] == total} != set(range(int(total))):
            raise UserError(
                f"{files[0].parent} has {len(files)} of the {int(total)} files {name}-*-of-{total}.parquet: "
                "download the others, and remove what belongs to another version"
            )
        if len(files) != int(total):
            raise UserError(
                f"{files[0].parent} has {len(files)} files of {name} and not {int(total)} "
                f"({name}-*-of-{total}.parquet): remove what is there twice or belongs to another version"
            )
    for first, second in equal_files(files, files):
        raise UserError(f"{first} and {second} are the same piece: remove one of them")
    return files


def equal_files(some: Sequence[Path], others: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Pairs of files with the same content."""
    sizes = {file: file.stat().st_size for file in {*some, *others}}
    for number, first in enumerate(some):
        for second in others[number + 1 :] if some is others else others:
            if sizes[first] == sizes[second] and filecmp.cmp(first, second, shallow=False):
                yield first, second


def read_tables(files: list[Path], label: str = "label", *, first: int | None = None) -> ImageTable:
    """The images, still encoded, and labels of Parquet files with a column ``img`` or ``image``, of bytes or a struct
    with bytes.

    Args:
        label: the column of labels, integers from 0.
        first: read no more than so many rows of each file.

    Raises:
        UserError: they are not such files, or disagree about the names of the classes.
    """
    images, labels, names = [], [], set()
    for file in files:
        some, some_labels, some_names = _read(file, label, first)
        images.append(some)
        labels.append(some_labels)
        names.add(some_names)
    if len(names) > 1:
        raise UserError(f"{files[0].parent}: its files name different classes: remove what belongs to other data")
    return ImageTable(tuple(files), tuple(images), torch.cat(labels), names.pop())


def label_names(file: Path, label: str = "label") -> tuple[str, ...]:
    """The classes that the Hub names inside a file; empty where it names none, or the file cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return _names(pq.read_schema(file).metadata, label)
    except (pa.ArrowException, OSError):
        return ()


def label_range(file: Path, label: str = "label") -> tuple[int, int]:
    """The smallest and the largest label of a file, without reading its images: (-1, -1) where it has none or where
    they are kept secret, as of some test sets on the Hub; (0, -1) where they are no integers or cannot be read."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            if label not in parquet.schema_arrow.names:
                return -1, -1
            found = pc.min_max(parquet.read([label]).column(label)).as_py()
    except (pa.ArrowException, OSError):
        return 0, -1
    if found["min"] is None:
        return -1, -1
    integers = isinstance(found["min"], int) and isinstance(found["max"], int)
    return (int(found["min"]), int(found["max"])) if integers else (0, -1)


def _read(file: Path, label: str, first: int | None) -> tuple[pa.ChunkedArray, Tensor, tuple[str, ...]]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def refuse(problem: str) -> NoReturn:
        raise UserError(
            f"{file}: {problem}; needed are a column img or image (bytes, or a struct with bytes) and a column {label} "
            "of integers from 0: download the file again, or name the column of labels with data.label"
        ) from None

    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            column = next((name for name in _COLUMNS if name in schema.names), "")
            if not column or label not in schema.names:
                refuse(f"has the columns {', '.join(schema.names)}")
            kind = schema.field(column).type
            inner = (
                kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
            )
            if not pa.types.is_binary(inner) and not pa.types.is_large_binary(inner):
                refuse(f"column {column} is {kind}")
            if not pa.types.is_integer(schema.field(label).type):
                refuse(f"column {label} is {schema.field(label).type}")
            if first is None:
                table = parquet.read([column, label])
            else:
                some = list(islice(parquet.iter_batches(first, columns=[column, label]), 1))
                table = pa.Table.from_batches(some) if some else schema.empty_table()
            encoded = table.column(column)
            encoded = (encoded if inner is kind else pc.struct_field(encoded, "bytes")).cast(pa.large_binary())
    except (pa.ArrowException, OSError) as error:
        refuse(f"not a readable Parquet file ({one_line(error)})")
    labels = table.column(label).to_pylist()
    names = _names(schema.metadata, label)
    wrong = [
        (row, value) for row, value in enumerate(labels) if value is None or not 0 <= value < (len(names) or 2**31)
    ]
    if wrong and all(value == -1 for value in labels):
        raise UserError(
            f"{file}: its labels are kept secret (all are -1), as of some test sets on the Hub; put "
            "validation-*.parquet beside it, which is read instead"
        )
    if wrong:
        refuse(f"row {wrong[0][0]} has the label {wrong[0][1]}")
    if not labels:
        refuse("has no rows")
    if encoded.null_count == len(encoded):
        refuse(f"column {column} has no bytes in any row: the images are in other files")
    return encoded, torch.tensor(labels, dtype=torch.int64), names


def _names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """The class names that the Hub writes into a file, if it did."""
    try:
        features: dict[str, Any] = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
