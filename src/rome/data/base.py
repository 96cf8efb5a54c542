"""The contract of every data set: a value (:class:`Data`) that opens into numbered examples (:class:`Split`).

The caller says which examples make each batch. What augmentation does to an example is a function of a seed and the
example's number alone, so batch size, workers, ranks and a resumed epoch give the same images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rome.component import Component
from rome.errors import UserError

SplitName = Literal["train", "test"]


class Split(ABC):
    """The training or the test examples of a data set, numbered 0..N-1.

    Attributes:
        classes: names; label i is ``classes[i]``.
        shape: (C, H, W) of every image.
        labels: int64 (N,) on the CPU.
        mean, std: of each channel, on the scale [0, 1]: for the normalisation inside the model.
    """

    def __init__(
        self,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.classes, self.shape, self.labels, self.mean, self.std = classes, shape, labels, mean, std

    def __len__(self) -> int:
        return len(self.labels)

    def batches(
        self,
        order: Sequence[Tensor],
        *,
        augment_seed: int | None = None,
        device: torch.device | str = "cpu",
        workers: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One batch for each index tensor of ``order``.

        Args:
            order: int64 index tensors (B,), one per batch, values in 0..N-1; they may repeat and differ in length.
            augment_seed: None for the images as they are. A number (one per epoch) for augmented images, which depend
                on it and the example's number only. No global random state changes in this process.
            device: where the batches are wanted.
            workers: processes that read ahead; data held in memory needs none and ignores this.

        Returns:
            An iterator of (x, y): x float32 (B, C, H, W) in [0, 1], contiguous; y int64 (B,).

        Raises:
            UserError: at once, an index that is not an example's number; while iterating, a file that cannot be read.
        """
        for number, indices in enumerate(order):
            if indices.ndim != 1 or indices.dtype != torch.int64:
                raise UserError(
                    f"batch {number} of the order must be an int64 tensor (B,) of example numbers, "
                    f"not {indices.dtype} {tuple(indices.shape)}"
                )
        numbers = torch.cat([indices.cpu() for indices in order]) if len(order) else torch.empty(0, dtype=torch.int64)
        wrong = numbers[(numbers < 0) | (numbers >= len(self))]
        if len(wrong):
            raise UserError(f"there is no example {wrong[0]}: this split has {len(self)}, numbered from 0")
        if workers < 0:
            raise UserError(f"workers must be 0 (read in this process) or more, not {workers}")
        return self._batches([indices.cpu() for indices in order], augment_seed, _indexed(device), workers)

    def first(self, n: int) -> tuple[Tensor, Tensor]:
        """The first ``n`` examples as they are: x float32 (n, C, H, W) in [0, 1], y int64 (n,), on the CPU."""
        if not 0 <= n <= len(self):
            raise UserError(f"cannot take the first {n} examples: this split has {len(self)}")
        ((x, y),) = self.batches([torch.arange(n)])
        return x, y

    @abstractmethod
    def _batches(
        self, order: list[Tensor], augment_seed: int | None, device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """:meth:`batches` with its arguments checked."""


class Subset(Split):
    """Some examples of another split, numbered anew. Each one's augmentation is what it is there.

    Args:
        numbers: int64 (n,) on the CPU: the examples, by their numbers in ``whole``.
    """

    def __init__(self, whole: Split, numbers: Tensor) -> None:
        super().__init__(whole.classes, whole.shape, whole.labels[numbers], whole.mean, whole.std)
        self.whole, self.numbers = whole, numbers

    def _batches(
        self, order: list[Tensor], augment_seed: int | None, device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self.whole._batches([self.numbers[indices] for indices in order], augment_seed, device, workers)


class Data(Component):
    """A data set for image classification."""

    path: str | None = None
    augment: bool = True
    """Whether training images are augmented."""
    train_limit: int | None = Field(None, ge=1)
    """Use only the first so many training examples."""
    test_limit: int | None = Field(None, ge=1)
    """Use only the first so many test examples."""

    def form(self, classes: int | None = None) -> tuple[tuple[int, int, int], int]:
        """Image shape (C, H, W) and number of classes, without the files where the data set fixes them.

        Args:
            classes: their number as somebody says who knows it, for a data set whose files would have to tell.
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


def one_line(error: Exception) -> str:
    """What another library said, as part of a message of ours."""
    return " ".join(str(error).split()) or type(error).__name__


def _indexed(device: torch.device | str) -> torch.device:
    """``cuda`` as the ``cuda:0`` it means at this moment."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
