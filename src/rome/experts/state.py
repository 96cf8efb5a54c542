"""The state that experts add to a model, the settings they were added with, and the weights they were added to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from rome.core.errors import UserError
from rome.core.wrappers import bare_name, bare_state, unwrapped
from rome.experts.recording import expert_layers

SETTINGS, BESIDE = "experts_settings", "experts_beside"
"""Attributes of a module with experts: their settings, and the :func:`fingerprint` of its other weights."""
PART = "part"
"""Key in saved settings: the name of the module that got the experts, if that is not the whole model."""


def settings_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return the settings of all experts in a model, those of inner modules first.

    Raises:
        UserError: a layer has experts whose settings are not recorded in the model.
    """
    inner = unwrapped(model)
    found: list[dict[str, Any]] = []
    for name, module in inner.named_modules():
        part = bare_name(inner, name) if name else ""
        found = [{**each, **({PART: part} if part else {})} for each in vars(module).get(SETTINGS, [])] + found
    parts = [each.get(PART, "") for each in found]
    for name in expert_names(inner):
        if not any(not part or f"{name}.".startswith(f"{part}.") for part in parts):
            raise UserError(
                f"the settings of the experts at {name} are unknown, and without them no file could be loaded: the "
                "module that rome.add_experts was called with is not in this model; save that module"
            )
    return found


def expert_names(model: nn.Module) -> list[str]:
    """Return the names of the adapted layers, without those of wrappers."""
    inner = unwrapped(model)
    return [bare_name(inner, name) for name in expert_layers(inner)]


def expert_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that experts add to a model's state; empty if there are no experts."""
    state = bare_state(model)
    layers = dict(zip(expert_names(model), expert_layers(unwrapped(model)).values(), strict=True))
    shared = {f"{name}.{key}" for name, layer in layers.items() for key in layer.shared}
    places = tuple(f"{name}." for name in layers)
    return {name: value for name, value in state.items() if name.startswith(places) and name not in shared}


def record_settings(model: nn.Module, settings: dict[str, Any]) -> None:
    """Record on a model the experts it just got. Copies and saved files keep the record, which loading uses."""
    object.__setattr__(model, SETTINGS, [*vars(model).get(SETTINGS, []), settings])
    object.__setattr__(model, BESIDE, fingerprint(model))


def base_weights_changed(model: nn.Module) -> bool:
    """Whether weights other than the experts' changed since the experts were added."""
    signed = [module for module in unwrapped(model).modules() if BESIDE in vars(module)]
    return any(vars(module)[BESIDE] != fingerprint(module) for module in signed)


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of all tensors other than the experts', with their names and without batch counters."""
    experts, digest = expert_state(model), hashlib.sha256()
    for name, value in sorted(bare_state(model).items()):
        if name not in experts and not name.endswith("num_batches_tracked"):
            if is_lazy(value) or value.is_meta:
                return ""
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
