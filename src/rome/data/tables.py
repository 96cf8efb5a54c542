"""Parquet files of images as the Hugging Face Hub keeps them: one row an image, encoded, and its label."""

from __future__ import annotations

import io
import json
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

import torch
from PIL import Image
from torch import Tensor

from rome.data.base import SplitName, one_line
from rome.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

_NAMES: dict[SplitName, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
_FOLDERS = ("", "plain_text", "data")
_COLUMNS = ("img", "image")


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

    def __getitem__(self, row: int) -> tuple[IO[bytes], int]:
        return io.BytesIO(self._bytes(row)), int(self.labels[row])

    def filename(self, row: int, *, absolute: bool) -> str:
        """Its file and its number there."""
        file, place = self._place(row)
        return f"{self.files[file]}: row {place}"

    def picture(self, row: int) -> Image.Image:
        """An image in RGB.

        Raises:
            UserError: it is none. Pillow, because torchvision's decoder crashes on some broken files.
        """
        data, _ = self[row]
        try:
            with data, Image.open(data) as image:
                return image.convert("RGB")
        except Exception as error:  # Pillow raises almost any kind for a broken file
            problem = one_line(error) if self._bytes(row) else "no bytes"
            where = self.filename(row, absolute=True)
            raise UserError(f"{where} is not an image ({problem}); download the file again") from None

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


def find_tables(root: Path, split: SplitName) -> list[Path]:
    """The files of a split, ``train-*.parquet`` or ``test-*.parquet`` (or validation), also in ``plain_text`` and
    ``data``. Empty where there is none.

    Raises:
        UserError: some of the shards they are numbered by are missing.
    """
    patterns = [(folder, name) for name in _NAMES[split] for folder in _FOLDERS]
    found = ([*root.joinpath(folder).glob(f"{name}[.-]*parquet")] for folder, name in patterns)
    files = sorted(next(filter(None, found), []))
    shards = re.search(r"-of-(\d+)\.parquet$", files[0].name) if files else None
    if shards and len(files) != int(shards[1]):
        raise UserError(
            f"{files[0].parent} has {len(files)} of the {int(shards[1])} files {split}-*-of-{shards[1]}.parquet: "
            "download the others, and remove what belongs to another version"
        )
    return files


def read_tables(files: list[Path], label: str = "label", *, first: int | None = None) -> ImageTable:
    """The images, still encoded, and labels of Parquet files with a column ``img`` or ``image`` (struct with bytes).

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


def largest_label(file: Path, label: str = "label") -> int:
    """The largest label of a file, without reading its images; -1 where it has none, or cannot be read."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        found = pc.max(pq.read_table(file, columns=[label]).column(label)).as_py()
    except (pa.ArrowException, OSError, KeyError):
        return -1
    return int(found) if isinstance(found, int) else -1


def _read(file: Path, label: str, first: int | None) -> tuple[pa.ChunkedArray, Tensor, tuple[str, ...]]:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    def refuse(problem: str) -> NoReturn:
        raise UserError(
            f"{file}: {problem}; needed are a column img or image (struct with bytes) and a column {label} of integers "
            "from 0: download the file again, or name the column of labels with data.label"
        ) from None

    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            column = next((name for name in _COLUMNS if name in schema.names), "")
            if not column or label not in schema.names:
                refuse(f"has the columns {', '.join(schema.names)}")
            kind = schema.field(column).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                refuse(f"column {column} is {kind}")
            if not pa.types.is_integer(schema.field(label).type):
                refuse(f"column {label} is {schema.field(label).type}")
            if first is None:
                table = parquet.read([column, label])
            else:
                some = list(islice(parquet.iter_batches(first, columns=[column, label]), 1))
                table = pa.Table.from_batches(some) if some else schema.empty_table()
            encoded = pc.struct_field(table.column(column), "bytes")
    except (pa.ArrowException, OSError) as error:
        refuse(f"not a readable Parquet file ({one_line(error)})")
    labels = table.column(label).to_pylist()
    names = _names(schema.metadata, label)
    wrong = [
        (row, value) for row, value in enumerate(labels) if value is None or not 0 <= value < (len(names) or 2**31)
    ]
    if wrong and all(value == -1 for value in labels):
        raise UserError(
            f"{file}: its labels are kept secret (all are -1), as of some test sets on the Hub; move its files away, "
            "and validation-*.parquet is read instead"
        )
    if wrong:
        refuse(f"row {wrong[0][0]} has the label {wrong[0][1]}")
    if not labels:
        refuse("has no rows")
    return encoded, torch.tensor(labels, dtype=torch.int64), names


def _names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """The class names that the Hub writes into a file, if it did."""
    try:
        features: dict[str, Any] = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
