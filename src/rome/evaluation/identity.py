"""What tells one model from another, as an evaluation's settings keep it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rome.attacks.base import Model
from rome.evaluation.store import hash_model
from rome.experts.routing import LEARNED, routing_of
from rome.models import Classifier, file_hash
from rome.models.sources import ROBUSTBENCH

CODE = "code"


def identity(model: Model) -> dict[str, Any]:
    """The class, the hash of the state, the hash of the user's code, and the routing where it is not the learned one.

    ``code`` is the SHA-256 of the file of a function that built the model (``path.py:function`` or
    ``package.module:function``), as it is now; None for models of rome, timm or RobustBench, whose versions tell,
    and for modules made elsewhere. What that file imports is not looked at.
    """
    inner = getattr(model, "_orig_mod", model)
    facts = {"type": inner.__class__.__name__, "sha256": hash_model(model), CODE: _code(inner)}
    routing = routing_of(inner) if isinstance(inner, nn.Module) else LEARNED
    return facts if routing == LEARNED else {**facts, "routing": routing}


def as_known(facts: Mapping[str, Any], stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """The same without what these stored settings do not say: earlier versions kept no hash of the code."""
    unknown = stored is not None and CODE not in stored.get("model", {})
    return {name: value for name, value in facts.items() if name != CODE or not unknown}


def _code(model: Model) -> str | None:
    name = model.recipe["name"] if isinstance(model, Classifier) and model.recipe else ""
    place, _, _ = name.rpartition(":")
    if not place or name.startswith(ROBUSTBENCH):
        return None
    file = place if place.endswith(".py") else getattr(sys.modules.get(place), "__file__", None)
    return file_hash(file) if file and Path(file).is_file() else None
