"""What a run was started with that its config does not say: the data that lies at a path, and the user's code."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from rome.data import Split
from rome.models.inspection import Inspection
from rome.models.module_tree import tensor_bytes
from rome.models.sources import own_function
from rome.runs.config import Config

LOOKED_AT, CLOSE = 16, 0.01
"""Images whose mean brightness is compared, on the scale [0, 1], and how far it may differ: libraries that read JPEG
files agree to about 0.001."""


def data_facts(split: Split) -> dict[str, Any]:
    """What tells training data from other data at the cost of a few images: classes, labels and some brightnesses."""
    rows = torch.linspace(0, len(split) - 1, min(LOOKED_AT, len(split))).long()
    ((images, _),) = split.batches([rows])
    return {
        "classes": list(split.classes),
        "examples": len(split),
        "shape": list(split.shape),
        "labels": hashlib.sha256(tensor_bytes(split.labels)).hexdigest(),
        "images": [round(value, 4) for value in images.flatten(1).mean(dim=1).tolist()],
    }


def other_data(kept: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In what these facts are of other data; empty where of the same."""
    for name in ("classes", "examples", "shape", "labels"):
        if kept[name] != now[name]:
            return f"its {name} differ"
    far = max(abs(one - other) for one, other in zip(kept["images"], now["images"], strict=True))
    return "its images differ" if far > CLOSE else ""


def code_facts(config: Config) -> dict[str, str]:
    """The user's code that a config names: of attacks, methods, data sets and all else that has a kind, and of the
    function that builds the model."""
    inspection = Inspection()
    inspection.of(config)
    if ":" in config.model.name and not config.model.name.startswith("robustbench:"):
        inspection.of(own_function(config.model.name))
    return inspection.code
