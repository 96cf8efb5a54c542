"""CIFAR-10 (Krizhevsky 2009), from torchvision's files or the Hub's Parquet files."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rome.core.errors import UserError
from rome.data.base import NAMES, Data, Split, SplitName, one_line
from rome.data.memory import MemorySplit
from rome.data.tables import find_tables, read_tables

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_IMAGES: dict[SplitName, int] = {"train": 50_000, "test": 10_000}


class Cifar10(Data):
    """CIFAR-10 from torchvision's files or the Hugging Face Hub's Parquet files, 32x32 colour.

    ``path`` is the folder that contains ``cifar-10-batches-py``, a folder with ``train-*.parquet`` and
    ``test-*.parquet`` (also in a subfolder ``plain_text``; columns ``img`` or ``image``, and ``label``), or one Parquet
    file: its images are the test set, whatever other files are in its folder, and ``train-*.parquet`` in the
    same folder is the training set. With ``download`` torchvision fetches missing files. Augmentation: zero padding of
    4, random crop, horizontal flip.
    """

    kind = "cifar10"
    path: str = "data/cifar10"
    download: bool = False
    """Download the files to ``path`` if they are missing."""

    def form(self, classes: int | None = None) -> tuple[tuple[int, int, int], int]:
        return (3, 32, 32), len(CIFAR10_CLASSES)

    def open(self, split: SplitName) -> Split:
        root = Path(os.path.expanduser(self.path))
        named = [root] if split == "test" and root.suffix == ".parquet" and root.is_file() else []
        if root.name == "cifar-10-batches-py" or root.suffix == ".parquet":
            root = root.parent
        tables = named or find_tables(root, *NAMES[split])
        in_batches = (root / "cifar-10-batches-py").is_dir()
        if not tables and not self.download and not in_batches:
            raise UserError(
                f"{root} {'does not contain CIFAR-10' if root.is_dir() else 'is not a folder'}: data.path must contain "
                f"cifar-10-batches-py (torchvision) or {split}-*.parquet (Hugging Face Hub); or set data.download=true"
            )
        if tables and (named or not in_batches):
            table, folder = read_tables(tables, classes=len(CIFAR10_CLASSES)), tables[0].parent
            if table.names and table.names != CIFAR10_CLASSES:
                raise UserError(
                    f"{tables[0]}: its classes are {', '.join(table.names[:3])}..., so it is another data set; set "
                    "data.kind=parquet"
                )
            source, remarks = table.source, table.remarks()
            if len(table) != _IMAGES[split]:
                remarks.append(f"{folder}: {len(table)} images; CIFAR-10 has {_IMAGES[split]} to {split}")
            count = self._count(split, len(table), folder)
            images, labels = table.decoded(range(count), (32, 32)), table.labels
        else:
            images, labels = _read_batches(root, split, self.download)
            source, remarks = str(root / "cifar-10-batches-py"), []
            count = self._count(split, len(labels), root)
        mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
        opened = MemorySplit(images[:count], labels[:count], CIFAR10_CLASSES, mean, std, augment=self.augment, pad=4)
        return opened.described(source, remarks)


def _read_batches(root: Path, split: SplitName, download: bool) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10 with torchvision, which verifies the checksum of a file before it unpickles it."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    try:
        with warnings.catch_warnings():  # numpy warns about these files of 2009
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
