"""timm's readers: the same labels and images as timm gives, each by its number."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.dataset_factory import create_dataset
from torchvision.datasets import ImageFolder as TorchvisionFolder

from rome.core.errors import UserError
from rome.data import Data, Split
from rome.data.timm import Timm

pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # timm leaves files open
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]
SIZE = 16


def png(seed: int) -> bytes:
    """An image of one size, so that nothing is resized, and a pixel of its own."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def opened(path: Path, split: str = "test", **settings: Any) -> Split:
    return Timm(path=str(path), size=SIZE, crop_pct=1, **settings).open(split)  # type: ignore[arg-type]


def labelled(split: Split) -> dict[bytes, int]:
    """The label of each image, by its pixels."""
    x, y = split.first(len(split))
    return {(255 * image).round().byte().numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)}


def by_reference(data: Any) -> dict[bytes, int]:
    return {torch.from_numpy(np.array(image)).permute(2, 0, 1).numpy().tobytes(): int(label) for image, label in data}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders of classes, whose numbers timm orders by their value and torchvision as text."""
    for split, first in (("train", 0), ("validation", 100)):
        for number, name in enumerate(("class2", "class10", "class1")):
            (tmp_path / split / name).mkdir(parents=True)
            for image in range(3):
                (tmp_path / split / name / f"{image}.png").write_bytes(png(first + 10 * number + image))
    return tmp_path


def test_folders_have_timms_labels_and_classes(root: Path) -> None:
    for split, name in (("train", "train"), ("test", "validation")):
        found = opened(root, split)
        assert labelled(found) == by_reference(create_dataset("", str(root), split=name))
        assert found.classes == ("class1", "class2", "class10")
    assert found.labels.tolist() != sorted(found.labels.tolist()), "classes are mixed"


def test_a_class_map_numbers_the_classes(root: Path) -> None:
    (root / "map.txt").write_text("class10\nclass1\n")
    found = opened(root, class_map=str(root / "map.txt"))
    assert labelled(found) == by_reference(create_dataset("", str(root), class_map=str(root / "map.txt")))
    assert found.classes == ("class10", "class1")
    with pytest.raises(UserError, match=r"class_map: .*map\.pkl is not a \.txt file"):
        opened(root, class_map=str(root / "map.pkl"))
    for name in ("wds/x", "torch/image_folder"):
        with pytest.raises(UserError, match=f"class_map does not apply to {name}"):
            opened(root, name=name, class_map=str(root / "map.txt"))


def test_torchvision_datasets_have_their_own_labels(root: Path) -> None:
    found = opened(root, name="torch/image_folder")
    assert labelled(found) == by_reference(TorchvisionFolder(root / "validation"))
    assert found.classes == ("class1", "class10", "class2")


def test_an_image_that_is_broken_when_labels_are_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of torchvision without ``targets`` decodes every image to give its label."""

    class Broken(list[Any]):
        def __getitem__(self, row: Any) -> Any:
            raise OSError("image file is truncated")

    monkeypatch.setattr("timm.data.dataset_factory.create_dataset", lambda *args, **options: Broken([0]))
    with pytest.raises(UserError, match="timm cannot open it: image file is truncated"):
        opened(root, name="torch/broken")


@pytest.mark.parametrize("workers", [0, 2])
def test_members_of_tars_are_read_at_their_place(root: Path, workers: int) -> None:
    with tarfile.open(root / "validation.tar", "w") as tar:
        tar.add(root / "validation", "validation")
    reference = by_reference(create_dataset("", str(root / "validation.tar")))
    assert labelled(opened(root)) == reference
    found = opened(root)
    found.first(1)  # workers are to start after a file was read here
    order = list(torch.arange(len(found)).split(2))
    x = torch.cat([x for x, _ in found.batches(order, workers=workers)])
    assert torch.equal(x, found.first(len(found))[0])
    (root / "validation.tar").write_bytes(b"nonsense" * 1000)
    with pytest.raises(UserError, match="cannot be read"):
        opened(root)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of three samples each, whose labels are 0 to 5."""
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard:02}.tar", "w") as tar:
            for number in range(3 * shard, 3 * shard + 3):
                add(tar, f"a/sample{number}.cls", str(number).encode())
                add(tar, f"a/sample{number}.json", b"{}")
                add(tar, f"a/sample{number}.png", png(number))
    return tmp_path


def test_a_changed_shard_is_told_in_one_line(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ROME_CACHE_HOME", str(shards / "cache"))
    for hours in (1, 2):
        for shard in shards.glob("*.tar"):
            os.utime(shard, (0, 3600 * hours))
        opened(shards, "train", name="wds/mine", train_split="train-{00..01}.tar")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{shards}/train-00.tar changed since its images were listed: it is searched again")


def test_samples_of_shards_are_images_with_the_labels_beside_them(shards: Path) -> None:
    expected = {
        torch.from_numpy(np.array(Image.open(io.BytesIO(png(i))))).permute(2, 0, 1).numpy().tobytes(): i
        for i in range(6)
    }
    pattern = {"name": "wds/mine", "train_split": "train-{00..01}.tar"}
    assert labelled(opened(shards, "train", **pattern)) == expected
    (shards / "_info.json").write_text(
        json.dumps({"splits": {"train": {"filenames": ["train-00.tar", "train-01.tar"]}}})
    )
    assert labelled(opened(shards, "train", name="wds/mine")) == expected
    with pytest.raises(UserError, match=r"lacks 1 of 3 shards, such as .*train-02"):
        opened(shards, "train", name="wds/mine", train_split="train-{00..02}.tar")
    with pytest.raises(UserError, match="lists no files for a split validation"):
        opened(shards, name="wds/mine")


def test_a_sample_without_a_label_is_named(shards: Path) -> None:
    with tarfile.open(shards / "train-00.tar", "w") as tar:
        add(tar, "b/lonely.png", png(0))
    with pytest.raises(UserError, match=r"b/lonely in .*train-00\.tar has no label"):
        opened(shards, "train", name="wds/mine", train_split="train-00.tar")


def test_data_sets_of_the_hub_are_read_by_number(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names, hub, cache = ["class2", "class10", "class1"], tmp_path / "hub", tmp_path / "cache"
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(6)], "label": [0, 1, 2] * 2}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    hub.mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(hub / "train-00000-of-00001.parquet")
    (tmp_path / "map.txt").write_text("class1\nclass2\nclass10\n")
    for settings in ({}, {"class_map": str(tmp_path / "map.txt")}):
        found = opened(cache, "train", name=f"hfds/{hub}", **settings)
        assert labelled(found) == by_reference(create_dataset(f"hfds/{hub}", str(cache), split="train", **settings))


def test_a_class_map_numbers_a_data_set_of_the_hub_with_any_version_of_timm(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers of timm 1.0.21 fail for every image if they have a class map."""
    reader = SimpleNamespace(class_to_idx={"ant": 0, "bee": 1}, label_key="label", dataset={"label": [0, 1, 1, 0]})
    monkeypatch.setattr("rome.data.timm.find_spec", lambda name: True)
    monkeypatch.setattr(
        "timm.data.dataset_factory.create_dataset", lambda name, *, root, split: SimpleNamespace(reader=reader)
    )
    (root / "map.txt").write_text("bee\nant\n")
    found = opened(root, name="hfds/a/b", class_map=str(root / "map.txt"))
    assert (found.labels.tolist(), found.classes) == ([1, 0, 0, 1], ("bee", "ant"))
    reader.dataset["label"][3] = -1
    with pytest.raises(UserError, match="timm cannot open it: -1"):
        opened(root, name="hfds/a/b", class_map=str(root / "map.txt"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "hfids/a/b"}, "is a stream, .*: use hfds/a/b"),
        ({"name": "tfds/imagenet2012"}, "is a stream"),
        ({"name": "torch/none_such"}, "timm cannot open it: Unknown torchvision dataset none_such"),
        ({"test_split": "none"}, "has no folder none: name it with data.train_split and data.test_split"),
        ({"path": "/none"}, "data.path: /none is not a folder"),
        ({"name": "wds/x", "test_split": "validation"}, "has no _info.json"),
    ],
)
def test_what_cannot_be_opened_is_said(root: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Data.of_kind("timm")(**{"path": str(root), **settings}).open("test")
    assert "\n" not in str(caught.value)
