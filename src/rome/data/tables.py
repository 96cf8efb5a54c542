"""Parquet files of images as on the Hugging Face Hub: one row an image, encoded, and its label."""

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
from torch import Tensor

from rome.core.errors import UserError
from rome.data.base import one_line
from rome.data.pixels import Images

if TYPE_CHECKING:
    import pyarrow as pa

_FOLDERS = ("", "plain_text", "data")
_COLUMNS = ("img", "image")
_PIECE = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet$")


@dataclass(frozen=True)
class ImageTable(Images):
    """The images of some files as they are encoded, one after the other, and their labels."""

    files: tuple[Path, ...]
    counts: tuple[int, ...]
    """Images of each file."""
    encoded: pa.ChunkedArray
    """The bytes of all."""
    labels: Tensor
    """int64 (N,), none of them negative."""
    names: tuple[str, ...]
    """Of the classes, as the files say; empty if they do not."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> IO[bytes]:
        return io.BytesIO(self.encoded[row].as_py() or b"")

    def filename(self, row: int) -> str:
        """Its file and its number there."""
        file = 0
        while row >= self.counts[file]:
            row, file = row - self.counts[file], file + 1
        return f"{self.files[file]}: row {row}"

    @property
    def source(self) -> str:
        """The first file, and how many more."""
        return f"{self.files[0]}{f' and {len(self.files) - 1} more' if len(self.files) > 1 else ''}"

    def remarks(self) -> list[str]:
        """That more than one of a hundred images is there twice, as where a piece is: by their last bytes (which depend
        on all pixels in most formats), and then by all."""
        import pyarrow.compute as pc

        again = 0
        for images in (pc.binary_slice(self.encoded, -64, None), self.encoded):
            again = len(self) - pc.count_distinct(images, mode="all").as_py()
            if again <= len(self) // 100:
                return []
        return [f"{self.files[0].parent}: {again} of {len(self)} images repeat another one: is a piece there twice?"]


def find_tables(root: Path, *names: str) -> list[Path]:
    """The files of the first of these splits that is there, such as ``train-*.parquet``, also in ``plain_text`` and
    ``data``. Empty where there is none.

    Raises:
        UserError: some of the pieces they are numbered by are missing or there twice.
    """
    found = (sorted(root.joinpath(folder).glob(f"{name}[.-]*parquet")) for name in names for folder in _FOLDERS)
    files = next(filter(None, found), [])
    pieces = [piece for file in files if (piece := _PIECE.search(file.name))]
    if pieces:
        name, total = pieces[0].string[: pieces[0].start()], pieces[0][2]
        there = {int(piece[1]) for piece in pieces if piece[2] == total}
        if there != set(range(int(total))) or len(files) != int(total):
            raise UserError(
                f"{files[0].parent} has {len(files)} files {name}-*-of-{total}.parquet, and {int(total)} belong "
                "together: download what is missing, and remove what is there twice or belongs to another version"
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


def read_tables(
    files: list[Path], label: str = "label", *, classes: int | None = None, first: int | None = None
) -> ImageTable:
    """The images, still encoded, and labels of Parquet files with a column ``img`` or ``image``, of bytes or a struct
    with bytes.

    Args:
        label: the column of labels, integers from 0.
        classes: their number; None: that of the names in the files, or any.
        first: read no more than so many rows of each file.

    Raises:
        UserError: they are not such files, or disagree about the names of the classes.
    """
    import pyarrow as pa

    images, labels, names = zip(*(_read(file, label, classes, first) for file in files), strict=True)
    if len(set(names)) > 1:
        raise UserError(f"{files[0].parent}: its files name different classes: remove what belongs to other data")
    encoded = pa.chunked_array([chunk for each in images for chunk in each.chunks], pa.large_binary())
    return ImageTable(tuple(files), tuple(map(len, labels)), encoded, torch.cat(labels), names[0])


def labels_in(file: Path, label: str = "label") -> tuple[tuple[str, ...], list[Any]]:
    """The names of the classes that the Hub writes into a file, empty where it has none, and the labels, read without
    the images: [0] of a file that cannot be read, which is refused when its images are."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            labels = parquet.read([label]).column(label).to_pylist() if label in schema.names else []
            return _names(schema.metadata, label), labels
    except (pa.ArrowException, OSError):
        return (), [0]


def _read(
    file: Path, label: str, classes: int | None, first: int | None
) -> tuple[pa.ChunkedArray, Tensor, tuple[str, ...]]:
    """The encoded images of one file, their labels, and the names of the classes."""
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
            struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            inner = kind.field("bytes").type if struct else kind
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
            encoded = (pc.struct_field(encoded, "bytes") if struct else encoded).cast(pa.large_binary())
    except (pa.ArrowException, OSError) as error:
        refuse(f"not a readable Parquet file ({one_line(error)})")
    labels = table.column(label).to_pylist()
    names = _names(schema.metadata, label)
    classes = classes or len(names) or 2**31
    wrong = [(row, value) for row, value in enumerate(labels) if value is None or not 0 <= value < classes]
    if wrong and all(value == -1 for value in labels):
        raise UserError(
            f"{file}: its labels are secret (all are -1), as of some test sets on the Hub; put "
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
        return tuple(map(str, json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
