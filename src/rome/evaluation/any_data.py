"""The data and budgets that a command line names in a word, without a config."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from rome.attacks.suites.composed import listed
from rome.core.component import mistakes
from rome.core.errors import UserError, did_you_mean
from rome.data import CIFAR10_CLASSES, Cifar10, Data, ImageFolder, Parquet
from rome.data.base import NAMES
from rome.data.tables import find_tables, label_names
from rome.threats import NAMED_BUDGETS, LpBall, Threat

_FORMS = (
    "digits; cifar10:PATH; a folder with test/CLASS/*.jpg (or val), with test-*.parquet or with cifar-10-batches-py; a "
    ".parquet file; or settings as in a config: '{path: PATH, test_split: val}'"
)


def named_data(text: str, *, img_size: int | None = None, **settings: Any) -> Data:
    """The data set that ``digits``, ``KIND:PATH``, a folder, a Parquet file or settings in braces name; what a folder
    holds is seen by its content.

    Args:
        img_size: the side, in pixels, that images are to have.
        settings: how a model wants images to be resized: for folders of images, and for Parquet files where
            ``img_size`` is given or their images differ in size; others stay as they are.

    Raises:
        UserError: no such data set or folder, or one of unknown content.
    """
    given = _given(text)
    kind = given.pop("kind")
    if img_size is not None:
        settings["size"] = img_size
    try:
        owner = Data.of_kind(kind)
        data = owner.model_validate(given)
        resized = isinstance(data, ImageFolder) or (
            isinstance(data, Parquet) and (img_size or data.size or not data.one_size())
        )
        return type(data).model_validate({**settings, **given}) if resized else data
    except ValidationError as error:
        wrong = mistakes(error, given, owner)[0].of(f"data {text!r}")
        raise UserError(f"{wrong.rstrip('.')}; give {_FORMS}") from None
    except PydanticCustomError as error:
        raise UserError(f"data {text!r}: {error}; give {_FORMS}") from None


def _given(text: str) -> dict[str, Any]:
    """What a text says of a data set: its kind, and settings."""
    if text.lstrip().startswith("{"):
        try:
            (given,) = listed(text)
        except ValueError as error:
            raise UserError(f"data: {error}") from None
        return given if "kind" in given else {"kind": _content(Path(str(given.get("path", "")))), **given}
    kind, colon, path = text.partition(":")
    if kind in Data.members():
        return {"kind": kind, **({"path": path} if colon else {})}
    path_like = len(kind) == 1 or {"/", "\\"} & set(kind)  # C:\x, ./a:b
    if colon and not path_like and not os.path.exists(os.path.expanduser(text)):
        raise UserError(f"unknown data {text!r}; give {_FORMS}")
    return {"kind": _content(Path(text)), "path": text}


def _content(folder: Path) -> str:
    folder = Path(os.path.expanduser(folder))
    if folder.suffix == ".parquet" and os.path.isfile(folder):
        return _of_tables(folder)
    if not os.path.isdir(folder):
        near = did_you_mean(str(folder), Data.members()) if len(folder.parts) == 1 else ""
        raise UserError(f"there is no folder {folder} with data; give {_FORMS}.{near}")
    if (folder / "batches.meta").is_file() and folder.name != "cifar-10-batches-py":
        raise UserError(f"{folder} holds CIFAR-10's batches: rename it to cifar-10-batches-py")
    if folder.name == "cifar-10-batches-py" or (folder / "cifar-10-batches-py").is_dir():
        return Cifar10.kind
    if tables := find_tables(folder, *NAMES["test"]):
        return _of_tables(tables[0])
    tests = [folder / name for name in NAMES["test"] if (folder / name).is_dir()]
    if any(entry.is_dir() for test in tests for entry in test.iterdir()):
        return ImageFolder.kind
    raise UserError(f"{folder} holds no data that is known by its content; give {_FORMS}")


def _of_tables(file: Path) -> str:
    """CIFAR-10 where the Hub's names of classes inside a file say so."""
    return Cifar10.kind if label_names(file) == CIFAR10_CLASSES else Parquet.kind


def named_budgets(text: str) -> dict[str, Threat]:
    """Threats by column: ``cifar10``, ``imagenet``, ``digits``, or balls such as ``L2=0.5,Linf=8/255``.

    Raises:
        UserError: neither.
    """
    if text in NAMED_BUDGETS:
        return {threat.name: threat for threat in NAMED_BUDGETS[text]}
    if "=" not in text:
        raise UserError(f"unknown budgets {text!r}.{did_you_mean(text, NAMED_BUDGETS)} Or balls: L2=0.5,Linf=8/255")
    threats: dict[str, Threat] = {}
    for part in text.split(","):
        norm, _, eps = part.partition("=")
        given = {"norm": norm.strip(), "eps": eps.strip()}
        try:
            threat = LpBall.model_validate(given)
        except ValidationError as error:
            wrong = mistakes(error, given, LpBall)[0].of(f"budget {part!r}")
            raise UserError(f"{wrong}; write a norm and its radius, such as L1=12, L2=0.5 or Linf=8/255") from None
        if threat.name in threats:
            raise UserError(f"budgets {text!r} name {threat.name} twice")
        threats[threat.name] = threat
    return threats


def batch_size_of(text: str | None) -> int | Literal["auto"] | None:
    """``auto``, a number, or None as it is.

    Raises:
        UserError: neither.
    """
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--batch-size {text!r}: give a number from 1, or auto")
    return int(text)


def numbers(text: str | None, option: str) -> Sequence[float] | None:
    """``0.49,0.48,0.45`` as numbers; None stays None.

    Raises:
        UserError: not numbers.
    """
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option} {text!r}: write one number, or one for each channel: 0.49,0.48,0.45") from None
