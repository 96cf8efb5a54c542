"""The contract of every data set: a value (:class:`Data`) that opens into numbered examples (:class:`Split`).

The caller says which examples make each batch. What augmentation does to an example is a function of a seed and the
example's number alone, so batch size, workers, ranks and a resumed epoch give the same images.
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
"""What folders and files call the splits; of several that are there the first one with labels is used."""


class Pixels:
    """Images in the memory that they were decoded in, a quarter of that of floats. Indexed like a tensor, it gives
    those images alone as float32 in [0, 1], with the values that batches of them have.

    Args:
        values: uint8 (n, C, H, W).
        levels: the value that is white.
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
        mean, std: of each channel, on the scale [0, 1]: for the normalisation inside the model.
        source: where the examples are from: a folder, or files.
        remarks: what readers of the numbers should know: what was chosen among several, what is not read.
    """

    source: str = ""
    remarks: tuple[str, ...] = ()

    def __init__(
        self, classes: tuple[str, ...], shape: tuple[int, int, int], labels: Tensor, mean: Floats, std: Floats
    ) -> None:
        self.classes, self.shape, self.labels, self.mean, self.std = classes, shape, labels, mean, std

    def described(self, source: str, remarks: Iterable[str] = ()) -> Self:
        """This split with its source and remarks. The latter also go to standard error, each once, from the first of
        several processes."""
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
        """One batch for each index tensor of ``order``.

        Args:
            order: int64 index tensors (B,), one per batch, values in 0..N-1; they may repeat and differ in length.
            augment_seed: None for the images as they are. A number (one per epoch) for augmented images, which depend
                on it and the example's number only. No global random state changes in this process.
            device: where the batches are wanted.
            workers: processes that read ahead; data held in memory needs none and ignores this.

        Raises:
            UserError: at once, an index that is not an example's number; while iterating, a file that cannot be read.
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
        """The first ``n`` examples as they are: x float32 (n, C, H, W) in [0, 1], y int64 (n,), on the CPU."""
        ((x, y),) = self.batches([torch.arange(n)])
        return x, y

    def stored(self, n: int, *, workers: int = 0) -> tuple[Tensor | Pixels, Tensor]:
        """The first ``n`` examples, all where there are fewer, with the images as :class:`Pixels` where they were
        decoded as bytes.

        Args:
            workers: processes that read them, as in :meth:`batches`.
        """
        return self.first(min(n, len(self)))

    @abstractmethod
    def _batches(self, order: list[Tensor], augment_seed: int | None, device: torch.device, workers: int) -> Batches:
        """:meth:`batches` with its arguments checked."""


class Subset(Split):
    """Some examples of another split, numbered anew. Each one's augmentation is what it is there.

    Args:
        numbers: int64 (n,) on the CPU: the examples, by their numbers in ``whole``.
    """

    def __init__(self, whole: Split, numbers: Tensor) -> None:
        super().__init__(whole.classes, whole.shape, whole.labels[numbers], whole.mean, whole.std)
        self.whole, self.numbers = whole, numbers

    def _batches(self, order: list[Tensor], augment_seed: int | None, device: torch.device, workers: int) -> Batches:
        return self.whole._batches([self.numbers[indices] for indices in order], augment_seed, device, workers)


class Data(Component):
    """A data set for image classification."""

    path: str | None = None
    """Where the files lie."""
    augment: bool = True
    """Whether training images are augmented."""
    train_limit: int | None = Field(None, ge=1)
    """Use only the first so many training examples."""
    test_limit: int | None = Field(None, ge=1)
    """Use only the first so many test examples."""

    @field_validator("path", check_fields=False)
    @classmethod
    def _possible(cls, path: str | None) -> str | None:
        try:
            os.stat(os.path.expanduser(path or "."))
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) or error.errno == errno.ENAMETOOLONG:
                raise ValueError(f"cannot be a path: {getattr(error, 'strerror', None) or error}") from None
        return path

    def form(self, classes: int | None = None) -> tuple[tuple[int, int, int], int]:
        """Image shape (C, H, W) and number of classes, without the files where the data set fixes them.

        Args:
            classes: their number where it is known, for a data set that would have to look into its files.
        """
        split = self.open("test")
        return split.shape, len(split.classes)

    @abstractmethod
    def open(self, split: SplitName) -> Split:
        """The training or test examples, ready to read.

        Raises:
            UserError: files missing, broken or not what this data set consists of.
        """

    def _count(self, split: SplitName, available: int, where: object) -> int:
        """How many of the available examples to use."""
        limit = self.train_limit if split == "train" else self.test_limit
        if limit is not None and limit > available:
            raise UserError(
                f"{split}_limit={limit} asks for more than {where} has: {available} examples; lower it or leave it out"
            )
        return available if limit is None else limit


def chosen_split(
    root: Path, there: Sequence[str], wanted: str | None, labelled: Callable[[str], bool]
) -> tuple[str, list[str]]:
    """Which test set is used: the first that has labels; and remarks, where there was a choice.

    Args:
        root: of the data, for messages.
        there: those that are there, in the order of :data:`NAMES`; without any, the name is empty.
        wanted: the one that the config names.
        labelled: whether a split has labels.

    Raises:
        UserError: the one that is wanted is not there.
    """
    if wanted is not None:
        if wanted not in there:
            raise UserError(f"data.test_split: {root} has no {wanted}; it has {', '.join(there) or 'no test set'}")
        return wanted, []
    usable = [name for name in there if len(there) == 1 or labelled(name)] or list(there)
    remarks = [f"{root}: {name} has no labels and is not used" for name in there if name not in usable]
    if len(usable) > 1:
        rest = " and ".join(usable[1:])
        remarks.append(
            f"{root} has {usable[0]} and {rest}: {usable[0]} is used (data.test_split={usable[1]} changes it)"
        )
    return (usable[0] if usable else ""), remarks


def one_line(error: Exception) -> str:
    """What another library said, as part of a message of ours."""
    return " ".join(str(error).split()) or type(error).__name__
