"""Folders of image files, read with timm while they are used."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rome.component import Number
from rome.data.base import Data, Split, SplitName, one_line
from rome.errors import UserError
from rome.randomness import derive_seed

_FOLDERS: dict[SplitName, tuple[str, ...]] = {"train": ("train",), "test": ("val", "validation", "test")}


class ImageFolder(Data):
    """Any folder of images, such as ImageNet: train/CLASS/*.jpg and val/CLASS/*.jpg (or validation, or test).

    Classes are numbered in the order of their names. Examples stand in an order that mixes the classes and is the same
    everywhere (by a hash of CLASS/FILE), so that the first n are a fair sample. Augmentation: random resized crop and
    horizontal flip; otherwise the shorter side is resized to ``size / crop_pct`` and the centre cropped (timm).
    """

    kind = "folder"
    path: str = Field(min_length=1)
    classes: str | None = None
    """Use only some class folders: ``imagenet100`` for the paper's 100 of ImageNet-1K's (the list of Tian et al.'s CMC,
    github.com/HobbitLong/CMC; other lists called ImageNet-100 differ), or a text file with one folder name a line."""
    size: int = Field(224, ge=1)
    crop_pct: Number = Field(0.875, gt=0, le=1)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bilinear"
    scale: tuple[Number, Number] = (0.08, 1.0)
    """Area of the random crop, as a share of the image."""
    ratio: tuple[Number, Number] = (3 / 4, 4 / 3)
    """Aspect ratio of the random crop."""

    @field_validator("scale", "ratio")
    @classmethod
    def _range(cls, given: tuple[float, float]) -> tuple[float, float]:
        if not 0 < given[0] <= given[1]:
            raise ValueError(f"must be a range of positive numbers, the smaller one first, not {list(given)}")
        return given

    def form(self, classes: int | None = None) -> tuple[tuple[int, int, int], int]:
        known = classes if self.classes is None else len(self._listed(self.classes))
        return super().form() if known is None else ((3, self.size, self.size), known)

    def open(self, split: SplitName) -> Split:
        from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
        from timm.data.dataset_factory import create_dataset
        from timm.data.transforms_factory import create_transform

        root = Path(self.path).expanduser()
        folder, other = _split_folder(root, split), _split_folder(root, "test" if split == "train" else "train")
        if folder is None:
            state = f"has no folder {' or '.join(_FOLDERS[split])}" if root.is_dir() else "is not a folder"
            raise UserError(
                f"{root} {state}: data.path must contain train/CLASS/*.jpg and val/CLASS/*.jpg (or validation, or test)"
            )
        try:
            reader = create_dataset("", root=str(folder), search_split=False).reader
        except RuntimeError as error:
            raise UserError(f"{folder} has no images: {one_line(error)}") from None
        names = [file[len(str(folder)) + 1 :].split(os.sep) for file, _ in reader.samples]
        found = _class_folders(folder)
        for parts in names:
            if len(parts) != 2 or parts[0] not in found:
                raise UserError(f"{folder / Path(*parts)} is not in {folder}/CLASS/: move or remove it")
        classes = self._wanted(folder, found)
        empty = sorted(classes - {parts[0] for parts in names})
        if empty:
            raise UserError(f"class folder {folder / empty[0]} has no images (.png, .jpg, .jpeg): fill or remove it")
        if other is not None and (differing := classes ^ self._wanted(other, _class_folders(other))):
            name = min(differing)
            here, there = (folder, other) if name in classes else (other, folder)
            raise UserError(
                f"the classes of {folder} and {other} differ in {len(differing)}: {name} is in {here} and not in "
                f"{there}; both need the same class folders"
            )
        rows = [row for row, parts in enumerate(names) if parts[0] in classes]
        order = sorted(rows, key=lambda row: hashlib.sha256("/".join(names[row]).encode()).digest())
        order = order[: self._count(split, len(order), folder)]
        number = {name: label for label, name in enumerate(sorted(classes))}
        common: dict[str, Any] = {
            "input_size": self.size,
            "interpolation": self.interpolation,
            "color_jitter": None,
            "normalize": False,  # and stay uint8: a quarter of the bytes between processes
        }
        plain = create_transform(**common, crop_pct=self.crop_pct)
        augmented = create_transform(**common, is_training=True, scale=self.scale, ratio=self.ratio)
        return FolderSplit(
            tuple(number),
            (3, self.size, self.size),
            torch.tensor([number[names[row][0]] for row in order]),
            tuple(IMAGENET_DEFAULT_MEAN),
            tuple(IMAGENET_DEFAULT_STD),
            reader=reader,
            rows=order,
            plain=plain,
            augmented=augmented if self.augment else plain,
        )

    def _wanted(self, folder: Path, found: set[str]) -> set[str]:
        """The class folders to use among those found."""
        if self.classes is None:
            return found
        wanted = self._listed(self.classes)
        missing = sorted(wanted - found)
        if missing or not wanted:
            what = f"lacks {len(missing)} of them, such as {missing[0]}" if missing else "needs at least one"
            raise UserError(f"data.classes: {self.classes} names {len(wanted)} class folders; {folder} {what}")
        return wanted

    def _listed(self, classes: str) -> set[str]:
        """The class folders that a list names: one of ours, or a file."""
        built_in = Path(__file__).parent / f"{classes}.txt"
        file = built_in if built_in.is_file() else Path(classes).expanduser()
        if not file.is_file():
            raise UserError(f"data.classes: {classes} is neither imagenet100 nor a file of class folder names")
        return set(file.read_text(encoding="utf-8").split())


class FolderSplit(Split):
    """Images read from files when they are wanted, as uint8, and turned into floats on the device."""

    def __init__(
        self,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        labels: Tensor,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        reader: Any,
        rows: list[int],
        plain: Any,
        augmented: Any,
    ) -> None:
        super().__init__(classes, shape, labels, mean, std)
        self._reader, self._rows, self._plain, self._augmented = reader, rows, plain, augmented

    def _batches(
        self, order: list[Tensor], augment_seed: int | None, device: torch.device, workers: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        transform = self._plain if augment_seed is None else self._augmented
        loader: DataLoader[Tensor | str] = DataLoader(
            _Files(self._reader, self._rows, transform, augment_seed),
            batch_sampler=[indices.tolist() for indices in order],
            collate_fn=_stack,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it would draw from the global one
        )
        for indices, images in zip(order, loader, strict=True):
            if isinstance(images, str):
                raise UserError(images)
            x = images.view(len(indices), *self.shape).to(device, non_blocking=True).float().div_(255)
            yield x, self.labels[indices].to(device, non_blocking=True)


class _Files(Dataset["Tensor | str"]):
    """Example i as uint8 (3, H, W), or what is wrong with its file: exceptions change when they leave a worker."""

    def __init__(self, reader: Any, rows: list[int], transform: Any, seed: int | None) -> None:
        self.reader, self.rows, self.transform, self.seed = reader, rows, transform, seed

    def __getitem__(self, index: int) -> Tensor | str:
        row = self.rows[index]
        try:
            file, _ = self.reader[row]
            with file, Image.open(file) as opened:
                image = opened.convert("RGB")
            with _seeded(None if self.seed is None else derive_seed(self.seed, index)):
                pixels: Tensor = self.transform(image)
        except Exception as error:  # Pillow raises almost any kind for a broken file
            path = self.reader.filename(row, absolute=True)
            return f"{path}: cannot be read as an image ({one_line(error)}); replace or remove it"
        return pixels


def _stack(items: list[Tensor | str]) -> Tensor | str:
    problems = [item for item in items if isinstance(item, str)]
    images = [item for item in items if isinstance(item, Tensor)]
    return problems[0] if problems else torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """The global generators of torch (CPU), Python and numpy seeded inside, and as they were afterwards."""
    if seed is None:
        yield
        return
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds every device
        random.seed(seed)
        np.random.seed(seed % 2**32)
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        np.random.set_state(states[2])


def _split_folder(root: Path, split: SplitName) -> Path | None:
    return next((root / name for name in _FOLDERS[split] if (root / name).is_dir()), None)


def _class_folders(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
