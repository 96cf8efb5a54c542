"""Folders of image files, decoded on demand."""

from __future__ import annotations

import filecmp
import os
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator

from rome.core.errors import UserError
from rome.core.files import file_hash
from rome.data.base import NAMES, Split, SplitName, TestSplit, choose_split, one_line
from rome.data.listing import IMG_EXTENSIONS, Listing, class_folders, list_images
from rome.data.pixels import Images
from rome.data.resized import Resized

ROBUSTBENCH = "robustbench"
COMPARED = 10_000
"""How many images with the same names in train and test are compared by content."""


class ImageFolder(Resized):
    """Any folder of images, such as ImageNet: train/CLASS/*.jpg and test/CLASS/*.jpg (or validation, valid, val).

    Images are files with torchvision's extensions: .jpg, .jpeg, .png, .ppm, .bmp, .pgm, .tif, .tiff and .webp. Other
    and hidden files are counted in the split's remarks. The order of the examples mixes the classes and is the
    same everywhere (by a hash of CLASS/FILE), so that the first n are a fair sample. All images are brought to ``size``
    x ``size`` pixels, as described in :class:`~rome.data.resized.Resized`.
    """

    kind = "folder"
    path: str = Field(min_length=1)
    classes: str | None = None
    """Use only these class folders: ``imagenet100`` for the paper's 100 classes of ImageNet-1K (the list of Tian et
    al.'s CMC, github.com/HobbitLong/CMC; other lists called ImageNet-100 differ), or a text file with one folder name
    per line."""
    class_order: Literal["timm", "torchvision", "list"] = "timm"
    """How classes are numbered: by name with numbers by value (2 before 10), as in timm's reader; by name as text (10
    before 2), as in torchvision's ImageFolder; or in the order of ``classes``, like timm's ``class_map``."""
    test_split: TestSplit | None = None
    """Name of the test set; null: the first of test, validation, valid and val that exists with labels."""
    files: str | None = None
    """Test on these images only, in this order: a text file with one CLASS/FILE per line, or ``robustbench`` for the
    5,000 images of ImageNet's validation set on which RobustBench ranks models; their list comes with its package."""
    size: int = Field(224, ge=1)
    """Side of all images in pixels, after resizing."""

    @model_validator(mode="after")
    def _check_class_order(self) -> Self:
        if self.class_order == "list" and self.classes is None:
            raise ValueError("class_order=list needs a list: set classes")
        return self

    def form(self, classes: int | None = None) -> tuple[tuple[int, int, int], int]:
        known = classes if self.classes is None else len(self._class_list(self.classes))
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
        listing = list_images(folder)
        images, rest = _Images(folder, listing), listing.rest
        if listing.misplaced:
            raise UserError(f"{listing.misplaced} is not in {folder}/CLASS/: move or remove it")
        classes = self._class_names(folder)
        if not listing.folders:
            raise UserError(f"{folder} has no images ({', '.join(IMG_EXTENSIONS)}) in folders of classes{rest}")
        if empty := sorted(classes - {*listing.folders}):
            raise UserError(f"class folder {folder / empty[0]} has no images{rest}: fill or remove it")
        if other is not None and (differing := classes ^ self._class_names(other)):
            name = min(differing)
            here, there = (folder, other) if name in classes else (other, folder)
            raise UserError(
                f"the classes of {folder} and {other} differ in {len(differing)}: {name} is in {here} and not in "
                f"{there}; both need the same class folders"
            )
        names, remark = self._in_label_order(classes)
        number = {name: label for label, name in enumerate(names)}
        labels = np.array([number.get(name, -1) for name in listing.folders])[listing.places]
        rows = np.flatnonzero(labels >= 0)
        if self.files is not None and split == "test":
            rows, chosen = self._selected(images, labels)
            remarks.append(chosen)
        if rest:
            remarks.append(f"{folder}: {rest.removeprefix('; ')}")
        if other is not None and (same := _overlap(images, rows, _Images(other, list_images(other)))):
            remarks.append(same)
        rows = rows[: self._count(split, len(rows), folder)]
        if remark:
            remarks.append(f"{folder}: {remark}")
        opened = self.resized(images, rows, torch.from_numpy(labels[rows]), names, self.size)
        return opened.described(str(folder), remarks)

    def _selected(self, images: _Images, labels: np.ndarray) -> tuple[np.ndarray, str]:
        """Return the rows of the images that ``files`` lists, in its order, and a remark about the selection.

        Args:
            labels: labels of all images, negative for classes that are not used.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        file = _robustbench_list() if self.files == ROBUSTBENCH else Path(os.path.expanduser(self.files or ""))
        lines = _lines(file, f"data.files: {self.files}", "path")
        keys = [Path(line).as_posix().removeprefix(f"{images.folder.name}/") for line in lines]
        wanted = pa.array(map(os.fsencode, keys), pa.large_binary())
        found = pc.index_in(wanted, value_set=images.listing.keys())
        if found.null_count:
            first = keys[found.is_null().index(True).as_py()]
            raise UserError(
                f"data.files: {self.files} lists {len(keys)} images, one CLASS/FILE per line; {images.folder} lacks "
                f"{found.null_count} of them, such as {first}"
            )
        rows = found.to_numpy().astype(np.int64)
        used = rows[labels[rows] >= 0]
        if not len(used):
            raise UserError(f"data.files: {self.files} lists no image of the classes that are used")
        what = f"{len(used)} images" if len(used) == len(rows) else f"{len(used)} of {len(rows)} images (other classes)"
        listed_by = f"that {self.files} lists, in its order (sha256 {file_hash(file)})"
        return used, f"{images.folder}: only the {what} {listed_by}"

    def _split_folder(self, root: Path, split: SplitName) -> tuple[Path | None, list[str]]:
        """Return the folder of a split, None if there is none, and remarks about the choice."""
        existing = [name for name in NAMES[split] if (root / name).is_dir()]
        if split == "train":
            return (root / existing[0] if existing else None), []
        name, remarks = choose_split(root, existing, self.test_split, lambda name: bool(class_folders(root / name)))
        return (root / name if name else None), remarks

    def _in_label_order(self, classes: set[str]) -> tuple[tuple[str, ...], str]:
        """Return the classes in the order of their labels, and a remark if other orders number them differently."""
        from timm.utils import natural_key

        orders = {"torchvision": sorted(classes)}
        orders["timm"] = sorted(orders["torchvision"], key=natural_key)
        if self.classes is not None and (self.class_order == "list" or not _built_in_list(self.classes).is_file()):
            orders["list"] = self._class_list(self.classes)
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

    def _class_names(self, folder: Path) -> set[str]:
        """Return the class folders to use in the folder of a split."""
        found = class_folders(folder)
        if self.classes is None:
            return found
        wanted = set(self._class_list(self.classes))
        if missing := sorted(wanted - found):
            raise UserError(
                f"data.classes: {self.classes} names {len(wanted)} class folders; {folder} lacks {len(missing)} of "
                f"them, such as {missing[0]}"
            )
        return wanted

    def _class_list(self, classes: str) -> list[str]:
        """Return the class folders of a list, in its order: a list that comes with rome, or a file."""
        built_in = _built_in_list(classes)
        file = built_in if built_in.is_file() else Path(os.path.expanduser(classes))
        if not os.path.isfile(file):
            raise UserError(f"data.classes: {classes} is neither imagenet100 nor a file of class folder names")
        return _lines(file, f"data.classes: {classes}", "name")


@dataclass(frozen=True)
class _Images(Images):
    """The image files of a folder, by number."""

    folder: Path
    listing: Listing

    def filename(self, row: int) -> str:
        return str(self.folder.joinpath(*self.listing[row]))


def _overlap(here: _Images, rows: np.ndarray, there: _Images) -> str:
    """Return a remark about images that are in another split too, with the same class, name and content; or "".

    Of images with the same class and name, the first :data:`COMPARED` are compared.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    shared = pc.is_in(here.listing.keys().take(pa.array(rows)), value_set=there.listing.keys())
    alike = rows[shared.to_numpy(zero_copy_only=False)]
    pa.default_memory_pool().release_unused()
    compared = [here.filename(row) for row in alike[:COMPARED]]
    same = [name for name in compared if _same_content(name, there.folder / Path(name).relative_to(here.folder))]
    of = f"{len(rows)} images" if len(compared) == len(alike) else f"{len(compared)} compared images"
    return f"{len(same)} of {of} in {here.folder} are in {there.folder} too, such as {same[0]}" if same else ""


def _same_content(file: str, other: Path) -> bool:
    try:
        return filecmp.cmp(file, other, shallow=False)
    except OSError:
        return False


def _lines(file: Path, setting: str, what: str) -> list[str]:
    """Return the lines of a list, without empty ones.

    Args:
        setting: key and value of the setting, for messages.
        what: what each line contains, for messages.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{setting} cannot be read as text in UTF-8: {one_line(error)}") from None
    found = [name for line in lines if (name := line.strip())]
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice or not found:
        raise UserError(f"{setting} {f'names {twice[0]} twice' if twice else f'needs at least one {what}'}")
    return found


def _robustbench_list() -> Path:
    """Return the file in RobustBench's package that lists its 5,000 validation images."""
    package = find_spec("robustbench")
    places = [Path(place) for place in package.submodule_search_locations or ()] if package else []
    for place in places:
        if (file := place / "helper_files" / "imagenet_test_image_ids.txt").is_file():
            return file
    raise UserError(
        "data.files: robustbench: its list comes with the package robustbench (1.1 or later), which is not installed "
        "here: pip install --no-deps robustbench, or give a text file with one CLASS/FILE per line"
    )


def _built_in_list(classes: str) -> Path:
    return Path(__file__).parent / f"{classes}.txt"
