"""CIFAR-10 (Krizhevsky 2009) from either of the two forms it comes in."""

from __future__ import annotations

import io
import json
import re
import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rome.data.base import Data, Split, SplitName, one_line
from rome.data.memory import MemorySplit
from rome.errors import UserError

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Cifar10(Data):
    """CIFAR-10 from torchvision's files or the Hugging Face Hub's Parquet files, 32x32 colour.

    ``path`` is the folder that contains ``cifar-10-batches-py``, or a folder with ``train-*.parquet`` and
    ``test-*.parquet`` (also in its subfolder ``plain_text``; columns ``img`` or ``image``, and ``label``). With
    ``download`` torchvision fetches what is missing. Augmentation: zero padding of 4, random crop, horizontal flip.
    """

    kind = "cifar10"
    path: str = "data/cifar10"
    download: bool = False

    def form(self, classes: int | None = None) -> tuple[tuple[int, int, int], int]:
        return (3, 32, 32), len(CIFAR10_CLASSES)

    def open(self, split: SplitName) -> Split:
        root = Path(self.path).expanduser()
        if root.name == "cifar-10-batches-py" or root.suffix == ".parquet":
            root = root.parent
        tables = next(
            (found for sub in ("", "plain_text") if (found := sorted((root / sub).glob(f"{split}*.parquet")))), []
        )
        if not tables and not self.download and not (root / "cifar-10-batches-py").is_dir():
            raise UserError(
                f"{root} {'holds no CIFAR-10' if root.is_dir() else 'is not a folder'}: data.path must contain "
                f"cifar-10-batches-py (torchvision) or {split}-*.parquet (Hugging Face Hub); or set data.download=true"
            )
        if (root / "cifar-10-batches-py").is_dir() or not tables:
            images, labels = _read_batches(root, split, self.download)
            count = self._count(split, len(labels), root)
            images, labels = images[:count], labels[:count]
        else:
            images, labels = self._read_parquet(tables, split)
        return MemorySplit(
            images,
            labels,
            CIFAR10_CLASSES,
            levels=255,
            mean=(0.4914, 0.4822, 0.4465),
            std=(0.2470, 0.2435, 0.2616),
            augment=self.augment,
            pad=4,
            flip=True,
        )

    def _read_parquet(self, files: list[Path], split: SplitName) -> tuple[Tensor, Tensor]:
        """Images uint8 (N, 3, 32, 32) and labels int64 (N,)."""
        shards = re.search(r"-of-(\d+)\.parquet$", files[0].name)
        if shards and len(files) != int(shards[1]):
            raise UserError(
                f"{files[0].parent} has {len(files)} of the {int(shards[1])} files {split}-*-of-{shards[1]}.parquet: "
                "download the others, and remove what belongs to another version"
            )
        encoded, labels = [], []
        for file in files:
            some, some_labels = _read_table(file)
            encoded += [(file, row, data) for row, data in enumerate(some)]
            labels.append(some_labels)
        count = self._count(split, len(encoded), files[0].parent)
        images = torch.empty((count, 32, 32, 3), dtype=torch.uint8)
        pixels = images.numpy()
        for i, (file, row, data) in enumerate(encoded[:count]):
            pixels[i] = _decode(file, row, data)
        return images.permute(0, 3, 1, 2), torch.cat(labels)[:count]


def _read_batches(root: Path, split: SplitName, download: bool) -> tuple[Tensor, Tensor]:
    """torchvision's reader, which unpickles nothing before its checksum is right."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    try:
        with warnings.catch_warnings():  # the files are from 2009, and numpy says so
            warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
            data = CIFAR10(str(root), train=split == "train", download=download)
    except (RuntimeError, OSError) as error:
        meta = (CIFAR10.meta["filename"], CIFAR10.meta["md5"])
        for name, checksum in (*CIFAR10.train_list, *CIFAR10.test_list, meta):
            file = root / CIFAR10.base_folder / name
            if not check_integrity(file, checksum):
                state = "differs from the original (checksum)" if file.is_file() else "is missing"
                todo = "set data.download=true to fetch CIFAR-10 again"
                if download:
                    todo = f"the download failed ({one_line(error)}); check the connection, or put the files there"
                raise UserError(f"{file} {state}: {todo}") from None
        raise UserError(f"{root} cannot be read as CIFAR-10: {one_line(error)}") from None
    return torch.from_numpy(data.data).permute(0, 3, 1, 2), torch.tensor(data.targets)


def _read_table(file: Path) -> tuple[list[bytes | None], Tensor]:
    """The encoded images and the labels of one Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refuse(problem: str) -> NoReturn:
        raise UserError(
            f"{file}: {problem}; CIFAR-10 has a column img or image (struct with bytes) and a column label "
            "(integers 0..9): download the file again"
        ) from None

    try:
        with pq.ParquetFile(file) as parquet:
            schema = parquet.schema_arrow
            column = next((name for name in ("img", "image") if name in schema.names), "")
            if not column or "label" not in schema.names:
                refuse(f"has the columns {', '.join(schema.names)}")
            kind = schema.field(column).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                refuse(f"column {column} is {kind}")
            if not pa.types.is_integer(schema.field("label").type):
                refuse(f"column label is {schema.field('label').type}")
            table = parquet.read([column, "label"])
    except (pa.ArrowException, OSError) as error:
        refuse(f"not a readable Parquet file ({one_line(error)})")
    names = _label_names(schema.metadata or {})
    if names and names != list(CIFAR10_CLASSES):
        refuse(f"its classes are {', '.join(names[:3])}...: another data set")
    labels = table.column("label").to_pylist()
    wrong = [(row, label) for row, label in enumerate(labels) if label is None or not 0 <= label <= 9]
    if wrong:
        refuse(f"row {wrong[0][0]} has the label {wrong[0][1]}")
    if not labels:
        refuse("has no rows")
    encoded: list[bytes | None] = [image and image["bytes"] for image in table.column(column).to_pylist()]
    return encoded, torch.tensor(labels, dtype=torch.int64)


def _label_names(metadata: dict[bytes, bytes]) -> list[str]:
    """The class names that the Hub writes into a file, if it did."""
    try:
        return list(json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"])
    except (KeyError, TypeError, ValueError):
        return []


def _decode(file: Path, row: int, data: bytes | None) -> NDArray[np.uint8]:
    """One encoded image as (32, 32, 3). Pillow, because torchvision's decoder crashes on some broken files."""
    try:
        with Image.open(io.BytesIO(data or b"")) as image:
            size = image.size
            pixels = np.asarray(image.convert("RGB")) if size == (32, 32) else None
    except Exception as error:  # Pillow raises almost any kind for a broken file
        problem = one_line(error) if data else "no bytes"
        raise UserError(f"{file}: row {row} is not an image ({problem}); download the file again") from None
    if pixels is None:
        given = f"{size[0]}x{size[1]}"
        raise UserError(
            f"{file}: row {row} is an image of {given} pixels; CIFAR-10 is 32x32: is this another data set?"
        )
    return pixels
