"""The interface of data sets: settings (:class:`Data`) that open as numbered examples (:class:`Split`).

The caller chooses the examples of each batch. The augmentation of an example is a function of a seed and the example's
number alone, so the images do not depend on batch size, workers, ranks, or whether an epoch was resumed.
"""

from __future__ import annotations

import errno
import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, field_validator
from torch import Tensor

from rome.core.component import Component
from rome.core.console import say
from rome.core.errors import UserError

_say_once = functools.cache(say)
SplitName = Literal["train", "test"]
TestSplit = Literal["test", "validation", "valid", "val"]
Floats = tuple[float, ...]
Batches = Iterator[tuple[Tensor, Tensor]]
"""(x, y): x float32 (B, C, H, W) in [0, 1], contiguous; y int64 (B,)."""
NAMES: dict[SplitName, tuple[str, ...]] = {"train": ("train",), "test": ("test", "validation", "valid", "val")}
"""Names of the splits in folders and files; if several exist, the first one with labels is used."""


class Pixels:
    """Images kept as bytes, in a quarter of the memory of floats.

    Indexing it like a tensor converts only the selected images to float32 in [0, 1], with the values of batches.

    Args:
        values: uint8 (n, C, H, W).
        levels: the value of white.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, values: Tensor, levels: int) -> None:
        self.values, self.levels, self.shape = values, levels, values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return self.values[rows].float().div_(self.levels)


class Split(ABC):
    """The training or the test examples of a data set, numbered 0..N-1.

    Attributes:
        classes: names; label i is ``classes[i]``.
        shape: (C, H, W) of every image.
        labels: int64 (N,) on the CPU.
        mean, std: per channel, on the scale [0, 1], for the normalisation inside the model.
        source: where the examples come from: a folder or files.
        remarks: what readers of the results should know: choices among several files, files that are not read.
    """

    source: str = ""
    remarks: tuple[str, ...] = ()

    def __init__(
        self, classes: tuple[str, ...], shape: tuple[int, int, int], labels: Tensor, mean: Floats, std: Floats
    ) -> None:
        self.classes, self.shape, self.labels, self.mean, self.std = classes, shape, labels, mean, std

    def described(self, source: str, remarks: Iterable[str] = ()) -> Self:
        """Set the source and the remarks, and return this split.

        The first process also prints each remark to standard error, once.
        """
        self.source, self.remarks = source, tuple(remarks)
        for remark in self.remarks:
            _say_once(remark)
        return self

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        order: Sequence[Tensor],
        *,
        augment_seed: int | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> Batches:
        """Return an iterator over batches, one for each index tensor in ``order``.

        Args:
            order: int64 index tensors (B,), one per batch, with values in 0..N-1 that may repeat; B may differ.
            augment_seed: None for images without augmentation. A number (one per epoch) for augmented images, which
                depend on it and the example's number only. The global random state of this process does not change.
            device: the device of the batches.
            workers: number of processes that read ahead; ignored for data held in memory.

        Raises:
            UserError: immediately for an invalid index; during iteration for a file that cannot be read.
        """
        numbers = [indices.cpu() for indices in order]
        for number, each in enumerate(numbers):
            if each.ndim != 1 or each.dtype != torch.int64:
                form = f"{each.dtype} {tuple(each.shape)}"
                raise UserError(f"batch {number} of the order must be an int64 tensor (B,), not {form}")
            wrong = each[(each < 0) | (each >= len(self))]
            if len(wrong):
                raise UserError(f"there is no example {wrong[0]}: this split has {len(self)}, numbered from 0")
        return self._batches(numbers, augment_seed, torch.device(device), workers)

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """Return the first ``n`` examples as they are: x float32 (n, C, H, W) in [0, 1], y int64 (n,), on the CPU."""
        ((x, y),) = self.batches([torch.arange(n)])
        return x, y

    def stored(self, n: int, *, workers: int = 0) -> tuple[Tensor | Pixels, Tensor]:
        """Return the first ``n`` examples, or all if there are fewer; images decoded as bytes stay :class:`Pixels`.

        Args:
            workers: as in :meth:`batches`.
        """
        return self.first(min(n, len(self)))

    @abstractmethod
    def _batches(self, order: list[Tensor], augment_seed: int | None, device: torch.device, workers: int) -> Batches:
        """Return :meth:`batches`, whose arguments have been checked."""


class Subset(Split):
    """A selection of another split's examples, renumbered, with the same augmentation as there.

    Args:
        numbers: int64 (n,) on the CPU: the numbers of the selected examples in ``whole``.
    """

    def __init__(self, whole: Split, numbers: Tensor) -> None:
        super().__init__(whole.classes, whole.shape, whole.labels[numbers], whole.mean, whole.std)
        self.whole, self.numbers = whole, numbers

    def _batches(self, order: list[Tensor], augment_seed: int | None, device: torch.device, workers: int) -> Batches:
        return self.whole._batches([self.numbers[indices] for indices in order], augment_seed, device, workers)


class Data(Component):
    """A data set for image classification."""

    path: str | None = None
    """Where the files are."""
    augment: bool = True
    """Whether training images are augmented."""
    train_limit: int | None = Field(None, ge=1)
    """Use only this many training examples, the first ones."""
    test_limit: int | None = Field(None, ge=1)
    """Use only this many test examples, the first ones."""

    @field_validator("path", check_fields=False)
    @classmethod
    def _check_path(cls, path: str | None) -> str | None:
        try:
            os.stat(os.path.expanduser(path or "."))
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
                raise ValueError(f"cannot be a path: {getattr(error, 'strerror', None) or error}") from None
        return path

    def form(self, classes: int | None = None) -> tuple[tuple[int, int, int], int]:
        """Return image shape (C, H, W) and number of classes, without reading files if the data set fixes them.

        Args:
            classes: the number of classes, if known, to save data sets from reading it from their files.
        """
        split = self.open("test")
        return split.shape, len(split.classes)

    @abstractmethod
    def open(self, split: SplitName) -> Split:
        """Open the training or the test examples.

        Raises:
            UserError: files are missing, broken, or not those of this data set.
        """

    def _count(self, split: SplitName, available: int, where: object) -> int:
        """Return how many of the available examples to use."""
        limit = self.train_limit if split == "train" else self.test_limit
        if limit is not None and limit > available:
            raise UserError(
                f"{split}_limit={limit} asks for more than {where} has: {available} examples; lower it or leave it out"
            )
        return available if limit is None else limit


def choose_split(
    root: Path, existing: Sequence[str], wanted: str | None, labelled: Callable[[str], bool]
) -> tuple[str, list[str]]:
    """Return the name of the test set to use, the first one with labels, and remarks if there was a choice.

    Args:
        root: folder of the data, for messages.
        existing: the test sets that exist, in the order of :data:`NAMES`; if empty, so is the name.
        wanted: the test set named in the config, or None.
        labelled: whether a test set has labels.

    Raises:
        UserError: the wanted test set does not exist.
    """
    if wanted is not None:
        if wanted not in existing:
            raise UserError(f"data.test_split: {root} has no {wanted}; it has {', '.join(existing) or 'no test set'}")
        return wanted, []
    usable = [name for name in existing if len(existing) == 1 or labelled(name)] or list(existing)
    remarks = [f"{root}: {name} has no labels and is not used" for name in existing if name not in usable]
    if len(usable) > 1:
        rest = " and ".join(usable[1:])
        remarks.append(
            f"{root} has {usable[0]} and {rest}: {usable[0]} is used (data.test_split={usable[1]} changes it)"
        )
    return (usable[0] if usable else ""), remarks


def one_line(error: Exception) -> str:
    """Return the message of another library's error in one line, for use in our messages."""
    return " ".join(str(error).split()) or type(error).__name__
