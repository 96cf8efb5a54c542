"""Any image data set in the Parquet format of the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from pydantic import Field

from rome.core.errors import UserError
from rome.data.base import NAMES, Split, SplitName, TestSplit, choose_split
from rome.data.listing import mix_classes
from rome.data.memory import MemorySplit
from rome.data.resized import IMAGENET_MEAN, IMAGENET_STD, Resized
from rome.data.tables import ImageTable, equal_files, find_tables, labels_in, read_tables


class Parquet(Resized):
    """Any images in the Hugging Face Hub's Parquet files: train-*.parquet and test-*.parquet (or validation).

    Each file has a column ``img`` or ``image`` (bytes, or a struct with bytes) and a column of labels, integers from 0.

    Without ``size`` all images must have one size, which they keep; they are decoded once and held in memory.
    Augmentation is then zero padding by an eighth, random crop and horizontal flip, as on CIFAR-10. With ``size``
    images are decoded on demand and brought to ``size`` x ``size`` pixels, as described in
    :class:`~rome.data.resized.Resized`; encoded images of up to 512 MiB in all are held in memory, more are read by row
    groups. If the files group the classes, examples are put in an order that mixes the classes and is the same
    everywhere, so that the first n are a fair sample; otherwise they keep their order. Gray images become RGB.
    """

    kind = "parquet"
    path: str = Field(min_length=1)
    label: str = "label"
    """Name of the column of labels, such as ``fine_label`` for CIFAR-100."""
    test_split: TestSplit | None = None
    """Name of the test set; null: the first of test, validation, valid and val that exists and has labels."""
    size: int | None = Field(None, ge=1)
    """Side of all images in pixels, after resizing; null for images that already have one size, which they keep."""

    def open(self, split: SplitName) -> Split:
        files, remarks = self._files(split)
        others, _ = self._files("test" if split == "train" else "train", needed=False)
        table = read_tables(files, self.label)
        rows = mix_classes(table.labels.numpy())
        rows = rows[: self._count(split, len(rows), files[0].parent)]
        if split == "train" and self.size is not None and not table.small:
            remarks.append(
                f"{files[0].parent}: images are read by row groups of up to {np.diff(table.starts).max()} images, and "
                "in random order a whole group for each image; data.kind=timm data.name=hfds/NAME reads single images"
            )
        opened = self._opened(table, rows, self._classes(table, [file for file in others if file not in files]))
        same = [f"{mine} and {theirs} are the same file" for mine, theirs in equal_files(files, others)]
        return opened.described(table.source, [*remarks, *table.remarks(), *same])

    def _opened(self, table: ImageTable, rows: np.ndarray, classes: tuple[str, ...]) -> Split:
        labels = table.labels[torch.from_numpy(rows)]
        if self.size is not None:
            return self.resized(table, rows, labels, classes, self.size)
        images = table.decoded(rows)
        pad = max(images.shape[2:]) // 8
        return MemorySplit(images, labels, classes, IMAGENET_MEAN, IMAGENET_STD, augment=self.augment, pad=pad)

    def one_size(self) -> bool:
        """Whether the first test images all have the same size."""
        table = read_tables(self._files("test")[0], self.label)
        return len({table.picture(row).size for row in range(min(len(table), 64))}) == 1

    def _files(self, split: SplitName, *, needed: bool = True) -> tuple[list[Path], list[str]]:
        """Return the files of a split, and remarks about the choice."""
        root = Path(os.path.expanduser(self.path))
        if split == "test" and root.is_file():
            return [root], []
        folder = root.parent if root.is_file() else root
        found = {name: files for name in NAMES[split] if (files := find_tables(folder, name))}
        name, remarks = "train", list[str]()
        if split == "test":
            name, remarks = choose_split(folder, list(found), self.test_split, lambda name: self._labelled(found[name]))
        files = found.get(name, [])
        if needed and not files:
            state = f"has no {split}-*.parquet" if folder.is_dir() else "is neither a folder nor a file"
            raise UserError(
                f"{folder} {state}: data.path must contain train-*.parquet and test-*.parquet (or validation), also in "
                "a folder data or plain_text"
            )
        return files, remarks

    def _labelled(self, files: list[Path]) -> bool:
        """Whether any label is neither missing nor withheld (-1), as in some test sets on the Hub."""
        return any(value not in (None, -1) for file in files for value in labels_in(file, self.label)[1])

    def _classes(self, table: ImageTable, others: list[Path]) -> tuple[str, ...]:
        """Return the class names in the files, or, without names, the numbers up to the largest label in any file.

        Raises:
            UserError: the two splits name different classes.
        """
        largest = int(table.labels.max())
        for file in others:
            names, labels = labels_in(file, self.label)
            largest = max(largest, *(value for value in labels if isinstance(value, int)), 0)
            if names != table.names:
                raise UserError(
                    f"{table.files[0]} and {file} differ in the names of their classes ({len(table.names) or 'none'} "
                    f"and {len(names) or 'none'}): keep only the files of one data set in {file.parent}"
                )
        return table.names or tuple(map(str, range(largest + 1)))
