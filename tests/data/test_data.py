"""Data: the same example is the same image whoever reads it, and broken files are named."""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import random
from contextlib import suppress
from hashlib import md5
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from pydantic import ValidationError
from sklearn.datasets import load_digits
from timm.data.config import resolve_data_config
from timm.data.dataset_factory import create_dataset
from timm.data.loader import create_loader
from timm.data.transforms_factory import create_transform
from timm.models import get_pretrained_cfg
from torch import Tensor
from torchvision import datasets as torchvision_datasets

from rome.core.component import Settings
from rome.core.errors import UserError
from rome.data import CIFAR10_CLASSES, Cifar10, Data, Digits, ImageFolder, Parquet, Split, tables
from rome.data.base import Pixels
from rome.data.pixels import eight_bits
from rome.data.resized import Resized
from rome.data.timm import Timm
from rome.evaluation.named import named_data, preprocessing
from rome.report.explore import read_upload


def png(pixels: np.ndarray[Any, Any], format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format)
    return buffer.getvalue()


def noise(n: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def write_parquet(file: Path, images: list[bytes | None], labels: list[Any], column: str = "img", **extra: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": image, "path": None} for image in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({column: pa.array(rows, kind), "label": extra.get("label_array", pa.array(labels))})
    pq.write_table(table.replace_schema_metadata(extra.get("metadata")), file)


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """40 training and 8 test images of noise, as PNG."""
    for split, n, seed in (("train", 40, 0), ("test", 8, 1)):
        images = [png(pixels) for pixels in noise(n, seed=seed)]
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", images, [i % 10 for i in range(n)])
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of PNGs of 20x14 pixels: 4 each to train, 2 each to validate."""
    root = tmp_path / "images"
    for split, n in (("train", 4), ("val", 2)):
        for label, name in enumerate(("cat", "dog", "eel")):
            (root / split / name).mkdir(parents=True)
            for i, pixels in enumerate(noise(n, 14, 20, seed=label + 10 * n)):
                (root / split / name / f"{i}.png").write_bytes(png(pixels))
    return root


@pytest.fixture(params=["digits", "cifar10", "parquet", "parquet-resized", "folder"])
def data(request: pytest.FixtureRequest) -> Data:
    if request.param == "digits":
        return Digits(augment=True)
    path = str(request.getfixturevalue("folder" if request.param == "folder" else "parquet"))
    if request.param == "cifar10":
        return Cifar10(path=path)
    if request.param == "parquet":
        return Parquet(path=path)
    return (ImageFolder if request.param == "folder" else Parquet)(path=path, size=8, scale=(0.3, 1))


def in_order(split: Split, *order: list[int], **options: Any) -> tuple[Tensor, Tensor]:
    batches = list(split.batches([torch.tensor(batch, dtype=torch.int64) for batch in order], **options))
    assert [len(x) for x, _ in batches] == [len(batch) for batch in order]
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# every kind ---------------------------------------------------------------------------------------------------------


def test_images_are_contiguous_floats_in_the_unit_box_and_labels_match(data: Data) -> None:
    split = data.open("train")
    for seed in (None, 3):
        x, y = next(iter(split.batches([torch.tensor([5, 0, 5])], augment_seed=seed)))
        assert x.shape == (3, *split.shape)
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert 0 <= x.min() < x.max() <= 1
        assert x.max() > 0.5  # not 255 times too dark
        assert torch.equal(y, split.labels[[5, 0, 5]])
        assert torch.equal(x[0], x[2])
    assert y.dtype == split.labels.dtype == torch.int64
    assert split.labels.max() < len(split.classes)
    assert len(split.mean) == len(split.std) == split.shape[0]


def test_augmentation_depends_on_seed_and_example_number_only(data: Data) -> None:
    split = data.open("train")
    x, _ = in_order(split, [0, 1, 2, 3, 4, 5, 6, 7], augment_seed=1)
    shuffled, _ = in_order(split, [7, 2], [5], [], [0, 1, 3, 4, 6], augment_seed=1)
    assert torch.equal(shuffled, x[[7, 2, 5, 0, 1, 3, 4, 6]])
    torch.manual_seed(99)
    random.seed(99)
    again, _ = in_order(data.open("train"), [3], augment_seed=1)
    assert torch.equal(again[0], x[3])
    other, _ = in_order(split, [0, 1, 2, 3, 4, 5, 6, 7], augment_seed=2)
    plain, _ = split.first(8)
    assert sum(not torch.equal(a, b) for a, b in zip(x, other, strict=True)) > 4
    assert sum(not torch.equal(a, b) for a, b in zip(x, plain, strict=True)) > 4


def test_augmentation_of_an_example_is_the_same_under_a_limit(data: Data) -> None:
    whole, _ = in_order(data.open("train"), [0, 1, 2], augment_seed=1)
    part, _ = in_order(data.model_copy(update={"train_limit": 3}).open("train"), [0, 1, 2], augment_seed=1)
    assert torch.equal(whole, part)


def test_augment_false_leaves_images_alone(data: Data) -> None:
    split = data.model_copy(update={"augment": False}).open("train")
    assert torch.equal(in_order(split, [0, 1, 2, 3], augment_seed=1)[0], split.first(4)[0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_global_random_state_is_untouched(data: Data, workers: int) -> None:
    if workers and not isinstance(data, Resized):
        pytest.skip("data in memory has no workers")

    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = state()
    split = data.open("train")
    for _ in split.batches([torch.tensor([0, 1]), torch.tensor([2])], augment_seed=7, workers=workers):
        assert state() == before
    split.first(2)
    assert state() == before


def test_limits_keep_the_first_examples(data: Data) -> None:
    limited = data.model_copy(update={"train_limit": 5, "test_limit": 2})
    for name, n in (("train", 5), ("test", 2)):
        part, whole = limited.open(name), data.open(name)
        assert len(part) == n
        assert all(torch.equal(a, b) for a, b in zip(part.first(n), whole.first(n), strict=True))


def test_a_limit_beyond_the_split_says_how_many_there_are(data: Data) -> None:
    n = len(data.open("test"))
    with pytest.raises(UserError, match=rf"test_limit=5000 .* {n} examples"):
        data.model_copy(update={"test_limit": 5000}).open("test")


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.tensor([0, -1]), "no example -1: this split has"),
        (torch.tensor([10**6]), "no example 1000000: this split has"),
        (torch.tensor([0.0]), "batch 1 .* int64 .*float32"),
        (torch.tensor([True]), "batch 1 .* int64 .*bool"),
        (torch.tensor(3), r"batch 1 .* int64 tensor \(B,\)"),
    ],
)
def test_wrong_indices_are_refused_before_anything_is_read(data: Data, batch: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.open("test").batches([torch.tensor([0]), batch])


def test_first_refuses_more_than_there_are(data: Data) -> None:
    split = data.open("test")
    with pytest.raises(UserError, match=f"this split has {len(split)}"):
        split.first(len(split) + 1)
    assert split.first(0)[0].shape == (0, *split.shape)
    assert list(split.batches([])) == []


def test_stored_images_are_bytes_that_give_the_same_floats(data: Data) -> None:
    split = data.open("test")
    x, y = split.first(len(split))
    for n, workers in ((3, 0), (10**6, 0), (3, 2 if isinstance(data, Resized) else 0)):
        images, labels = split.stored(n, workers=workers)
        assert isinstance(images, Pixels)
        assert images.values.dtype == torch.uint8
        assert images.shape == x[:n].shape
        assert torch.equal(images[torch.tensor([2, 0])], x[[2, 0]])
        assert torch.equal(images[:], x[:n])
        assert torch.equal(labels, y[:n])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_on_a_gpu_are_those_on_the_cpu(data: Data) -> None:
    split = data.open("train")
    for seed in (None, 5):
        x, y = in_order(split, [3, 1], [0], augment_seed=seed)
        x_gpu, y_gpu = in_order(split, [3, 1], [0], augment_seed=seed, device="cuda")
        assert x_gpu.is_cuda
        assert y_gpu.is_cuda
        torch.testing.assert_close(x_gpu.cpu(), x, rtol=0, atol=1e-7)
        assert torch.equal(y_gpu.cpu(), y)


def test_kinds_are_found_by_name_and_have_one_sentence() -> None:
    class Config(Settings):
        data: Data

    assert Config.model_validate({"data": "digits"}).data == Digits()
    assert Config.model_validate({"data": {"kind": "cifar10", "path": "x"}}).data == Cifar10(path="x")
    assert set(Data.members()) >= {"cifar10", "digits", "folder"}
    assert all(kind.summary().endswith(".") for kind in Data.members().values())
    with pytest.raises(ValidationError, match="Did you mean 'cifar10'"):
        Config.model_validate({"data": "cifar"})


# digits -------------------------------------------------------------------------------------------------------------


def test_digits_are_split_once_and_for_all() -> None:
    train, test = Digits().open("train"), Digits().open("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.shape == (1, 8, 8)
    rows = torch.cat([train.first(1437)[0], test.first(360)[0]]).flatten(1)
    assert len(rows.unique(dim=0)) == 1797  # no two digits are equal, so none is in both
    share = train.labels.bincount() / torch.cat([train.labels, test.labels]).bincount()
    torch.testing.assert_close(share, torch.full((10,), 0.8), rtol=0, atol=0.01)
    assert train.labels[:10].tolist() == [3, 9, 1, 3, 1, 9, 4, 4, 2, 8]
    torch.testing.assert_close(rows.mean(), torch.tensor(train.mean[0]), rtol=0, atol=1e-3)
    torch.testing.assert_close(rows.std(), torch.tensor(train.std[0]), rtol=0, atol=1e-3)


def test_digits_have_the_labels_of_scikit_learn() -> None:
    known = load_digits()
    label = {image.tobytes(): int(target) for image, target in zip(known.images, known.target, strict=True)}
    for name in ("train", "test"):
        split = Digits().open(name)  # type: ignore[arg-type]
        x, y = split.first(len(split))
        assert [label[image.tobytes()] for image in (16 * x[:, 0]).double().numpy()] == y.tolist()
        assert [split.classes[k] for k in y] == [str(int(k)) for k in y]


def test_digits_are_not_augmented_unless_asked() -> None:
    split = Digits().open("train")
    assert torch.equal(in_order(split, [0, 1], augment_seed=1)[0], split.first(2)[0])


def test_digits_take_no_path() -> None:
    with pytest.raises(ValidationError, match="path"):
        Digits.model_validate({"path": "somewhere"})


def crops(image: Tensor, pad: int, flip: bool) -> dict[tuple[int, int, bool], Tensor]:
    """Every crop of the zero-padded image (C, H, W), by row, column and mirrored."""
    _, height, width = image.shape
    padded = torch.zeros(len(image), height + 2 * pad, width + 2 * pad)
    padded[:, pad : pad + height, pad : pad + width] = image
    found = {}
    for row in range(2 * pad + 1):
        for column in range(2 * pad + 1):
            crop = padded[:, row : row + height, column : column + width]
            found[row, column, False] = crop
            if flip:
                found[row, column, True] = crop.flip(2)
    return found


@pytest.mark.parametrize(("name", "pad", "flip"), [("digits", 1, False), ("cifar10", 4, True)])
def test_augmented_images_are_crops_of_the_padded_image(name: str, pad: int, flip: bool, parquet: Path) -> None:
    split = (Digits(augment=True) if name == "digits" else Cifar10(path=str(parquet))).open("train")
    x, _ = split.first(40)
    seen = []
    for seed in range(4):
        augmented, _ = in_order(split, list(range(40)), augment_seed=seed)
        for plain, image in zip(x, augmented, strict=True):
            matches = [key for key, crop in crops(plain, pad, flip).items() if torch.equal(crop, image)]
            assert matches
            seen.append(matches[0])
    for axis in (0, 1):  # every shift occurs, and mirroring about half of the time
        assert {key[axis] for key in seen} == set(range(2 * pad + 1))
    mirrored = sum(key[2] for key in seen) / len(seen)
    assert 0.35 < mirrored < 0.65 if flip else mirrored == 0


# CIFAR-10 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("where", "column"), [(".", "img"), (".", "image"), ("plain_text", "img")])
def test_parquet_images_come_back_exactly(tmp_path: Path, where: str, column: str) -> None:
    pixels = noise(4)
    write_parquet(tmp_path / where / "test-00000-of-00001.parquet", [png(p) for p in pixels], [9, 0, 3, 4], column)
    x, y = Cifar10(path=str(tmp_path)).open("test").first(4)
    assert torch.equal(x, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    assert y.tolist() == [9, 0, 3, 4]


def test_parquet_may_hold_jpeg_and_come_in_shards(tmp_path: Path) -> None:
    smooth = np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
    for shard, label in ((0, 1), (1, 2)):
        file = tmp_path / f"train-{shard:05}-of-00002.parquet"
        write_parquet(file, [png(smooth, "JPEG")], [label])
    x, y = Cifar10(path=str(tmp_path)).open("train").first(2)
    torch.testing.assert_close(x[0], torch.from_numpy(smooth).permute(2, 0, 1) / 255, rtol=0, atol=0.05)
    assert y.tolist() == [1, 2]
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"has 1 files train-.* a complete set has 2"):
        Cifar10(path=str(tmp_path)).open("train")


def test_one_parquet_file_or_its_folder_may_be_given(tmp_path: Path) -> None:
    write_parquet(tmp_path / "test.parquet", [png(noise(1)[0])], [7])
    for path in (tmp_path, tmp_path / "test.parquet"):
        assert Cifar10(path=str(path)).open("test").labels.tolist() == [7]


def test_the_parquet_file_that_is_named_is_the_one_that_is_read(tmp_path: Path) -> None:
    names = {"huggingface": json.dumps({"info": {"features": {"label": {"names": CIFAR10_CLASSES}}}})}
    write_parquet(tmp_path / "hard.parquet", [png(noise(1)[0])], [3], metadata=names)
    data = named_data(str(tmp_path / "hard.parquet"))
    assert isinstance(data, Cifar10)
    assert data.open("test").labels.tolist() == [3], "it has no neighbours"
    for split, label in (("train", 5), ("test", 7)):
        write_parquet(tmp_path / f"{split}-00000-of-00001.parquet", [png(noise(1)[0])], [label], metadata=names)
    (tmp_path / "cifar-10-batches-py").mkdir()
    assert data.open("test").labels.tolist() == [3], "whatever lies beside it"
    (tmp_path / "cifar-10-batches-py").rmdir()
    assert data.open("train").labels.tolist() == [5]
    assert Cifar10(path=str(tmp_path)).open("test").labels.tolist() == [7]


GOOD = png(noise(1)[0])


@pytest.mark.parametrize(
    ("images", "labels", "extra", "message"),
    [
        ([GOOD, GOOD[:600]], [0, 1], {}, r"test\.parquet: row 1: cannot be read as an image"),
        ([GOOD, png(noise(1)[0], "JPEG")[:600]], [0, 1], {}, r"test\.parquet: row 1: cannot be read as an image"),
        ([GOOD, b"nonsense"], [0, 1], {}, r"test\.parquet: row 1: cannot be read as an image"),
        ([GOOD, b""], [0, 1], {}, r"row 1: cannot be read as an image \(no known format\)"),
        ([GOOD, None], [0, 1], {}, r"row 1: cannot be read as an image \(no known format\)"),
        (
            [GOOD, png(noise(1, 28, 30)[0])],
            [0, 1],
            {},
            r"row 1 is an image of 30x28 pixels, not 32x32: is this another data",
        ),
        ([GOOD, GOOD], [0, 10], {}, r"test\.parquet: row 1 has the label 10"),
        ([GOOD, GOOD], [0, -1], {}, r"row 1 has the label -1"),
        (
            [GOOD, GOOD],
            [-1, -1],
            {},
            r"test\.parquet: its labels are withheld \(all are -1\).*validation-\*\.parquet",
        ),
        ([GOOD, GOOD], [0, None], {}, r"row 1 has the label None"),
        ([GOOD, GOOD], [0.0, 1.0], {}, r"column label is double"),
        ([GOOD, GOOD], ["cat", "dog"], {}, r"column label is string"),
        ([], [], {"label_array": pa.array([], pa.int64())}, r"has no rows"),
        ([GOOD], [0], {"column": "picture"}, r"has the columns picture, label; needed are a column img or image"),
        (
            [GOOD],
            [0],
            {"metadata": {"huggingface": '{"info": {"features": {"label": {"names": ["0", "1", "2"]}}}}'}},
            r"its classes are 0, 1, 2\.\.\., so it is another data set",
        ),
    ],
)
def test_what_is_wrong_inside_a_parquet_file_is_named(
    tmp_path: Path, images: list[bytes | None], labels: list[Any], extra: dict[str, Any], message: str
) -> None:
    write_parquet(tmp_path / "test.parquet", images, labels, **extra)
    with pytest.raises(UserError, match=message) as caught:
        Cifar10(path=str(tmp_path)).open("test")
    assert "\n" not in str(caught.value)


def test_parquet_columns_of_the_wrong_type_are_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [[1, 2]], "label": [1]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="column img is list"):
        Cifar10(path=str(tmp_path)).open("test")
    pq.write_table(pa.table({"img": [[1, 2]], "fine_label": [1]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="has the columns img, fine_label"):
        Cifar10(path=str(tmp_path)).open("test")


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_a_truncated_parquet_file_is_named(parquet: Path, keep: float) -> None:
    file = parquet / "test-00000-of-00001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(UserError, match=r"test-00000-of-00001\.parquet: not a readable Parquet file"):
        Cifar10(path=str(parquet)).open("test")


def test_bytes_changed_inside_a_parquet_file_raise_no_other_error(parquet: Path) -> None:
    file = parquet / "test-00000-of-00001.parquet"
    whole = file.read_bytes()
    for start in range(0, len(whole) - 40, len(whole) // 40):
        file.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])
        with suppress(UserError):
            Cifar10(path=str(parquet)).open("test")


@pytest.mark.parametrize("exists", [True, False])
def test_a_path_without_cifar10_says_what_is_expected(tmp_path: Path, exists: bool) -> None:
    path = tmp_path if exists else tmp_path / "missing"
    with pytest.raises(UserError, match=r"cifar-10-batches-py .*train-\*\.parquet.*data\.download=true") as caught:
        Cifar10(path=str(path)).open("train")
    assert str(path) in str(caught.value)
    assert ("is not a folder" in str(caught.value)) != exists


@pytest.fixture
def batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torchvision's layout with 3 images a file, and torchvision made to expect these files."""
    (tmp_path / "cifar-10-batches-py").mkdir()

    def write(name: str, content: dict[str, Any]) -> list[str]:
        data = pickle.dumps(content)
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(data)
        return [name, md5(data).hexdigest()]

    def batch(seed: int) -> dict[str, Any]:
        return {"data": noise(3, seed=seed).transpose(0, 3, 1, 2).reshape(3, -1), "labels": [seed, 0, 9]}

    meta = write("batches.meta", {"label_names": list(CIFAR10_CLASSES)})
    monkeypatch.setattr(
        torchvision_datasets.CIFAR10, "train_list", [write(f"data_batch_{i}", batch(i)) for i in range(1, 6)]
    )
    monkeypatch.setattr(torchvision_datasets.CIFAR10, "test_list", [write("test_batch", batch(6))])
    monkeypatch.setattr(
        torchvision_datasets.CIFAR10, "meta", {"filename": meta[0], "md5": meta[1], "key": "label_names"}
    )
    return tmp_path


def test_torchvision_files_come_back_exactly(batches: Path) -> None:
    for path in (batches, batches / "cifar-10-batches-py"):
        train = Cifar10(path=str(path), test_limit=2)
        assert len(train.open("train")) == 15
        x, y = train.open("test").first(2)
        assert torch.equal(x, torch.from_numpy(noise(3, seed=6)[:2]).permute(0, 3, 1, 2) / 255)
        assert y.tolist() == [6, 0]


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_broken_torchvision_files_are_named_and_never_unpickled(batches: Path, name: str) -> None:
    class Harm:
        def __reduce__(self) -> Any:
            return pytest.fail, ("unpickled a file with the wrong checksum",)

    file = batches / "cifar-10-batches-py" / name
    file.write_bytes(pickle.dumps(Harm()))
    with pytest.raises(UserError, match=rf"{name} differs from the original .*data\.download=true"):
        Cifar10(path=str(batches)).open("train")
    file.unlink()
    with pytest.raises(UserError, match=rf"{name} is missing: set data\.download=true"):
        Cifar10(path=str(batches)).open("train")


def test_a_failed_download_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(self: torchvision_datasets.CIFAR10) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision_datasets.CIFAR10, "download", offline)
    with pytest.raises(UserError, match=r"data_batch_1 is missing: the download failed \(no route to host\)"):
        Cifar10(path=str(tmp_path), download=True).open("train")


# Parquet files of any data set ------------------------------------------------------------------------------------


def hub(*names: str, label: str = "label") -> dict[str, Any]:
    """What the Hub writes into a file: the names of the classes."""
    return {"metadata": {"huggingface": json.dumps({"info": {"features": {label: {"names": names}}}})}}


def test_parquet_images_of_one_size_stay_as_they_are(tmp_path: Path) -> None:
    pixels = noise(3, 12, 16)
    file = tmp_path / "data" / "validation-00000-of-00001.parquet"
    write_parquet(file, [png(p) for p in pixels], [2, 0, 1], "image", **hub("ant", "bee", "cow"))
    split = Parquet(path=str(tmp_path)).open("test")
    x, y = split.first(3)
    assert torch.equal(x, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
    assert (y.tolist(), split.classes, split.shape) == ([2, 0, 1], ("ant", "bee", "cow"), (3, 12, 16))


def test_gray_images_become_colour(tmp_path: Path) -> None:
    pixels = noise(1)[0, :, :, 0]
    write_parquet(tmp_path / "test.parquet", [png(pixels)], [0])
    x, _ = Parquet(path=str(tmp_path)).open("test").first(1)
    assert torch.equal(x, (torch.from_numpy(pixels) / 255).expand(1, 3, 32, 32))


def test_parquet_without_names_counts_the_classes_of_both_splits(parquet: Path) -> None:
    write_parquet(parquet / "test-00000-of-00001.parquet", [png(noise(1)[0])], [3])
    for split in ("train", "test"):
        assert len(Parquet(path=str(parquet)).open(split).classes) == 10


def test_train_and_test_must_name_the_same_classes(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [GOOD], [1], **hub("ant", "bee"))
    write_parquet(tmp_path / "test.parquet", [GOOD], [1], **hub("bee", "ant"))
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"differ in the names of their classes \(2 and 2\)"):
            Parquet(path=str(tmp_path)).open(split)


def test_a_table_sorted_by_class_is_mixed_and_another_is_not(tmp_path: Path) -> None:
    images = [png(p) for p in noise(40, 8, 8)]
    labels = [i // 10 for i in range(40)]
    write_parquet(tmp_path / "test.parquet", images, labels)
    data = Parquet(path=str(tmp_path))
    first = data.open("test")
    assert len(set(first.labels[:10].tolist())) > 2  # a fair sample
    assert sorted(first.labels.tolist()) == labels
    assert torch.equal(first.labels, data.open("test").labels)
    few = data.model_copy(update={"test_limit": 7}).open("test")
    assert torch.equal(few.first(7)[0], first.first(7)[0])
    write_parquet(tmp_path / "test.parquet", images, [3 - label for label in labels])
    assert len(set(data.open("test").labels[:10].tolist())) > 2
    for pieces in ([*labels[1:], 0], [i // 5 % 4 for i in range(40)]):  # sorted but for one, and twice over
        write_parquet(tmp_path / "test.parquet", images, pieces)
        assert len(set(data.open("test").labels[:10].tolist())) > 2
    unsorted = [i * 7 % 4 for i in range(40)]
    write_parquet(tmp_path / "test.parquet", images, unsorted)
    assert data.open("test").labels.tolist() == unsorted


def test_the_column_of_labels_may_be_named(tmp_path: Path) -> None:
    rows = [{"bytes": png(noise(1)[0]), "path": None}] * 2
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"img": pa.array(rows, kind), "fine_label": [7, 3], "coarse_label": [1, 0]})
    names = [str(i) for i in range(100)]
    pq.write_table(
        table.replace_schema_metadata(hub(*names, label="fine_label")["metadata"]), tmp_path / "test.parquet"
    )
    split = Parquet(path=str(tmp_path), label="fine_label").open("test")
    assert (split.labels.tolist(), len(split.classes)) == ([7, 3], 100)
    with pytest.raises(UserError, match=r"has the columns img, fine_label, coarse_label; .*data\.label"):
        Parquet(path=str(tmp_path)).open("test")


def test_images_of_several_sizes_are_resized_or_refused(tmp_path: Path) -> None:
    wide, high = np.full((20, 40, 3), 255, np.uint8), np.zeros((30, 10, 3), np.uint8)
    wide[:, :10] = wide[:, 30:] = 0  # white where the centre is
    write_parquet(tmp_path / "test.parquet", [png(wide), png(high)], [1, 0])
    x, y = Parquet(path=str(tmp_path), size=10, crop_pct=1).open("test").first(2)
    assert x.shape == (2, 3, 10, 10)
    assert (x[0].mean() > 0.95, x[1].max() == 0, y.tolist()) == (True, True, [1, 0])
    with pytest.raises(UserError, match=r"row 1 is an image of 10x30 pixels, not 40x20.*data\.size=PIXELS"):
        Parquet(path=str(tmp_path)).open("test")


def test_a_resized_parquet_image_equals_that_of_a_folder(folder: Path, tmp_path: Path) -> None:
    files = sorted((folder / "train").glob("*/*.png"))
    labels = [("cat", "dog", "eel").index(file.parent.name) for file in files]
    turned = [*range(1, 12), 0]  # a table that is not sorted by class keeps its order
    images = [files[i].read_bytes() for i in turned]
    write_parquet(tmp_path / "tables" / "train.parquet", images, [labels[i] for i in turned])
    tables = Parquet(path=str(tmp_path / "tables"), size=8).open("train")
    files_too = ImageFolder(path=str(folder), size=8).open("train")
    ours, theirs = tables.first(12)[0], files_too.first(12)[0]
    assert {image.numpy().tobytes() for image in ours} == {image.numpy().tobytes() for image in theirs}


def test_a_large_table_is_read_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, n in (("train", 7), ("test", 3)):
        rows = [{"bytes": png(pixels), "path": None} for pixels in noise(n, seed=n)]
        table = pa.table({"img": pa.array(rows), "label": [i % 3 for i in range(n)]})
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
    held = Parquet(path=str(tmp_path)).open("train").first(7)[0]
    resized = Parquet(path=str(tmp_path), size=32, crop_pct=1)
    assert not resized.open("train").remarks
    monkeypatch.setattr(tables, "HELD", 0)
    table = tables.read_tables([tmp_path / "train.parquet", tmp_path / "test.parquet"])
    for row in (4, 0, 6, 1, 5):
        assert torch.equal(torch.from_numpy(np.array(table.picture(row))).permute(2, 0, 1) / 255, held[row])
        assert len(table.held) == 1
    assert (table.filename(6), table.filename(9)) == tuple(
        f"{tmp_path}/{name}.parquet: row {row}" for name, row in (("train", 6), ("test", 2))
    )
    split = resized.open("train")
    assert torch.equal(split.first(7)[0], held)
    assert any("row groups of up to 2" in remark for remark in split.remarks)
    assert torch.equal(Parquet(path=str(tmp_path)).open("train").first(7)[0], held)


def test_broken_images_are_named_by_file_and_row(tmp_path: Path) -> None:
    for shard, images in enumerate(([GOOD], [GOOD, b"nonsense"])):
        write_parquet(tmp_path / f"test-{shard:05}-of-00002.parquet", images, [1, 0][: len(images)])
    with pytest.raises(UserError, match=r"test-00001-of-00002\.parquet: row 1: cannot be read as an image"):
        Parquet(path=str(tmp_path)).open("test")
    with pytest.raises(UserError, match=r"test-00001-of-00002\.parquet: row 1: cannot be read as an image"):
        Parquet(path=str(tmp_path), size=8).open("test").first(3)


def piece(root: Path, name: str, seed: int, n: int = 4) -> Path:
    file = root / name
    write_parquet(file, [png(p) for p in noise(n, 8, 8, seed=seed)], [i % 2 for i in range(n)], **hub("ant", "bee"))
    return file


@pytest.mark.parametrize("end", ["", "-8c7f4b3bb3e6b7f6"])
def test_pieces_that_are_missing_or_there_twice_are_named(tmp_path: Path, end: str) -> None:
    def opened() -> Split:
        return Parquet(path=str(tmp_path)).open("test")

    first = piece(tmp_path, f"test-00000-of-00002{end}.parquet", 0)
    with pytest.raises(UserError, match=r"has 1 files test-\*-of-00002"):
        opened()
    second = piece(tmp_path, f"test-00001-of-00002{end}.parquet", 1)
    assert (len(opened()), opened().remarks, opened().source) == (8, (), f"{first} and 1 more")
    for name in ("test.parquet", "test-00000-of-00002-1b2c.parquet", "test-00000-of-00003.parquet"):
        more = piece(tmp_path, name, 2)
        with pytest.raises(UserError, match=r"has 3 files test-.* a complete set has 2"):
            opened()
        more.unlink()
    second.write_bytes(first.read_bytes())
    with pytest.raises(UserError, match=r"00000-of.* and .*00001-of.* have the same content"):
        opened()


def test_images_that_are_there_twice_are_said(tmp_path: Path) -> None:
    piece(tmp_path, "test.parquet", 0)
    again = piece(tmp_path, "test-again.parquet", 0, 5)  # not byte for byte
    (remark,) = Parquet(path=str(tmp_path)).open("test").remarks
    assert remark == f"{tmp_path}: 4 of 9 images repeat another one: is a file there twice?"
    again.rename(tmp_path / "train.parquet")
    assert not Parquet(path=str(tmp_path)).open("test").remarks
    (tmp_path / "train.parquet").write_bytes((tmp_path / "test.parquet").read_bytes())
    for split in ("train", "test"):
        (remark,) = Parquet(path=str(tmp_path)).open(split).remarks  # type: ignore[arg-type]
        assert remark.endswith("are the same file")


def test_images_may_be_a_column_of_bytes_but_not_of_paths(tmp_path: Path) -> None:
    for kind in (pa.binary(), pa.large_binary()):
        pq.write_table(pa.table({"image": pa.array([GOOD], kind), "label": [0]}), tmp_path / "test.parquet")
        x, _ = Parquet(path=str(tmp_path)).open("test").first(1)
        assert torch.equal(x[0], torch.from_numpy(noise(1)[0]).permute(2, 0, 1) / 255)
    write_parquet(tmp_path / "test.parquet", [None, None], [0, 1])
    for path in (Parquet(path=str(tmp_path), size=8), Cifar10(path=str(tmp_path))):
        with pytest.raises(UserError, match="column img has no bytes in any row: the images are in other files"):
            path.open("test")
    pq.write_table(pa.table({"image": ["a.png"], "label": [0]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match="column image is string"):
        Parquet(path=str(tmp_path)).open("test")


def test_a_part_of_cifar10_is_said_to_be_one(parquet: Path) -> None:
    assert Cifar10(path=str(parquet)).open("test").remarks == (f"{parquet}: 8 images; CIFAR-10 has 10000 to test",)


def test_files_of_different_data_are_not_joined(tmp_path: Path) -> None:
    for shard, names in enumerate((("ant", "bee"), ("ant", "cow"))):
        write_parquet(tmp_path / f"test-{shard:05}-of-00002.parquet", [GOOD], [1], **hub(*names))
    with pytest.raises(UserError, match="name different classes"):
        Parquet(path=str(tmp_path)).open("test")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tables", r"tables has no train-\*\.parquet: data\.path must contain train-\*\.parquet and"),
        ("tables/test.parquet", r"tables has no train-\*\.parquet"),
        ("elsewhere", "elsewhere is neither a folder nor a file"),
    ],
)
def test_a_path_without_parquet_says_what_is_expected(tmp_path: Path, path: str, message: str) -> None:
    write_parquet(tmp_path / "tables" / "test.parquet", [GOOD], [0])
    with pytest.raises(UserError, match=message):
        Parquet(path=str(tmp_path / path)).open("train")


# image folders ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_do_not_change_the_batches(folder: Path) -> None:
    split = ImageFolder(path=str(folder), size=8).open("train")
    for seed in (None, 4):
        here = in_order(split, [0, 5, 2], [11], [1], augment_seed=seed)
        there = in_order(split, [0, 5, 2], [11], [1], augment_seed=seed, workers=2)
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


def test_folder_reads_every_file_once_with_its_class(folder: Path) -> None:
    split = ImageFolder(path=str(folder), size=14, crop_pct=1).open("test")
    assert split.classes == ("cat", "dog", "eel")
    x, y = split.first(6)
    for label, name in enumerate(split.classes):
        for i in range(2):  # the shorter side is 14 already: the image is only cropped
            pixels = np.asarray(Image.open(folder / "val" / name / f"{i}.png"))[:, 3:17]
            expected = torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255
            assert [int(y[k]) for k in range(6) if torch.equal(x[k], expected)] == [label]


def test_folder_order_mixes_the_classes_and_does_not_depend_on_the_place(folder: Path) -> None:
    split = ImageFolder(path=str(folder), size=8).open("train")
    assert split.labels.tolist() != sorted(split.labels.tolist())
    x, y = split.first(12)
    moved = ImageFolder(path=str(folder.rename(folder.parent / "moved")), size=8).open("train")
    assert all(torch.equal(a, b) for a, b in zip((x, y), moved.first(12), strict=True))


def test_augmentation_crops_resizes_and_mirrors(folder: Path) -> None:
    wide = np.zeros((20, 20, 3), dtype=np.uint8)
    wide[:, :10] = 255  # white on the left, so mirroring shows
    for file in (folder / "train").glob("*/*.png"):
        file.write_bytes(png(wide))
    split = ImageFolder(path=str(folder), size=8, scale=(0.9, 1), ratio=(1, 1)).open("train")
    x = torch.cat([in_order(split, list(range(12)), augment_seed=seed)[0] for seed in range(5)])
    left, right = x[..., :2].mean((1, 2, 3)), x[..., -2:].mean((1, 2, 3))
    assert ((left - right).abs() > 0.9).all()
    assert 0.3 < (left > right).float().mean() < 0.7


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"nonsense", png(noise(1, 64, 64)[0])[:3000]])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_broken_image_file_is_named_when_read(folder: Path, content: bytes, workers: int) -> None:
    (folder / "val" / "dog" / "1.png").write_bytes(content)
    split = ImageFolder(path=str(folder), size=8).open("test")
    with pytest.raises(UserError, match=r"val/dog/1\.png: cannot be read as an image .*replace or remove it") as caught:
        list(split.batches([torch.arange(6)], workers=workers))
    assert "\n" not in str(caught.value)


def test_a_file_that_vanished_is_named(folder: Path) -> None:
    split = ImageFolder(path=str(folder), size=8).open("test")
    (folder / "val" / "dog" / "1.png").unlink()
    with pytest.raises(UserError, match=r"val/dog/1\.png: cannot be read"):
        split.first(6)


def test_gray_and_transparent_images_become_colour(folder: Path) -> None:
    Image.fromarray(np.full((9, 9), 51, dtype=np.uint8)).save(folder / "val" / "cat" / "0.png")
    Image.fromarray(np.full((9, 9, 4), 51, dtype=np.uint8)).save(folder / "val" / "cat" / "1.png")
    split = ImageFolder(path=str(folder), size=8).open("test")
    x, y = split.first(6)
    torch.testing.assert_close(x[y == 0], torch.full((2, 3, 8, 8), 0.2), rtol=0, atol=1e-6)


# what other readers give --------------------------------------------------------------------------------------------


timm_leaves_files_open = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def image(mode: str) -> Image.Image:
    """Noise of 12x9 pixels in a mode of at most 8 bits a channel."""
    if mode == "P":  # with a palette of its own, and a transparent colour
        found = Image.fromarray(noise(1, 9, 12)[0]).quantize(7)
        found.info["transparency"] = 2
        return found
    if mode == "CMYK":
        return Image.frombytes("CMYK", (12, 9), noise(1, 12, 12)[0].tobytes())
    return Image.frombytes("RGBA", (12, 9), noise(1, 12, 12)[0].tobytes()).convert(mode)


@timm_leaves_files_open
@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG", "bmp", "webp", "tif", "tiff", "ppm", "pgm"])
def test_images_are_those_of_timm_and_torchvision(tmp_path: Path, ending: str) -> None:
    """Every mode that a format has, transparency and EXIF orientation included, in folders and in Parquet files."""
    modes = {
        "png": ("1", "L", "LA", "P", "RGB", "RGBA"), "jpg": ("L", "RGB", "CMYK"), "bmp": ("1", "L", "P", "RGB"),
        "webp": ("RGB", "RGBA"), "tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK"), "ppm": ("RGB",), "pgm": ("L",),
    }  # fmt: skip
    modes |= {"JPEG": modes["jpg"], "tiff": modes["tif"]}
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    for i, mode in enumerate(modes[ending]):
        (tmp_path / "test" / f"{i}").mkdir(parents=True)
        options = {} if ending in ("bmp", "ppm", "pgm") else {"exif": exif}
        image(mode).save(tmp_path / "test" / f"{i}" / f"a.{ending}", **options)
    theirs = torchvision_datasets.ImageFolder(str(tmp_path / "test"))
    if ending in ("png", "jpg", "JPEG"):  # the others timm leaves out
        timms = create_dataset("", root=str(tmp_path / "test"), search_split=False)
        assert [(np.asarray(x).tolist(), y) for x, y in timms] == [(np.asarray(x).tolist(), y) for x, y in theirs]
    images, labels = zip(*theirs, strict=True)
    encoded = [Path(file).read_bytes() for file, _ in theirs.samples]
    write_parquet(tmp_path / "tables" / "test.parquet", encoded, list(labels))
    tables = Parquet(path=str(tmp_path / "tables"))
    for i, wanted in enumerate(images):
        assert np.array_equal(eight_bits(Image.open(io.BytesIO(encoded[i]))).convert("RGB"), wanted)
    size = {"size": 9, "crop_pct": 1}
    for data in (ImageFolder(path=str(tmp_path), **size), tables.model_copy(update=size)):
        x, y = data.open("test").first(len(images))
        for pixels, label in zip(x, y.tolist(), strict=True):
            plain = create_transform(9, crop_pct=1, normalize=False)(images[label])
            assert torch.equal(pixels, plain / 255)


def gray(kind: str, value: float, path: Path) -> Path:
    """A file of 6x6 pixels of a share of white, in more than 8 bits."""
    top = 4095 if kind == "tif12" else 65535
    values = np.full((6, 6), round(value * top), np.uint16)
    file = path.with_suffix(
        "." + {"tif12": "tif", "tif-big": "tif", "tif-white": "tif", "float": "tif"}.get(kind, kind)
    )
    if kind == "tif-big":
        Image.fromarray(values.astype(">u2")).save(file)
    elif kind == "tif-white":  # 0 is white
        Image.fromarray(top - values).save(file, tiffinfo={262: 0})
    elif kind == "float":
        Image.fromarray(np.full((6, 6), value, np.float32)).save(file)
    elif kind == "pgm12":
        file = path.with_suffix(".pgm")
        file.write_bytes(b"P5 6 6 4095\n" + np.full((6, 6), round(value * 4095), ">u2").tobytes())
    else:
        Image.fromarray(values).save(file)
    return file


@pytest.mark.parametrize("kind", ["png", "pgm", "pgm12", "tif", "tif-big", "tif-white", "float"])
@pytest.mark.parametrize("value", [0.0, 0.125, 0.6, 1.0])
def test_more_than_eight_bits_are_scaled_and_not_cut(tmp_path: Path, kind: str, value: float) -> None:
    (tmp_path / "test" / "a").mkdir(parents=True)
    file = gray(kind, value, tmp_path / "test" / "a" / "x")
    write_parquet(tmp_path / "test.parquet", [file.read_bytes()], [0], **hub(*CIFAR10_CLASSES))
    size = {"size": 4, "crop_pct": 1}
    splits = [ImageFolder(path=str(tmp_path), **size).open("test")]
    splits += [Parquet(path=str(tmp_path), **settings).open("test") for settings in ({}, size)]
    for x in (*(split.first(1)[0] for split in splits), read_upload(file, (1, 6, 6)).image[None]):
        torch.testing.assert_close(x, torch.full_like(x, value), rtol=0, atol=0.5 / 255)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((6, 6), 700, np.int32), "32-bit or signed integers"),
        (np.full((6, 6), -7, np.int16), "32-bit or signed integers"),
        (np.full((6, 6), 200, np.float32), "floats from 200 to 200; black must be 0 and white 1"),
        (np.full((6, 6), -1e-3, np.float32), "floats from -0.001"),
        (np.full((6, 6), np.nan, np.float32), "floats from nan"),
    ],
)
def test_pixels_whose_white_is_unknown_are_refused(tmp_path: Path, pixels: np.ndarray[Any, Any], message: str) -> None:
    (tmp_path / "test" / "a").mkdir(parents=True)
    file = tmp_path / "test" / "a" / "x.tif"
    if pixels.dtype == np.int16:
        Image.fromarray(pixels.view(np.uint16)).save(file, tiffinfo={339: 2})
    else:
        Image.fromarray(pixels).save(file)
    write_parquet(tmp_path / "test.parquet", [file.read_bytes()], [0])
    with pytest.raises(UserError, match=rf"x\.tif: .*{message}"):
        ImageFolder(path=str(tmp_path), size=4).open("test").first(1)
    with pytest.raises(UserError, match=rf"row 0: .*{message}"):
        Parquet(path=str(tmp_path)).open("test")
    with pytest.raises(UserError, match=rf"x\.tif .*{message}"):
        read_upload(file, (1, 6, 6))


def test_postscript_is_not_run(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    with Image.open(tmp_path / "a.eps") as opened, pytest.raises(ValueError, match="PostScript is a program"):
        eight_bits(opened)


def labels_by_timm(root: Path, class_map: str = "") -> dict[str, int]:
    reader = create_dataset("", root=str(root), search_split=False, class_map=class_map).reader
    return {name: int(label) for name, label in reader.class_to_idx.items()}


NUMBERED = ("0", "1", "2", "10", "11", "Class 3", "class 12", "b", "B2", "n02", "n1", "a1b10", "a1b9", "_x")


def test_classes_are_numbered_as_timm_or_torchvision_does(tmp_path: Path) -> None:
    for name in NUMBERED:
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "0.png").write_bytes(GOOD)
    theirs = torchvision_datasets.ImageFolder(str(tmp_path / "test")).class_to_idx
    (tmp_path / "list.txt").write_text("n1\n10\nb\n2\n")
    listed = {"classes": str(tmp_path / "list.txt")}
    for settings, wanted in (
        ({}, labels_by_timm(tmp_path / "test")),
        ({"class_order": "torchvision"}, theirs),
        ({**listed, "class_order": "list"}, labels_by_timm(tmp_path / "test", listed["classes"])),
        (listed, {"2": 0, "10": 1, "b": 2, "n1": 3}),
    ):
        split = ImageFolder.model_validate({"path": str(tmp_path), "size": 4, **settings}).open("test")
        assert {name: label for label, name in enumerate(split.classes)} == wanted
        assert any("classes are numbered in" in remark for remark in split.remarks)
    with pytest.raises(ValidationError, match="class_order=list needs a list"):
        ImageFolder.model_validate({"path": str(tmp_path), "class_order": "list"})


def test_an_order_is_only_spoken_of_where_there_are_two(folder: Path) -> None:
    split = ImageFolder(path=str(folder), size=8).open("test")
    assert (split.remarks, split.source) == ((), str(folder / "val"))


def test_files_that_are_not_read_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cat/a.gif", "cat/b.GIF", "dog/labels", "cat/.c.png", ".DS_Store", "__MACOSX/cat/._0.png"):
        (folder / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "val" / name).write_bytes(GOOD)
    split = ImageFolder(path=str(folder), size=8).open("test")
    assert split.remarks == (f"{folder}/val: 6 of 12 files are not read: 3 hidden, 2 .gif, 1 without an extension",)
    assert capsys.readouterr().err == f"{split.remarks[0]}\n"
    assert ImageFolder(path=str(folder), size=8).open("test").remarks == split.remarks
    assert not capsys.readouterr().err, "once"
    for file in (folder / "val" / "eel").iterdir():
        file.rename(file.with_suffix(".gif"))
    with pytest.raises(UserError, match=r"val/eel has no images; 8 of 12 files are not read: 4 \.gif"):
        ImageFolder(path=str(folder), size=8).open("test")


@pytest.mark.parametrize("name", ["a\udcff.png", "é.png", "a b.PNG"])
def test_any_file_name_is_read(folder: Path, name: str) -> None:
    (folder / "val" / "cat" / name).write_bytes(GOOD)
    assert len(ImageFolder(path=str(folder), size=8).open("test").first(7)[0]) == 7


def test_links_are_followed_and_loops_end(folder: Path, tmp_path: Path) -> None:
    (folder / "val" / "eel").rename(tmp_path / "elsewhere")
    (folder / "val" / "eel").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(ImageFolder(path=str(folder), size=8).open("test")) == 6
    (folder / "val" / "cat" / "up").symlink_to(folder / "val", target_is_directory=True)
    with pytest.raises(UserError, match=r"cat/up/.*\.png is not in .*val/CLASS/"):
        ImageFolder(path=str(folder), size=8).open("test")


def test_images_that_are_in_both_splits_are_counted(folder: Path) -> None:
    (folder / "val" / "cat" / "0.png").write_bytes((folder / "train" / "cat" / "0.png").read_bytes())
    for name, n in (("test", 6), ("train", 12)):
        (remark,) = ImageFolder(path=str(folder), size=8).open(name).remarks  # type: ignore[arg-type]
        assert f"1 of {n} images in " in remark
        assert "are in" in remark
        assert "cat/0.png" in remark


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_of_several_test_sets_the_first_with_labels_is_used(tmp_path: Path, kind: str) -> None:
    def write(name: str, level: int, labelled: bool) -> None:
        picture = png(np.full((8, 8, 3), level, np.uint8))
        if kind == "parquet":
            write_parquet(tmp_path / f"{name}.parquet", [picture, GOOD], [0, 1] if labelled else [-1, -1])
            return
        for place in "ab" if labelled else ".":
            (tmp_path / name / place).mkdir(parents=True, exist_ok=True)
            (tmp_path / name / place / "0.png").write_bytes(picture)

    def read(**settings: Any) -> tuple[int, tuple[str, ...]]:
        split = Data.of_kind(kind).model_validate({"path": str(tmp_path), "size": 8, **settings}).open("test")
        return round(255 * float(split.first(1)[0].mean())), split.remarks

    write("val", 3, True)
    assert read() == (3, ())
    write("validation", 2, True)
    remark = f"{tmp_path} has validation and val: validation is used (data.test_split=val changes it)"
    assert read() == (2, (remark,))
    assert read(test_split="val") == (3, ())
    write("test", 1, False)
    if kind == "parquet":
        table = pq.read_table(tmp_path / "test.parquet")
        for labels in ([None, None], None):  # none of them, and not even a column
            other = table.drop_columns(["label"])
            other = other if labels is None else other.append_column("label", pa.array(labels, pa.int64()))
            pq.write_table(other, tmp_path / "test.parquet")
            assert read()[0] == 2
    assert read() == (2, (f"{tmp_path}: test has no labels and is not used", remark))
    with pytest.raises(UserError, match=r"data\.test_split: .* has no valid; it has test, validation, val"):
        read(test_split="valid")
    write("test", 1, True)
    if kind == "folder":
        (tmp_path / "test" / "0.png").unlink()
    assert read()[0] == 1


def test_a_class_list_has_one_name_a_line(folder: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (folder / split / "cat").rename(folder / split / "persian cat")
    file = tmp_path / "list.txt"
    for text in ("eel\npersian cat", "\ufeffpersian cat\r\n\r\n  eel \r\n"):
        file.write_bytes(text.encode())
        assert set(ImageFolder(path=str(folder), classes=str(file), size=8).open("test").classes) == {
            "eel",
            "persian cat",
        }
    for content, message in (
        (b"eel\neel", "names eel twice"),
        (b"\n\n", "needs at least one name"),
        (b"eel\npersian", "names 2 class folders; .* lacks 1 of them, such as persian"),
        (b"eel\n\xff", "cannot be read as text in UTF-8"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            ImageFolder(path=str(folder), classes=str(file)).open("test")


@timm_leaves_files_open
@pytest.mark.parametrize(
    ("name", "img_size"),
    [
        ("resnet50.a1_in1k", None),
        ("resnet50.a1_in1k", 288),  # its test size, with a crop of its own
        ("resnet50.tv_in1k", None),
        ("vit_tiny_patch16_224", 64),
        ("convnext_tiny.fb_in22k_ft_in1k_384", None),  # squashed
        ("deepseek_vit_412m", 64),  # with borders
        ("volo_d4_448", 64),  # a crop of 1.15
        ("efficientnet_b0.ra_in1k", None),
    ],
)
def test_a_timm_model_gets_the_pixels_that_timm_gives_it(folder: Path, name: str, img_size: int | None) -> None:
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    tall = noise(1, 90, 40, seed=5)[0]  # of other proportions than the 14x20 of the rest
    Image.fromarray(tall).save(folder / "val" / "cat" / "0.png")
    data = named_data(str(folder), img_size=img_size, **preprocessing(name, img_size))
    split = data.open("test")
    x, y = split.first(6)
    known = get_pretrained_cfg(name).to_dict()
    wanted = resolve_data_config(
        {} if img_size in (None, 288) else {"img_size": img_size}, pretrained_cfg=known, use_test_size=img_size == 288
    )
    dataset = create_dataset("", root=str(folder / "val"), search_split=False)
    borders = wanted["mean"] if wanted["crop_mode"] == "border" else (0, 0, 0)
    (size,) = set(wanted["input_size"][1:])
    dataset.transform = create_transform(
        size,
        interpolation=wanted["interpolation"],
        crop_pct=wanted["crop_pct"],
        crop_mode=wanted["crop_mode"],
        mean=borders,
        normalize=False,
    )
    x = {(pixels.numpy().tobytes(), int(label)) for pixels, label in zip((255 * x).round().byte(), y, strict=True)}
    assert x == {(pixels.numpy().tobytes(), label) for pixels, label in dataset}
    if wanted["crop_mode"] == "border":  # where its loader pads with the mean that it takes off afterwards
        return
    loader = create_loader(
        create_dataset("", root=str(folder / "val"), search_split=False),
        **{key: wanted[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode")},
        batch_size=6,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )
    ((pixels, labels),) = loader
    assert x == {(p.numpy().tobytes(), int(k)) for p, k in zip((255 * pixels).round().byte(), labels, strict=True)}


def test_class_folders_must_agree(folder: Path) -> None:
    (folder / "val" / "eel").rename(folder / "val" / "fox")
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"differ in 2: eel is in .*train and not in .*val"):
            ImageFolder(path=str(folder), size=8).open(split)  # type: ignore[arg-type]


def test_an_empty_class_folder_is_named(folder: Path) -> None:
    (folder / "train" / "fox").mkdir()
    with pytest.raises(UserError, match=r"class folder .*train/fox has no images"):
        ImageFolder(path=str(folder)).open("train")


@pytest.mark.parametrize("kind", [ImageFolder, Timm])
def test_a_class_folder_that_cannot_be_read_is_named(
    kind: type[Data], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed = folder / "train" / "eel"
    closed.chmod(0)
    if os.access(closed, os.R_OK):  # root may read everything
        access = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and access(path, mode))
    try:
        with pytest.raises(UserError, match=r"class folder .*train/eel cannot be read: check its permissions"):
            kind(path=str(folder)).open("train")  # type: ignore[call-arg]
    finally:
        closed.chmod(0o755)


@pytest.mark.parametrize("place", ["stray.png", "cat/deeper/stray.png"])
def test_images_outside_class_folders_are_named(folder: Path, place: str) -> None:
    (folder / "train" / place).parent.mkdir(exist_ok=True)
    (folder / "train" / place).write_bytes(GOOD)
    with pytest.raises(UserError, match=rf"{place} is not in .*train/CLASS/"):
        ImageFolder(path=str(folder)).open("train")


def test_missing_folders_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere is not a folder: data\.path must contain train/CLASS"):
        ImageFolder(path=str(tmp_path / "nowhere")).open("train")
    with pytest.raises(UserError, match="has no folder test or validation or valid or val"):
        ImageFolder(path=str(folder / "train")).open("test")
    (tmp_path / "bare" / "train").mkdir(parents=True)
    with pytest.raises(UserError, match="bare/train has no images"):
        ImageFolder(path=str(tmp_path / "bare")).open("train")


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_evaluation_needs_no_training_images(folder: Path, name: str) -> None:
    (folder / "train").rename(folder.parent / "elsewhere")
    (folder / "val").rename(folder / name)
    assert len(ImageFolder(path=str(folder), size=8).open("test")) == 6


@pytest.mark.parametrize(
    "wrong", [{"size": 0}, {"crop_pct": 1.5}, {"scale": [1, 0.5]}, {"ratio": [0, 1]}, {"interpolation": "bicubick"}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ImageFolder.model_validate({"path": "x", **wrong})


def test_a_list_of_classes_selects_folders_and_their_images_alone(folder: Path, tmp_path: Path) -> None:
    everything = Data.of_kind("folder")(path=str(folder), size=16).open("train")
    chosen = everything.classes[1:]
    list_file = tmp_path / "classes.txt"
    list_file.write_text("\n".join(reversed(chosen)))
    some = Data.of_kind("folder")(path=str(folder), size=16, classes=str(list_file)).open("train")
    assert some.classes == chosen
    keep = everything.labels > 0
    assert torch.equal(some.labels, everything.labels[keep] - 1)
    x, _ = everything.first(len(everything))
    assert torch.equal(some.first(len(some))[0], x[keep])


def test_how_many_classes_a_folder_has_is_known_without_it_where_a_list_or_somebody_says(tmp_path: Path) -> None:
    folder = functools.partial(ImageFolder, path=str(tmp_path / "nowhere"), size=16)
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    assert folder(classes="imagenet100").form() == ((3, 16, 16), 100)
    assert folder(classes=str(tmp_path / "two.txt")).form(1000) == ((3, 16, 16), 2), "the list counts"
    assert folder().form(1000) == ((3, 16, 16), 1000)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        folder().form()
    assert Data.of_kind("digits")().form(3) == ((1, 8, 8), 10), "what the data set fixes counts"


def test_the_papers_imagenet_100_is_a_list_that_the_folders_must_have(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"imagenet100 names 100 class folders; .*train lacks 100 of them, such as n0"):
        Data.of_kind("folder")(path=str(folder), classes="imagenet100").open("train")
    with pytest.raises(UserError, match="neither imagenet100 nor a file"):
        Data.of_kind("folder")(path=str(folder), classes=str(tmp_path / "none.txt")).open("train")


def test_what_stands_here_for_the_sake_of_a_quick_start_is_torchvisions_and_timms() -> None:
    from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from torchvision.datasets import folder

    from rome.data.folder import IMG_EXTENSIONS
    from rome.data.resized import IMAGENET_MEAN, IMAGENET_STD

    assert IMG_EXTENSIONS == folder.IMG_EXTENSIONS
    assert (IMAGENET_MEAN, IMAGENET_STD) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
