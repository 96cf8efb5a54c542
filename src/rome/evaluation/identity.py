"""Identity of an evaluation: the facts about model, code, data and versions that its settings store."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rome.attacks.engine import Model
from rome.core.wrappers import bare_name, unwrapped
from rome.data.base import Pixels
from rome.experts.gate_override import LEARNED, routing_of
from rome.experts.recording import expert_layers
from rome.models.inspection import Inspection
from rome.models.module_tree import tensor_bytes, tensors
from rome.runs.origin import differences

CODE, UNKNOWN, CHANGING = "code", "unknown", "changing"
_NAMED = {"attributes", CODE}
"""Facts about a model that are mappings from names to values."""
_READERS = ("report", "cli")
"""Packages of rome that no result depends on: they only read results, or start the code that computes them."""


def identity(model: Model) -> dict[str, Any]:
    """Facts that distinguish a model from others.

    They are its class, the hash of its tensors, the other values it computes with
    (:meth:`rome.models.inspection.Inspection.model`), the user's ``code`` that it runs, the parts that are ``unknown``,
    and its routing if that is not the learned one. For a function that is no module, whose weights cannot be seen, they
    are its type and a hash of None.
    """
    inner = unwrapped(model)
    facts = {"type": type(inner).__name__, "sha256": hash_model(inner), **facts_without_tensors(inner)}
    if isinstance(inner, nn.Module) and (routing := routing_of(inner)) != LEARNED:
        facts["routing"] = routing
    return facts


def other_model(model: Model, kept: Mapping[str, Any]) -> list[str]:
    """Differences between a model and the one that the facts ``kept`` in an evaluation's settings describe."""
    return differences({"model": kept}, {"model": without_changing(identity(model), kept.get(CHANGING, ()))})


def facts_without_tensors(model: Model) -> dict[str, Any]:
    """The facts of :func:`identity` that do not come from tensors."""
    inner = unwrapped(model)
    if not isinstance(inner, nn.Module):
        return {}
    inspection = Inspection()
    return {**inspection.model(inner), CODE: inspection.code, UNKNOWN: list(inspection.unknown)}


def code_of(parts: Iterable[object]) -> tuple[dict[str, str], list[str]]:
    """The user's code that suites, threats and cases run, and which of their parts cannot be told apart from others."""
    inspection = Inspection()
    for part in parts:
        inspection.of(part)
    return inspection.code, list(inspection.unknown)


def without_changing(facts: Mapping[str, Any], changing: Iterable[str]) -> dict[str, Any]:
    """Drop the facts that a forward pass is ``changing``: counters and caches, which are not settings."""
    gone = set(changing)
    kept = {part: {name: text for name, text in facts[part].items() if name not in gone} for part in _NAMED & {*facts}}
    return {**facts, **kept, **({CHANGING: sorted(gone)} if gone else {})}


def changed_names(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Names of the facts that differ between two calls of :func:`facts_without_tensors`."""
    return {name for part in _NAMED for name, _ in before.get(part, {}).items() ^ after.get(part, {}).items()}


def hash_data(x: Tensor | Pixels, y: Tensor) -> str:
    """SHA-256 of the shapes, types and values of images (as floats) and labels."""
    digest = hashlib.sha256()
    for tensor in (x, y):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for start in range(0, len(tensor), 256):
            digest.update(tensor_bytes(tensor[start : start + 256]))
    return digest.hexdigest()


def hash_model(model: Model) -> str | None:
    """SHA-256 of a model's tensors: names and values of all parameters and buffers, also those not in a checkpoint.

    It includes how gates are overridden, and does not depend on wrappers (``torch.compile``, ``DataParallel``). None
    for a function that is no module, whose weights cannot be seen.
    """
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        return None
    digest = hashlib.sha256()
    for name, value in tensors(model).items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        else:  # a module's extra state
            digest.update(Inspection().of(value).encode())
    for name, layer in expert_layers(model).items():
        if layer.routing != LEARNED or layer.scale != 1:
            digest.update(f"{bare_name(model, name)} {layer.routing} {layer.scale}".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages whose code determines a result; for a checkout of rome, with the hash of its source."""
    found = {}
    for name in ("rome-robust", "torch", "pyautoattack", "timm", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if source := _source():
        found["rome-robust"] += f"+{source}"
    return found


@functools.cache
def _source() -> str:
    """Hash of rome's code in a checkout, where edits do not change the version; empty for an installed package."""
    folder = Path(__file__).parents[1]
    if {"site-packages", "dist-packages"} & set(folder.parts):
        return ""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder)
        if inside.parts[0] not in _READERS:
            digest.update(f"{inside.as_posix()} ".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
