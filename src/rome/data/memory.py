"""Data sets small enough to be held in memory as one tensor, and digits, the smallest of them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rome.core.randomness import stream
from rome.data.base import Batches, Data, Floats, Pixels, Split, SplitName


class MemorySplit(Split):
    """Images held as one tensor. Batches are gathered, cropped and flipped as a whole, on CUDA devices if wanted there.

    Augmentation pads with ``pad`` zeros on every side, crops at random and, with ``flip``, mirrors half of the images.

    Args:
        images: (N, C, H, W) with values in 0..levels, usually uint8.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        classes: tuple[str, ...],
        mean: Floats,
        std: Floats,
        *,
        levels: int = 255,
        augment: bool,
        pad: int,
        flip: bool = True,
    ) -> None:
        super().__init__(classes, (images.shape[1], images.shape[2], images.shape[3]), labels, mean, std)
        self._levels, self._augment, self._pad, self._flip = levels, augment, pad, flip
        self._held = {torch.device("cpu"): (images.contiguous(), labels)}

    def stored(self, n: int, *, workers: int = 0) -> tuple[Tensor | Pixels, Tensor]:
        images, labels = self._held[torch.device("cpu")]
        if images.dtype != torch.uint8:
            return super().stored(n)
        return Pixels(images[:n], self._levels), labels[:n]

    def _batches(self, order: list[Tensor], augment_seed: int | None, device: torch.device, workers: int) -> Batches:
        home = device if device.type == "cuda" else torch.device("cpu")
        if home not in self._held:
            images, labels = self._held[torch.device("cpu")]
            self._held[home] = images.to(home), labels.to(home)
        images, labels = self._held[home]
        draws = None
        if augment_seed is not None and self._augment:
            draws = stream(augment_seed, "augment").uniform(torch.Size((len(self), 3)), home)
        for indices in order:
            chosen = indices.to(home, non_blocking=True)
            x = images[chosen]
            if draws is not None:
                x = self._crop_and_flip(x, draws[chosen])
            yield x.float().div_(self._levels).to(device), labels[chosen].to(device)

    def _crop_and_flip(self, x: Tensor, draws: Tensor) -> Tensor:
        """Crop and flip each image by its own three numbers in [0, 1): row, column, flip."""
        padded = F.pad(x, (self._pad,) * 4)
        crops = padded.unfold(2, x.shape[2], 1).unfold(3, x.shape[3], 1)  # a view: (B, C, rows, columns, H, W)
        corner = (draws[:, :2] * (2 * self._pad + 1)).long().clamp_(max=2 * self._pad)
        x = crops[torch.arange(len(x), device=x.device), :, corner[:, 0], corner[:, 1]]
        return torch.where(draws[:, 2, None, None, None] < 0.5, x.flip(3), x) if self._flip else x


class TensorSplit(MemorySplit):
    """Images and labels in memory, without augmentation.

    Args:
        x: float32 (N, C, H, W) in [0, 1].
        y: int64 (N,).
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y.cpu(), tuple(map(str, range(int(y.max()) + 1))), (), (), levels=1, augment=False, pad=0)


class Digits(Data):
    """Handwritten digits, 8x8 gray, from scikit-learn: 1,437 to train and 360 to test, nothing to download.

    The split is fixed and stratified. Augmentation (off by default) shifts by up to one pixel.
    """

    kind = "digits"
    path: None = None
    augment: bool = False

    def open(self, split: SplitName) -> Split:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        train, test = train_test_split(np.arange(1797), test_size=360, stratify=digits.target, random_state=0)
        rows = train if split == "train" else test
        rows = rows[: self._count(split, len(rows), "digits")]
        return MemorySplit(
            torch.from_numpy(digits.images[rows]).to(torch.uint8)[:, None],
            torch.from_numpy(digits.target[rows]).long(),
            tuple("0123456789"), (0.3053,), (0.376,), levels=16, augment=self.augment, pad=1, flip=False,
        )  # fmt: skip
