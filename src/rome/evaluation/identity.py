"""What tells one evaluation from another: model, code, data and versions, as an evaluation's settings keep them."""

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
"""Facts of a model that have names of their own."""
_READERS = ("report", "cli")
"""Parts of rome that no result depends on: they read them, or start what makes them."""


def identity(model: Model) -> dict[str, Any]:
    """Class and tensors of a model, what else it computes with (:meth:`rome.models.inspection.Inspection.model`), the
    user's ``code`` that it runs, what of it is ``unknown``, and its routing where it is not the learned one.

    Of a function that is no module there is only its type: its weights cannot be seen.
    """
    inner = unwrapped(model)
    facts: dict[str, Any] = {"type": type(inner).__name__, "sha256": hash_model(inner)}
    if not isinstance(inner, nn.Module):
        return facts
    facts |= aside(inner)
    routing = routing_of(inner)
    return facts if routing == LEARNED else {**facts, "routing": routing}


def other_model(model: Model, kept: Mapping[str, Any]) -> list[str]:
    """In what a model is another than the one of which an evaluation keeps these facts."""
    now = settled(identity(model), kept.get(CHANGING, ()))
    return differences({"model": kept}, {"model": now})


def aside(model: Model) -> dict[str, Any]:
    """The part of :func:`identity` that is not in tensors."""
    inner = unwrapped(model)
    if not isinstance(inner, nn.Module):
        return {}
    inspection = Inspection()
    return {**inspection.model(inner), CODE: inspection.code, UNKNOWN: list(inspection.unknown)}


def code_of(parts: Iterable[object]) -> tuple[dict[str, str], list[str]]:
    """The user's code that suites, threats and attacks run, and what of these cannot be distinguished from others."""
    inspection = Inspection()
    for part in parts:
        inspection.of(part)
    return inspection.code, list(inspection.unknown)


def settled(facts: Mapping[str, Any], changing: Iterable[str]) -> dict[str, Any]:
    """The facts without those that a forward changes: counters and caches, which are no settings."""
    gone = set(changing)
    kept = {part: {name: text for name, text in facts[part].items() if name not in gone} for part in _NAMED & {*facts}}
    return {**facts, **kept, **({CHANGING: sorted(gone)} if gone else {})}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """The names under which two such facts differ."""
    return {name for part in _NAMED for name, _ in before.get(part, {}).items() ^ after.get(part, {}).items()}


def hash_data(x: Tensor | Pixels, y: Tensor) -> str:
    """SHA-256 of images, as floats, and labels: shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in (x, y):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for start in range(0, len(tensor), 256):
            digest.update(tensor_bytes(tensor[start : start + 256]))
    return digest.hexdigest()


def hash_model(model: Model) -> str | None:
    """SHA-256 of the names and values of all parameters and buffers, also those a checkpoint leaves out, and of which
    gates are inverted; the same whatever ``torch.compile`` or ``DataParallel`` put around it. None for a function that
    is no module: its weights cannot be seen."""
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
    """Of the packages whose code determines a result; of a rome that is no release with the hash of its source."""
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
    """Hash of rome's own code where it is used from a checkout, whose version stays while it is edited."""
    folder = Path(__file__).parents[1]
    if {"site-packages", "dist-packages"} & set(folder.parts):
        return ""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder)
        if inside.parts[0] not in _READERS:
            digest.update(f"{inside.as_posix()} ".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
