"""Folders of image files, read with timm while they are used."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from pydantic import Field

from rome.data.base import Split, SplitName, one_line
from rome.data.resized import Resized
from rome.errors import UserError

_FOLDERS: dict[SplitName, tuple[str, ...]] = {"train": ("train",), "test": ("val", "validation", "test")}


class ImageFolder(Resized):
    """Any folder of images, such as ImageNet: train/CLASS/*.jpg and val/CLASS/*.jpg (or validation, or test).

    Classes are numbered in the order of their names. Examples stand in an order that mixes the classes and is the same
    everywhere (by a hash of CLASS/FILE), so that the first n are a fair sample. All become ``size`` pixels wide and
    high, as :class:`~rome.data.resized.Resized` says.
    """

    kind = "folder"
    path: str = Field(min_length=1)
    classes: str | None = None
    """Use only some class folders: ``imagenet100`` for the paper's 100 of ImageNet-1K's (the list of Tian et al.'s CMC,
    github.com/HobbitLong/CMC; other lists called ImageNet-100 differ), or a text file with one folder name a line."""
    size: int = Field(224, ge=1)

    def form(self, classes: int | None = None) -> tuple[tuple[int, int, int], int]:
        known = classes if self.classes is None else len(self._listed(self.classes))
        return super().form() if known is None else ((3, self.size, self.size), known)

    def open(self, split: SplitName) -> Split:
        from timm.data.dataset_factory import create_dataset

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
        labels = torch.tensor([number[names[row][0]] for row in order])
        return self.resized(reader, order, labels, tuple(number), self.size)

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


def _split_folder(root: Path, split: SplitName) -> Path | None:
    return next((root / name for name in _FOLDERS[split] if (root / name).is_dir()), None)


def _class_folders(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")}
