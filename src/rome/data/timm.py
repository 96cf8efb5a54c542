"""Data sets that timm's readers open, under timm's names."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from rome.core.errors import UserError
from rome.core.plain_data import parse_json
from rome.data.base import Split, SplitName, one_line
from rome.data.listing import Found, cached, class_folders, mix_classes
from rome.data.pixels import Images, eight_bits
from rome.data.resized import Resized

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = ("jpg", "jpeg", "png", "webp")
"""Extensions of the images in a WebDataset sample."""
STREAMS = ("hfids", "tfds")


class Timm(Resized):
    """Everything that timm's readers open: folders, tar files, WebDataset shards, data sets of the Hub, torchvision's.

    ``name`` is timm's name: empty for a folder with ``train/CLASS/*.jpg`` or with ``train.tar``; ``wds/NAME`` for
    WebDataset shards in ``path``; ``hfds/USER/NAME`` for a data set of the Hugging Face Hub (package ``datasets``),
    whose Arrow files are in its cache or under ``path``; ``torch/NAME`` for torchvision's (cifar100, mnist, imagenet,
    places365 ...). Every image is read by its number; the positions of images in tar files are looked up once and
    cached. ``hfids/`` and ``tfds/`` are streams and are refused. If classes are grouped, the examples are mixed by a
    hash of their numbers. All images are brought to ``size`` x ``size`` pixels, as described in
    :class:`~rome.data.resized.Resized`.
    """

    kind = "timm"
    name: str = ""
    """timm's name, such as ``hfds/uoft-cs/cifar100`` or ``torch/imagenet``; empty for a folder or tar files."""
    train_split: str = "train"
    """Name of the split in the reader; for ``wds/`` a name in ``_info.json`` or a pattern such as
    ``train-{0000..0127}.tar``."""
    test_split: str = "validation"
    """The same for the test set. timm also looks for a folder ``val``."""
    class_map: str | None = None
    """A text file with one class per line, in the order of their labels, like timm's ``--class-map``; not for ``wds/``
    and ``torch/``, whose labels are fixed."""
    download: bool = False
    """Let torchvision download missing files."""
    size: int = Field(224, ge=1)
    """Side of all images in pixels, after resizing."""

    def open(self, split: SplitName) -> Split:
        name = self.train_split if split == "train" else self.test_split
        what = self._describe(name)
        root = os.path.expanduser(self.path or "") or None
        if self.class_map is not None:
            if self.name.lower().startswith(("wds/", "torch/")):
                raise UserError(f"data.class_map does not apply to {self.name}, whose labels are fixed; leave it out")
            if not self.class_map.endswith(".txt") or not os.path.isfile(self.class_map):
                raise UserError(f"data.class_map: {self.class_map} is not a .txt file with one class per line")
        images, labels, classes = self._opened(name, root)
        if not len(labels):
            raise UserError(f"{what} has no images")
        if labels.min() < 0:
            raise UserError(f"{what}: label {labels.min()} is negative; does this test set have no labels?")
        most = max(int(labels.max()) + 1, len(classes))
        classes = classes if len(classes) == most else tuple(map(str, range(most)))
        rows = mix_classes(labels)
        rows = rows[: self._count(split, len(rows), what)]
        opened = self.resized(images, rows, torch.from_numpy(labels[rows]), classes, self.size)
        return opened.described(what)

    def _describe(self, split: str) -> str:
        return " ".join(filter(None, (self.name, self.path, f"({split})")))

    def _opened(self, split: str, root: str | None) -> tuple[Images, np.ndarray, tuple[str, ...]]:
        """Return the images, their labels, int64 (N,), and the class names if they are known."""
        prefix = self.name.partition("/")[0].lower() if "/" in self.name else ""
        if prefix in STREAMS:
            raise UserError(
                f"data.name: {self.name} is a stream, whose images cannot be read by number, as reproducible training "
                f"needs: use hfds/{self.name.partition('/')[2]}"
            )
        if prefix == "hfds" and find_spec("datasets") is None:
            raise UserError(f"data.name: {self.name} needs the package datasets: pip install datasets")
        if prefix not in ("hfds", "torch"):
            if root is None or not os.path.isdir(root):
                raise UserError(
                    f"data.path: {root} is not a folder; timm reads {self.name or 'folders and tar files'} there"
                )
            if prefix == "wds":
                return self._in_tars(_shards(root, split), _webdataset_members)
            if os.path.isfile(tar := os.path.join(root, f"{split}.tar")):
                return self._in_tars([tar], self._class_folder_members)
        return self._by_timm(prefix, split, root)

    def _by_timm(self, prefix: str, split: str, root: str | None) -> tuple[Images, np.ndarray, tuple[str, ...]]:
        from timm.data.dataset_factory import create_dataset
        from timm.data.readers.class_map import load_class_map

        # older versions of timm look up the numbers of a data set of the Hub in a class map, which has names
        mapped = {} if prefix == "hfds" else {"class_map": self.class_map}
        options = {"download": self.download} if prefix == "torch" else mapped
        try:
            data: Any = create_dataset(self.name, root=root, split=split, **options)
            if prefix == "torch":
                targets = getattr(data, "targets", None)
                labels = targets if targets is not None else [data[row][1] for row in range(len(data))]
                return _Decoded(data), np.asarray(labels, dtype=np.int64), tuple(map(str, getattr(data, "classes", ())))
            reader = data.reader
            known: dict[Any, int] = reader.class_to_idx or {}
            classes = tuple(map(str, sorted(known, key=lambda name: known[name])))
            if prefix == "hfds":
                targets = list(reader.dataset[reader.label_key])
                if self.class_map is not None:
                    named, numbers = dict(enumerate(classes)), load_class_map(self.class_map)  # type: ignore[no-untyped-call]
                    targets, classes = [numbers[named.get(each, each)] for each in targets], tuple(numbers)
                return _Read(reader), np.array(targets, dtype=np.int64), classes
        except Exception as error:  # assertions, labels missing from a class map, and errors of other packages
            raise UserError(f"{self._describe(split)}: timm cannot open it: {one_line(error)}") from None
        if os.path.samefile(reader.root, root or ""):  # timm reads the whole folder if it has no such split
            raise UserError(f"{root} has no folder {split}: name it with data.train_split and data.test_split")
        class_folders(reader.root)  # timm leaves out what it cannot read
        import pyarrow as pa

        names, targets = zip(*reader.samples, strict=True)
        return _Paths(pa.array(map(os.fsencode, names), pa.large_binary())), np.array(targets, dtype=np.int64), classes

    def _in_tars(
        self, tars: list[str], index: Callable[[list[str]], tuple[Sequence[Member], list[str]]]
    ) -> tuple[Images, np.ndarray, tuple[str, ...]]:
        """Return the images that ``index`` finds inside tar files, their labels and the class names."""
        import pyarrow as pa

        def index_tars() -> Found:
            times = {os.path.abspath(tar): os.stat(tar).st_mtime_ns for tar in tars}
            try:
                members, classes = index(tars)
            except Exception as error:  # timm's assertions too
                raise UserError(f"{tars[0]}: cannot be read: {one_line(error)}") from None
            table = np.array(members, dtype=np.int64).reshape(-1, 4)
            columns = dict(zip(("tar", "start", "size", "label"), table.T, strict=True))
            return pa.table(columns), {"times": times, "classes": classes}

        table, facts = cached(tars[0], index_tars, *tars[1:], str(self.class_map), index.__name__)
        tar, start, size, label = (column.to_numpy() for column in table.columns)
        return _Members(tuple(tars), tar, start, size), label, tuple(facts["classes"])

    def _class_folder_members(self, tars: list[str]) -> tuple[Sequence[Member], list[str]]:
        """Return the images that timm's reader finds in a tar of class folders, or of such tars, and the classes."""
        from timm.data.readers import reader_image_in_tar

        module: Any = reader_image_in_tar
        reader = module.ReaderImageInTar(tars[0], class_map=self.class_map or "", cache_tarinfo=False)
        members = [
            (0, member.offset_data + (outer.offset_data if outer is not None else 0), member.size, int(label))
            for (member, _, outer), label in zip(reader.samples, reader.targets, strict=True)
        ]
        return members, sorted(reader.class_name_to_idx, key=lambda name: reader.class_name_to_idx[name])


Member = tuple[int, int, int, int]
"""An image in a tar file: number of the tar file, offset in bytes, size in bytes, label."""


def _webdataset_members(tars: list[str]) -> tuple[Sequence[Member], list[str]]:
    """Return the images in WebDataset shards, without class names.

    Members whose names agree up to the first dot are one sample, with its label in ``cls``.

    Raises:
        ValueError: a sample has no label, or one that is not a number.
    """
    members = []
    for number, path in enumerate(tars):
        images, labels = dict[str, tuple[int, int]](), dict[str, int]()
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                folder, _, file = member.name.rpartition("/")
                name, _, ending = file.partition(".")
                sample, ending = f"{folder}/{name}", ending.lower()
                if ending in IMAGES:
                    images[sample] = member.offset_data, member.size
                elif ending == "cls" and (content := tar.extractfile(member)):
                    labels[sample] = int(content.read())
        if lacking := images.keys() - labels.keys():
            raise ValueError(f"{min(lacking)} in {path} has no label (.cls)")
        members += [(number, *place, labels[sample]) for sample, place in images.items()]
    return members, []


def _shards(root: str, split: str) -> list[str]:
    """Return the shards of a split, named in WebDataset's ``_info.json`` or by a pattern.

    Raises:
        UserError: there are no names, or shards are missing.
    """
    files: list[str] = []
    if split.endswith(".tar"):
        files = [split]
        if parts := re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", split):
            before, first, last, after = parts.groups()
            files = [f"{before}{number:0{len(first)}}{after}" for number in range(int(first), int(last) + 1)]
    else:
        for info in (Path(root, "_info.json"), Path(root, "info.json")):
            if info.is_file():
                try:
                    files = [str(name) for name in parse_json(info.read_bytes())["splits"][split]["filenames"]]
                except (ValueError, KeyError, TypeError):
                    raise UserError(f"{info} lists no files for a split {split}") from None
                break
    paths = [os.path.join(root, file) for file in files]
    if not paths or (missing := [path for path in paths if not os.path.isfile(path)]):
        lacks = f"lacks {len(missing)} of {len(paths)} shards, such as {missing[0]}" if paths else "has no _info.json"
        raise UserError(
            f"{root} {lacks}: data.train_split and data.test_split name a split of _info.json, or shards: "
            "train-{0000..0127}.tar"
        )
    return paths


@dataclass(frozen=True)
class _Paths(Images):
    names: pa.Array
    """File names, as bytes."""

    def filename(self, row: int) -> str:
        return os.fsdecode(self.names[row].as_py())


@dataclass(frozen=True)
class _Members(Images):
    """Members of tar files. The file is opened for each read, because processes would share its position."""

    tars: tuple[str, ...]
    tar: np.ndarray
    start: np.ndarray
    size: np.ndarray

    def __getitem__(self, row: int) -> IO[bytes]:
        with open(self.tars[self.tar[row]], "rb") as file:
            file.seek(self.start[row])
            return io.BytesIO(file.read(self.size[row]))

    def filename(self, row: int) -> str:
        return f"{self.tars[self.tar[row]]}: byte {self.start[row]}"


@dataclass(frozen=True)
class _Read(Images):
    reader: Any
    """A reader of timm with random access."""

    def __getitem__(self, row: int) -> IO[bytes]:
        file: IO[bytes] = self.reader[int(row)][0]
        return file

    def filename(self, row: int) -> str:
        return f"example {row}"


@dataclass(frozen=True)
class _Decoded(Images):
    data: Any
    """A data set of torchvision: (decoded image, label) by number."""

    def picture(self, row: int) -> Image.Image:
        try:
            image: Image.Image = self.data[int(row)][0]
        except Exception as error:  # Pillow raises almost any exception for a broken file
            raise UserError(f"{self.filename(row)} cannot be read: {one_line(error)}") from None
        return eight_bits(image).convert("RGB")

    def filename(self, row: int) -> str:
        return f"example {row} of {type(self.data).__name__}"
