"""Facts that identify an evaluation and are stored in its settings: model, code, data and versions."""

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
_MAPPINGS = {"attributes", CODE}
"""Facts of a model that are mappings from names."""
_READERS = ("report", "cli")
"""Parts of rome that results do not depend on, since they only read results or start the commands that make them."""


def identity(model: Model) -> dict[str, Any]:
    """Return the facts that identify a model: its class, a hash of its tensors, what else it computes with
    (:meth:`rome.models.inspection.Inspection.model`), the user's ``code`` that it runs, parts that are ``unknown``, and
    its routing unless that is the learned one.

    For a function that is not a module, only its type is known, since its weights cannot be seen.
    """
    inner = unwrapped(model)
    facts: dict[str, Any] = {"type": type(inner).__name__, "sha256": hash_model(inner)}
    if not isinstance(inner, nn.Module):
        return facts
    facts |= aside(inner)
    routing = routing_of(inner)
    return facts if routing == LEARNED else {**facts, "routing": routing}


def other_model(model: Model, kept: Mapping[str, Any]) -> list[str]:
    """Differences between a model and the one that an evaluation stored the facts ``kept`` about."""
    now = settled(identity(model), kept.get(CHANGING, ()))
    return differences({"model": kept}, {"model": now})


def aside(model: Model) -> dict[str, Any]:
    """The part of :func:`identity` that does not come from tensors."""
    inner = unwrapped(model)
    if not isinstance(inner, nn.Module):
        return {}
    inspection = Inspection()
    return {**inspection.model(inner), CODE: inspection.code, UNKNOWN: list(inspection.unknown)}


def code_of(parts: Iterable[object]) -> tuple[dict[str, str], list[str]]:
    """Return the user's code that suites, threats and attacks run, and which parts of them cannot be identified."""
    inspection = Inspection()
    for part in parts:
        inspection.of(part)
    return inspection.code, list(inspection.unknown)


def settled(facts: Mapping[str, Any], changing: Iterable[str]) -> dict[str, Any]:
    """Return the facts without those named in ``changing``: counters and caches, which a forward pass changes."""
    gone = set(changing)
    kept = {
        part: {name: text for name, text in facts[part].items() if name not in gone} for part in _MAPPINGS & {*facts}
    }
    return {**facts, **kept, **({CHANGING: sorted(gone)} if gone else {})}


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> set[str]:
    """Names of the facts that differ between two calls of :func:`aside`."""
    return {name for part in _MAPPINGS for name, _ in before.get(part, {}).items() ^ after.get(part, {}).items()}


def hash_data(x: Tensor | Pixels, y: Tensor) -> str:
    """Return the SHA-256 of the shapes, types and values of the images, as floats, and labels."""
    digest = hashlib.sha256()
    for tensor in (x, y):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        for start in range(0, len(tensor), 256):
            digest.update(tensor_bytes(tensor[start : start + 256]))
    return digest.hexdigest()


def hash_model(model: Model) -> str | None:
    """Return the SHA-256 of the names and values of all parameters and buffers, including those that checkpoints omit,
    and of the routing of the gates. It does not depend on wrappers such as ``torch.compile`` or ``DataParallel``. None
    for a function that is not a module, whose weights cannot be seen."""
    model = unwrapped(model)
    if not isinstance(model, nn.Module):
        return None
    digest = hashlib.sha256()
    for name, value in tensors(model).items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
            digest.update(tensor_bytes(value))
        else:  # the extra state of a module
            digest.update(Inspection().of(value).encode())
    for name, layer in expert_layers(model).items():
        if layer.routing != LEARNED or layer.scale != 1:
            digest.update(f"{bare_name(model, name)} {layer.routing} {layer.scale}".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages whose code determines a result; that of rome has a hash of its source if it is used from
    a checkout."""
    found = {}
    for name in ("rome-robust", "torch", "pyautoattack", "timm", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    if source := _source_hash():
        found["rome-robust"] += f"+{source}"
    return found


@functools.cache
def _source_hash() -> str:
    """Hash of rome's own code in a checkout, where edits do not change the version; empty for an installed package."""
    folder = Path(__file__).parents[1]
    if {"site-packages", "dist-packages"} & set(folder.parts):
        return ""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        inside = file.relative_to(folder)
        if inside.parts[0] not in _READERS:
            digest.update(f"{inside.as_posix()} ".encode() + file.read_bytes())
    return digest.hexdigest()[:12]
