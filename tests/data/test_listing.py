"""Lists of images: their order, what is remembered of them and when it is not, and lists of some of them."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rome.core.errors import UserError
from rome.data import ImageFolder, Split, listing

NAMES = ("n01", "n02", "n10")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three classes of 5 images to train and 2 to test, in folders that changed long ago."""
    monkeypatch.setenv("ROME_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "images"
    for split, n in (("train", 5), ("val", 2)):
        for number, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for image in range(n):
                write(root / split / name / f"{split}{image}.png", 10 * number + image + 50 * (split == "val"))
    for place in (*root.glob("*"), *root.glob("*/*/")):
        os.utime(place, (1e9, 1e9))
    return root


def write(file: Path, value: int) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    file.write_bytes(buffer.getvalue())


def opened(root: Path, split: Any = "test", **settings: Any) -> Split:
    return ImageFolder(path=str(root), size=4, crop_pct=1, **settings).open(split)


def values(split: Split) -> list[int]:
    """The gray of each image."""
    return [round(value) for value in (255 * split.first(len(split))[0][:, 0, 0, 0]).tolist()]


def test_images_stand_in_the_order_of_the_hash_of_their_class_and_name(root: Path) -> None:
    found = listing.list_images(root / "train")
    names = ["/".join(found[row]) for row in range(len(found.places))]
    assert names == sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert names == [name.decode() for name in found.keys().to_pylist()]
    assert {*names} == {f"{name}/train{image}.png" for name in NAMES for image in range(5)}
    digests = b"".join(hashlib.sha256(str(n).encode()).digest() for n in range(1000))
    expected = sorted(range(1000), key=lambda n: digests[32 * n : 32 * n + 32])
    assert listing.by_hash(digests).tolist() == expected


def test_a_folder_that_did_not_change_is_scanned_once(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = opened(root, "train")

    def scanned(folder: Path) -> Any:
        raise AssertionError(f"{folder} is scanned")

    with monkeypatch.context() as patch:
        patch.setattr(listing, "_scan", scanned)
        again = opened(root, "train")
    assert values(again) == values(first)
    assert again.labels.tolist() == first.labels.tolist()
    assert not capsys.readouterr().err
    write(root / "train" / "n02" / "new.png", 99)
    changed = opened(root, "train")
    assert sorted(values(changed)) == sorted([*values(first), 99])
    assert "train changed since its images were listed" in capsys.readouterr().err
    (root / "train" / "n02" / "new.png").unlink()
    assert values(opened(root, "train")) == values(first), "a list of a folder that just changed is not remembered"


@pytest.mark.parametrize("damage", [b"", b"x" * 40, None])
def test_a_damaged_list_is_made_anew(root: Path, damage: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    expected = values(opened(root))
    for file in (root.parent / "cache" / "data").glob("*.arrow"):
        whole = bytearray(file.read_bytes())
        whole[len(whole) // 2] ^= 1
        file.write_bytes(bytes(whole) if damage is None else damage)
    assert values(opened(root)) == expected
    assert "cannot be used" in capsys.readouterr().err
    assert values(opened(root)) == expected
    assert not capsys.readouterr().err


def test_without_a_place_for_lists_folders_are_scanned_each_time(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = values(opened(root))
    (root.parent / "file").write_text("")
    monkeypatch.setenv("ROME_CACHE_HOME", str(root.parent / "file"))
    assert values(opened(root)) == expected


# lists of test images -------------------------------------------------------------------------------------------------


def test_only_listed_images_are_tested_on_in_the_order_of_the_list(root: Path) -> None:
    chosen = root.parent / "chosen.txt"
    chosen.write_text("n10/val1.png\nval/n01/val0.png\n\nn10/val0.png")
    found = opened(root, files=str(chosen))
    assert values(found) == [71, 50, 70]
    assert [found.classes[label] for label in found.labels] == ["n10", "n01", "n10"]
    digest = hashlib.sha256(chosen.read_bytes()).hexdigest()
    assert any(f"only the 3 images that {chosen} lists, in its order (sha256 {digest})" in r for r in found.remarks)
    assert values(opened(root, files=str(chosen), test_limit=2)) == [71, 50]
    assert len(opened(root, "train", files=str(chosen))) == 15
    (root.parent / "classes.txt").write_text("n01\nn02\n")
    found = opened(root, files=str(chosen), classes=str(root.parent / "classes.txt"))
    assert values(found) == [50]
    assert any("only the 1 of 3 images (other classes)" in remark for remark in found.remarks)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("n01/val0.png\nn01/none.png\nnone/val1.png", r"lists 3 images.*lacks 2 of them, such as n01/none\.png"),
        ("n01/val0.png\nn01/val0.png", "names n01/val0.png twice"),
        ("\n", "needs at least one path"),
    ],
)
def test_a_list_of_other_images_is_refused(root: Path, lines: str, message: str) -> None:
    (root.parent / "chosen.txt").write_text(lines)
    with pytest.raises(UserError, match=rf"data\.files: .*{message}"):
        opened(root, files=str(root.parent / "chosen.txt"))
    with pytest.raises(UserError, match=r"data\.files: /none cannot be read"):
        opened(root, files="/none")


def test_robustbenchs_list_is_taken_from_its_package(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rome.data.folder.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"comes with the package robustbench .* pip install"):
        opened(root, files="robustbench")
    monkeypatch.undo()
    package = root.parent / "packages" / "robustbench"
    (package / "helper_files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('needs no import')")
    (package / "helper_files" / "imagenet_test_image_ids.txt").write_text("n02/val1.png\nn01/val1.png")
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    assert values(opened(root, files="robustbench")) == [61, 51]
