"""Images of any size, decoded and brought to one size by timm on demand."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from rome.core.component import Number
from rome.core.errors import UserError
from rome.core.randomness import derive_seed, unchanged_states
from rome.data.base import Batches, Data, Pixels, Split
from rome.data.pixels import Images

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's training images, the usual normalisation."""
AT_A_TIME = 64
"""Images that a worker reads at a time for a set that is held in memory."""


class Resized(Data):
    """Base of data sets whose images are brought to one size.

    Augmentation: random resized crop and horizontal flip. Without augmentation, timm's transform for evaluation: the
    shorter side is resized to ``size / crop_pct`` and the centre cropped. ``crop_mode: squash`` resizes both sides to
    that length instead; ``border`` resizes the longer side and pads with gray. For decoding see
    :mod:`rome.data.pixels`.
    """

    crop_pct: Number = Field(0.875, gt=0, le=1.25)
    """Share of the resized image that is cropped; above 1, as in VOLO (1.15), the image is padded with black."""
    crop_mode: Literal["center", "squash", "border"] = "center"
    """What is kept of an image that is not square: its centre, all of it squeezed, or all of it with gray borders."""
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    """Interpolation of the resizing."""
    scale: tuple[Number, Number] = (0.08, 1.0)
    """Range of the random crop's area, as a share of the image."""
    ratio: tuple[Number, Number] = (3 / 4, 4 / 3)
    """Range of the random crop's aspect ratio."""

    @field_validator("scale", "ratio")
    @classmethod
    def _check_range(cls, ends: tuple[float, float]) -> tuple[float, float]:
        if not 0 < ends[0] <= ends[1]:
            raise ValueError(f"must be a range of positive numbers, the smaller one first, not {list(ends)}")
        return ends

    def resized(self, images: Images, rows: np.ndarray, labels: Tensor, classes: tuple[str, ...], size: int) -> Split:
        """Return the split of these images, resized.

        Args:
            rows: numbers of the examples in ``images``, int64 (N,), in the order of the examples.
            labels: labels of the examples, int64 (N,).
            size: side of the resized images in pixels.
        """
        from timm.data.transforms_factory import create_transform

        common: dict[str, Any] = {
            "input_size": size,
            "mean": (0.5, 0.5, 0.5),  # the gray of borders, as in all timm models with borders
            "interpolation": self.interpolation,
            "color_jitter": None,
            "normalize": False,  # stay uint8: a quarter of the bytes between processes
        }
        plain = create_transform(**common, crop_pct=self.crop_pct, crop_mode=self.crop_mode)
        augmented = create_transform(**common, is_training=True, scale=self.scale, ratio=self.ratio)
        files = _Files(images, rows, plain)
        return _ResizedSplit(files, labels, classes, size, augmented if self.augment else plain)


class _ResizedSplit(Split):
    """Images read on demand, as uint8, and converted to floats on the device."""

    def __init__(self, files: _Files, labels: Tensor, classes: tuple[str, ...], size: int, augmented: Any) -> None:
        super().__init__(classes, (3, size, size), labels, IMAGENET_MEAN, IMAGENET_STD)
        self._files, self._augmented = files, augmented

    def _batches(self, order: list[Tensor], augment_seed: int | None, device: torch.device, workers: int) -> Batches:
        files = self._files
        if augment_seed is not None:
            files = replace(files, transform=self._augmented, seed=augment_seed)
        for indices, images in zip(order, self._read(files, order, device, workers), strict=True):
            x = images.to(device, non_blocking=True).float().div_(255)
            yield x, self.labels[indices].to(device, non_blocking=True)

    def stored(self, n: int, *, workers: int = 0) -> tuple[Tensor | Pixels, Tensor]:
        parts = torch.split(torch.arange(min(n, len(self))), AT_A_TIME)
        values = torch.empty(min(n, len(self)), *self.shape, dtype=torch.uint8)
        for part, images in zip(parts, self._read(self._files, parts, values.device, workers), strict=True):
            values[part] = images
        return Pixels(values, 255), self.labels[:n]

    def _read(self, files: _Files, order: Sequence[Tensor], device: torch.device, workers: int) -> Iterator[Tensor]:
        """Yield the images of each part of the order, uint8 (B, C, H, W) on the CPU, pinned for a CUDA device."""
        loader: DataLoader[Tensor | str] = DataLoader(
            files,
            batch_sampler=_BatchIndices(order),
            collate_fn=_stack,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # otherwise it would draw from the global generator
        )
        for indices, images in zip(order, loader, strict=True):
            if isinstance(images, str):
                raise UserError(images)
            yield images.view(len(indices), *self.shape)


class _BatchIndices(Sampler[list[int]]):
    """Index tensors as lists, made one at a time: all lists of an epoch take ten times the memory of the tensors."""

    def __init__(self, order: Sequence[Tensor]) -> None:
        self.order = order

    def __iter__(self) -> Iterator[list[int]]:
        return map(Tensor.tolist, self.order)


@dataclass(frozen=True)
class _Files(Dataset["Tensor | str"]):
    """Example i as uint8 (3, H, W), or an error message, because exceptions change when they leave a worker."""

    images: Images
    rows: np.ndarray
    transform: Any
    seed: int | None = None

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            image = self.images.picture(self.rows[index])
        except UserError as error:
            return str(error)
        with nullcontext() if self.seed is None else _seeded(derive_seed(self.seed, index)):
            pixels: Tensor = self.transform(image)
        return pixels


def _stack(items: list[Tensor | str]) -> Tensor | str:
    problems = [item for item in items if isinstance(item, str)]
    images = [item for item in items if isinstance(item, Tensor)]
    return problems[0] if problems else torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of torch (CPU), Python and numpy inside, and restore them afterwards."""
    with unchanged_states():
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every device
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
