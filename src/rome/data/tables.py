"""Parquet files of images, as on the Hugging Face Hub: each row holds an encoded image and its label."""

from __future__ import annotations

import filecmp
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
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


HELD = 2**29
"""Bytes of encoded images up to which a table is held in memory; of a larger table only one row group is held."""


@dataclass(frozen=True)
class ImageTable(Images):
    """The encoded images of several files, in the order of the files, and their labels.

    A row group is read when one of its images is needed, from memory-mapped files that all processes of a machine
    share.
    """

    files: tuple[Path, ...]
    columns: tuple[str, ...]
    """The column of the bytes in each file."""
    metadata: tuple[Any, ...]
    """pyarrow's metadata of each file, kept because reading it takes longer than reading a row group."""
    groups: np.ndarray
    """int32 (groups, 2): file of each row group, and its number in that file."""
    starts: np.ndarray
    """int64 (groups + 1): first row of each row group, and the total number of rows."""
    size: int
    """Total bytes of the images."""
    labels: Tensor
    """int64 (N,), not negative."""
    names: tuple[str, ...]
    """Class names from the files; empty if these have none."""
    held: dict[int, pa.ChunkedArray] = field(default_factory=dict)
    """The row groups in memory, by number."""

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, row: int) -> IO[bytes]:
        group = self._group_of(row)
        return io.BytesIO(self._read(group)[int(row - self.starts[group])].as_py() or b"")

    def _group_of(self, row: int) -> int:
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def _read(self, group: int) -> pa.ChunkedArray:
        """Return the encoded images of a row group."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        if group not in self.held:
            if not self.small:
                self.held.clear()
            file, number = self.groups[group]
            try:
                with pq.ParquetFile(self.files[file], metadata=self.metadata[file], memory_map=True) as parquet:
                    table = parquet.read_row_group(number, [self.columns[file]], use_threads=False)
            except (pa.ArrowException, OSError) as error:
                problem = f"row group {number} cannot be read ({one_line(error)})"
                raise UserError(f"{self.files[file]}: {problem}: download the file again") from None
            images = table.column(0)
            images = pc.struct_field(images, "bytes") if pa.types.is_struct(images.type) else images
            self.held[group] = images.cast(pa.large_binary())
        return self.held[group]

    @property
    def small(self) -> bool:
        """Whether all images stay in memory after they were read."""
        return self.size <= HELD

    def filename(self, row: int) -> str:
        """Return the file of an image and its row in that file."""
        file = self.groups[self._group_of(row), 0]
        first = self.starts[np.flatnonzero(self.groups[:, 0] == file)[0]]
        return f"{self.files[file]}: row {row - first}"

    @property
    def source(self) -> str:
        """The first file, and the number of further files."""
        return f"{self.files[0]}{f' and {len(self.files) - 1} more' if len(self.files) > 1 else ''}"

    def remarks(self) -> list[str]:
        """Return a remark if more than one image in a hundred is a duplicate, as when a file of the set exists twice.

        Images are compared by their last bytes (which in most formats depend on all pixels), and then by all bytes. A
        table that is not held in memory is not checked.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        if not self.small:
            return []
        groups = (self._read(group).chunks for group in range(len(self.groups)))
        encoded = pa.chunked_array([chunk for chunks in groups for chunk in chunks], pa.large_binary())
        again = 0
        for images in (pc.binary_slice(encoded, -64, None), encoded):
            again = len(self) - pc.count_distinct(images, mode="all").as_py()
            if again <= len(self) // 100:
                return []
        return [f"{self.files[0].parent}: {again} of {len(self)} images repeat another one: is a file there twice?"]


def find_tables(root: Path, *names: str) -> list[Path]:
    """Return the files, such as ``train-*.parquet``, of the first of these splits that exists; empty if none does.

    Files are searched for in ``root`` and its subfolders ``plain_text`` and ``data``.

    Raises:
        UserError: some of the numbered pieces of the split are missing, or exist twice.
    """
    found = (sorted(root.joinpath(folder).glob(f"{name}[.-]*parquet")) for name in names for folder in _FOLDERS)
    files = next(filter(None, found), [])
    pieces = [piece for file in files if (piece := _PIECE.search(file.name))]
    if pieces:
        name, total = pieces[0].string[: pieces[0].start()], pieces[0][2]
        there = {int(piece[1]) for piece in pieces if piece[2] == total}
        if there != set(range(int(total))) or len(files) != int(total):
            raise UserError(
                f"{files[0].parent} has {len(files)} files {name}-*-of-{total}.parquet, and a complete set has "
                f"{int(total)}: download missing files, and remove duplicates and files of another version"
            )
    for first, second in equal_files(files, files):
        raise UserError(f"{first} and {second} have the same content: remove one of them")
    return files


def equal_files(some: Sequence[Path], others: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield pairs of files with the same content."""
    sizes = {file: file.stat().st_size for file in {*some, *others}}
    for number, first in enumerate(some):
        for second in others[number + 1 :] if some is others else others:
            if sizes[first] == sizes[second] and filecmp.cmp(first, second, shallow=False):
                yield first, second


def read_tables(files: list[Path], label: str = "label", *, classes: int | None = None) -> ImageTable:
    """Open Parquet files with a column ``img`` or ``image`` of bytes, or of structs with bytes, and read their labels.

    The images are read later.

    Args:
        label: the column of labels, integers from 0.
        classes: number of classes; None: the number of class names in the files, or any if there are none.

    Raises:
        UserError: the files are not of this kind, or name different classes.
    """
    read = [_read(file, label, classes) for file in files]
    if len({each.names for each in read}) > 1:
        raise UserError(f"{files[0].parent}: its files name different classes: remove those of other data sets")
    groups = [(file, group) for file, each in enumerate(read) for group in range(len(each.rows))]
    return ImageTable(
        files=tuple(files),
        columns=tuple(each.column for each in read),
        metadata=tuple(each.metadata for each in read),
        groups=np.array(groups, dtype=np.int32),
        starts=np.cumsum([0, *(rows for each in read for rows in each.rows)]),
        size=sum(each.size for each in read),
        labels=torch.from_numpy(np.concatenate([each.labels for each in read])),
        names=read[0].names,
    )


def labels_in(file: Path, label: str = "label") -> tuple[tuple[str, ...], list[Any]]:
    """Return the class names that the Hub wrote into a file, empty if it has none, and the labels, without the images.

    The labels of a file that cannot be read are [0]; the file is refused when its images are read.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            labels = parquet.read([label]).column(label).to_pylist() if label in schema.names else []
            return _names(schema.metadata, label), labels
    except (pa.ArrowException, OSError):
        return (), [0]


class _FileInfo(NamedTuple):
    """The contents of a file, without its images."""

    column: str
    """The column of the images' bytes."""
    metadata: Any
    """pyarrow's metadata."""
    rows: list[int]
    """Number of rows of each row group."""
    size: int
    """Total bytes of the images."""
    labels: np.ndarray
    names: tuple[str, ...]


def _read(file: Path, label: str, classes: int | None) -> _FileInfo:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refuse(problem: str) -> NoReturn:
        raise UserError(
            f"{file}: {problem}; needed are a column img or image (bytes, or a struct with bytes) and a column {label} "
            "of integers from 0: download the file again, or name the column of labels with data.label"
        ) from None

    try:
        with pq.ParquetFile(file, memory_map=True) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
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
            given = parquet.read([label]).column(label)
            labels = given.cast(pa.int64()).fill_null(-2).to_numpy()
    except (pa.ArrowException, OSError) as error:
        refuse(f"not a readable Parquet file ({one_line(error)})")
    names = _names(schema.metadata, label)
    wrong = np.flatnonzero((labels < 0) | (labels >= (classes or len(names) or 2**31)))
    if len(wrong) and (labels == -1).all():
        raise UserError(
            f"{file}: its labels are withheld (all are -1), as in some test sets on the Hub; put "
            "validation-*.parquet beside it, which is then read instead"
        )
    if len(wrong):
        refuse(f"row {wrong[0]} has the label {given[int(wrong[0])].as_py()}")
    if not len(labels):
        refuse("has no rows")
    path = f"{column}.bytes" if struct else column
    place = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == path)
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    images = [group.column(place) for group in groups]
    if all(
        each.statistics is not None and each.statistics.null_count == group.num_rows
        for each, group in zip(images, groups, strict=True)
    ):
        refuse(f"column {column} has no bytes in any row: the images are in other files")
    size = sum(each.total_uncompressed_size for each in images)
    return _FileInfo(path, metadata, [group.num_rows for group in groups], size, labels, names)


def _names(metadata: dict[bytes, bytes] | None, label: str) -> tuple[str, ...]:
    """Return the class names that the Hub wrote into a file's metadata; empty if there are none."""
    try:
        return tuple(map(str, json.loads((metadata or {})[b"huggingface"])["info"]["features"][label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
