"""Folders of image files, decoded while they are used."""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, Self

import torch
from pydantic import Field, model_validator

from rome.core.errors import UserError
from rome.data.base import NAMES, Split, SplitName, chosen_split, one_line
from rome.data.pixels import Images
from rome.data.resized import Resized

IMG_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""torchvision's, whose import takes longer than the rest of a config."""


class ImageFolder(Resized):
    """Any folder of images, such as ImageNet: train/CLASS/*.jpg and test/CLASS/*.jpg (or validation, valid, val).

    Images are what torchvision takes for one: .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff and .webp; other and
    hidden files are counted in the split's remarks. Examples stand in an order that mixes the classes and is the same
    everywhere (by a hash of CLASS/FILE), so that the first n are a fair sample. All become ``size`` pixels wide and
    high, as :class:`~rome.data.resized.Resized` says.
    """

    kind = "folder"
    path: str = Field(min_length=1)
    classes: str | None = None
    """Use only some class folders: ``imagenet100`` for the paper's 100 of ImageNet-1K's (the list of Tian et al.'s CMC,
    github.com/HobbitLong/CMC; other lists called ImageNet-100 differ), or a text file with one folder name a line."""
    class_order: Literal["timm", "torchvision", "list"] = "timm"
    """How classes are numbered: by name with numbers by their value (2 before 10), as timm's reader does; by name as
    text (10 before 2), as torchvision's ImageFolder does; or as ``classes`` lists them, timm's ``class_map``."""
    size: int = Field(224, ge=1)
    """Side in pixels that all images are brought to."""

    @model_validator(mode="after")
    def _listed_or_not(self) -> Self:
        if self.class_order == "list" and self.classes is None:
            raise ValueError("class_order=list needs a list: set classes")
        return self

    def form(self, classes: int | None = None) -> tuple[tuple[int, int, int], int]:
        known = classes if self.classes is None else len(self._listed(self.classes))
        return super().form() if known is None else ((3, self.size, self.size), known)

    def open(self, split: SplitName) -> Split:
        root = Path(os.path.expanduser(self.path))
        folder, remarks = self._split_folder(root, split)
        other, _ = self._split_folder(root, "test" if split == "train" else "train")
        if folder is None:
            state = f"has no folder {' or '.join(NAMES[split])}" if root.is_dir() else "is not a folder"
            raise UserError(
                f"{root} {state}: data.path must contain train/CLASS/*.jpg and test/CLASS/*.jpg (or validation, valid, "
                "or val)"
            )
        images, rest = _files(folder)
        if not images:
            raise UserError(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}) in folders of classes{rest}")
        classes = self._wanted(folder)
        if empty := sorted(classes - {place for place, _ in images}):
            raise UserError(f"class folder {folder / empty[0]} has no images{rest}: fill or remove it")
        if other is not None and (differing := classes ^ self._wanted(other)):
            name = min(differing)
            here, there = (folder, other) if name in classes else (other, folder)
            raise UserError(
                f"the classes of {folder} and {other} differ in {len(differing)}: {name} is in {here} and not in "
                f"{there}; both need the same class folders"
            )
        images = [image for image in images if image[0] in classes]
        images.sort(key=lambda image: hashlib.sha256(b"/".join(map(os.fsencode, image))).digest())
        if rest:
            remarks.append(f"{folder}: {rest.removeprefix('; ')}")
        if other is not None and (same := _in_both(images, folder, other)):
            remarks.append(f"{len(same)} of {len(images)} images in {folder} are in {other} too, such as {same[0]}")
        names, remark = self._numbered(classes)
        number = {name: label for label, name in enumerate(names)}
        images = images[: self._count(split, len(images), folder)]
        labels = torch.tensor([number[place] for place, _ in images])
        if remark:
            remarks.append(f"{folder}: {remark}")
        opened = self.resized(_Images(folder, images), list(range(len(images))), labels, names, self.size)
        return opened.described(str(folder), remarks)

    def _split_folder(self, root: Path, split: SplitName) -> tuple[Path | None, list[str]]:
        """The folder of a split, None where there is none, and remarks about the choice."""
        there = [name for name in NAMES[split] if (root / name).is_dir()]
        if split == "train":
            return (root / there[0] if there else None), []
        name, remarks = chosen_split(root, there, self.test_split, lambda name: bool(_class_folders(root / name)))
        return (root / name if name else None), remarks

    def _numbered(self, classes: set[str]) -> tuple[tuple[str, ...], str]:
        """The classes by label, and a remark where the possible orders differ."""
        from timm.utils import natural_key

        orders = {"torchvision": sorted(classes)}
        orders["timm"] = sorted(orders["torchvision"], key=natural_key)
        if self.classes is not None and (self.class_order == "list" or not _built_in(self.classes).is_file()):
            orders["list"] = self._listed(self.classes)
        mine = orders.pop(self.class_order)
        different = {name: order for name, order in orders.items() if order != mine}
        if not different:
            return tuple(mine), ""
        place = next(i for i in range(len(mine)) if any(order[i] != mine[i] for order in different.values()))
        other = "; ".join(f"label {place} is {order[place]} in {name}'s" for name, order in different.items())
        return tuple(mine), (
            f"classes are numbered in {self.class_order}'s order, where label {place} is {mine[place]} ({other}): for "
            f"weights that were trained with another order set data.class_order={'|'.join(different)}"
        )

    def _wanted(self, folder: Path) -> set[str]:
        """The class folders to use in the folder of a split."""
        found = _class_folders(folder)
        if self.classes is None:
            return found
        wanted = set(self._listed(self.classes))
        if missing := sorted(wanted - found):
            raise UserError(
                f"data.classes: {self.classes} names {len(wanted)} class folders; {folder} lacks {len(missing)} of "
                f"them, such as {missing[0]}"
            )
        return wanted

    def _listed(self, classes: str) -> list[str]:
        """The class folders that a list names, in its order: one of ours, or a file."""
        built_in = _built_in(classes)
        file = built_in if built_in.is_file() else Path(os.path.expanduser(classes))
        if not os.path.isfile(file):
            raise UserError(f"data.classes: {classes} is neither imagenet100 nor a file of class folder names")
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"data.classes: {classes} cannot be read as text in UTF-8: {one_line(error)}") from None
        names = [name for line in lines if (name := line.strip())]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or not names:
            what = f"names {twice[0]} twice" if twice else "needs at least one name"
            raise UserError(f"data.classes: {classes} {what}")
        return names


@dataclass(frozen=True)
class _Images(Images):
    """Files to read, by their number."""

    folder: Path
    images: list[tuple[str, str]]
    """Class folder and file name of each."""

    def __getitem__(self, row: int) -> IO[bytes]:
        return open(self.filename(row), "rb")

    def filename(self, row: int) -> str:
        return str(self.folder.joinpath(*self.images[row]))


def _files(folder: Path) -> tuple[list[tuple[str, str]], str]:
    """The images in a folder of class folders, by class folder and file name, and how many files are not read, of which
    endings; empty where there are none.

    Raises:
        UserError: an image is elsewhere, where timm and torchvision would give it different labels.
    """
    images, rest, total = [], Counter[str](), 0
    for place, folders, names in os.walk(folder, followlinks=True):
        inside = Path(place).relative_to(folder).parts
        hidden = any(map(_hidden, inside))
        for name in names:
            total += 1
            ending = os.path.splitext(name)[1].lower()
            if hidden or _hidden(name):
                rest["hidden"] += 1
            elif ending not in IMG_EXTENSIONS:
                rest[ending or "without an ending"] += 1
            elif len(inside) != 1:
                raise UserError(f"{Path(place, name)} is not in {folder}/CLASS/: move or remove it")
            else:
                images.append((inside[0], name))
        folders[:] = [name for name in folders if not (hidden and os.path.islink(os.path.join(place, name)))]
    endings = ", ".join(f"{count} {ending}" for ending, count in rest.most_common())
    return images, f"; {rest.total()} of {total} files are not read: {endings}" if rest else ""


def _class_folders(folder: Path) -> set[str]:
    return {entry.name for entry in os.scandir(folder) if entry.is_dir() and not _hidden(entry.name)}


def _hidden(name: str) -> bool:
    """What systems and archives leave beside images."""
    return name.startswith(".") or name == "__MACOSX"


def _in_both(images: list[tuple[str, str]], folder: Path, other: Path) -> list[str]:
    """The images that are in another split too: of the same class, name and content."""
    classes: dict[str, list[str]] = {}
    for place, name in images:
        classes.setdefault(place, []).append(name)
    same = {
        place: filecmp.cmpfiles(folder / place, other / place, classes[place], shallow=False)[0] for place in classes
    }
    return [str(folder / place / name) for place, names in same.items() for name in names]


def _built_in(classes: str) -> Path:
    return Path(__file__).parent / f"{classes}.txt"
