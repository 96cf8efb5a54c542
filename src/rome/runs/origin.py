"""The inputs of a run that its config only names: fingerprints of the training data and of the user's code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from typing_extensions import TypedDict

from rome.attacks.suites import SaveImages
from rome.core.errors import short
from rome.core.files import flatten
from rome.core.plain_data import read_plain
from rome.data import Split
from rome.models.inspection import Inspection
from rome.models.module_tree import tensor_bytes
from rome.models.sources import own_function
from rome.runs.config import Config

LOOKED_AT, CLOSE = 16, 0.01
"""Number of images whose mean brightness is compared, and the largest difference (on the scale [0, 1]) that counts as
equal; JPEG libraries agree to about 0.001."""
_LEAST_FIRST = get_args(SaveImages)
NOT_COMPARED = ("provenance", "environment", "save_images", "left_out", "networks")
"""Settings of an evaluation that do not determine its result."""


class DataFacts(TypedDict):
    """Fingerprint of training data."""

    classes: list[str]
    examples: int
    shape: list[int]
    labels: str
    """SHA-256 of the labels."""
    images: list[float]
    """Mean brightness of some images, on the scale [0, 1]."""


class Origin(TypedDict, total=False):
    """Contents of ``origin.json``."""

    data: DataFacts | None
    code: dict[str, str]
    changed: list[str]


def read_origin(file: Path) -> Origin:
    """Read ``origin.json``; empty if it does not exist.

    Raises:
        UserError: the file is damaged.
    """
    if not file.exists():
        return {}
    advice = "restore it, or remove it to continue without comparing data and code with those at the start"
    found: Origin = read_plain(file, Origin, advice)
    return found


def data_facts(split: Split) -> DataFacts:
    """Fingerprint training data by classes, labels and the brightness of a few images, without reading the others."""
    rows = torch.linspace(0, len(split) - 1, min(LOOKED_AT, len(split))).long()
    ((images, _),) = split.batches([rows])
    return {
        "classes": list(split.classes),
        "examples": len(split),
        "shape": list(split.shape),
        "labels": hashlib.sha256(tensor_bytes(split.labels)).hexdigest(),
        "images": [round(value, 4) for value in images.flatten(1).mean(dim=1).tolist()],
    }


def other_data(kept: DataFacts, now: DataFacts) -> str:
    """Describe how two fingerprints of :func:`data_facts` differ; empty if they belong to the same data."""
    for name in ("classes", "examples", "shape", "labels"):
        if kept[name] != now[name]:
            return f"its {name} differ"
    close = [abs(one - other) <= CLOSE for one, other in zip(kept["images"], now["images"], strict=False)]
    return "" if all(close) and len(kept["images"]) == len(now["images"]) else "its images differ"


def code_facts(config: Config) -> dict[str, str]:
    """Fingerprint the user's own code that a config names: components of every kind, such as attacks, methods and data
    sets, and the function that builds the model."""
    inspection = Inspection()
    inspection.of(config)
    if ":" in config.model.name and not config.model.name.startswith("robustbench:"):
        inspection.of(own_function(config.model.name))
    return inspection.code


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """List the differing settings that determine a result, as 'name: OLD there, NEW now'."""
    there, here = flatten({**stored}), flatten(json.loads(json.dumps(now, default=str)))
    names = [name for name in {**there, **here} if name.split(".")[0] not in NOT_COMPARED]
    found = [
        _difference(name, there.get(name), here.get(name))
        for name in names
        if (there.get(name) or None) != (here.get(name) or None)
    ]
    kept, wanted = (settings.get("save_images", "none") for settings in (stored, now))
    if kept not in _LEAST_FIRST or _LEAST_FIRST.index(wanted) > _LEAST_FIRST.index(kept):  # true in version 0.1.0
        found.append(f"save_images: {kept} there, {wanted} now")
    return found


def _difference(name: str, there: Any, here: Any) -> str:
    if name.startswith("versions.rome-robust") and "+" in f"{there}{here}":
        return f"rome's own code changed, {there} there, {here} now"
    owner, code, place = name.partition("code.")
    if code and owner in ("", "model."):
        if any(str(value).startswith("sha256:") for value in (there, here)):
            return f"the code of {place} {'is new' if there is None else 'is gone' if here is None else 'changed'}"
        return f"{place}: {there} there, {here} now"
    return f"{name}: {short(there, 40)} there, {short(here, 40)} now"
