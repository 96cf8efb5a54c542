"""Saving and loading models and experts as safetensors files, whose metadata says how to build them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rome.core import trust
from rome.core.console import say
from rome.core.errors import UserError, first_line
from rome.core.files import replace_with
from rome.core.version import __version__
from rome.core.wrappers import bare_state, unwrapped
from rome.experts.state import base_weights_changed, expert_state, fingerprint, settings_of
from rome.models.adapted import copy_with_experts
from rome.models.building import ModelSettings, build_without_weights
from rome.models.classifier import Classifier
from rome.models.fitting import fit
from rome.models.loading import other_layers, read_tensors
from rome.models.module_tree import layer_counts

BARE, INSIDE = "backbone", "backbone."
"""Format of a file that holds only a :class:`Classifier`'s backbone; prefix of the backbone's names in other files."""


def save_model(model: nn.Module, path: str | Path, *, config: dict[str, Any] | None = None) -> None:
    """Write all weights as safetensors, with the config in the metadata. An existing file is replaced atomically.

    If the model is compiled or wrapped (DataParallel, AveragedModel), the inner model is saved.

    Raises:
        UserError: the file cannot be written, or the model's state holds more than tensors.
    """
    extra = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if extra:
        raise UserError(f"the model's state holds {extra[0]}, which is not a tensor; save the model with torch.save")
    _write(bare_state(model), path, _metadata("model", model, config))


def save_experts(model: nn.Module, path: str | Path, *, config: dict[str, Any] | None = None) -> None:
    """Write only the experts' tensors (A, B, gates, projections) as safetensors, with their settings in the metadata.

    The metadata also holds a hash of the model's other weights, and whether these changed after the experts were added.

    Raises:
        UserError: the file cannot be written, or the model has no experts.
    """
    state = _own_experts(model)
    beside = {"beside": fingerprint(model), "moved": base_weights_changed(model)}
    _write(state, path, _metadata("experts", model, config) | beside)


def load_experts(model: nn.Module, path: str | Path, *, any_backbone: bool = False) -> nn.Module:
    """Load experts saved by :func:`save_experts` into a model, which gets them added first if it has none.

    If the model's other weights differ from those the experts were saved with, the experts are refused if both had been
    trained together; otherwise a line on standard error reports the difference.

    Args:
        any_backbone: load the experts whatever the model's other weights are, without a message; for example into a
            copy in half precision.

    Raises:
        UserError: the file was not written by :func:`save_experts`, does not fit the model (the message names the
            tensors), or belongs to other weights.
    """
    metadata, tensors = read_tensors(path)
    if metadata.get("format") not in (None, "experts"):
        raise UserError(f"{path} holds a whole model, not only experts; use rome.load_model(path, model)")
    if not metadata.get("experts") and not expert_state(model):
        raise UserError(f"{path} does not say which experts it holds; add them with rome.add_experts(model, ...) first")

    def copy_into(target: nn.Module) -> None:
        expected = set(_own_experts(target))
        if not any_backbone and metadata.get("moved", True) and metadata.get("beside") != fingerprint(target):
            raise UserError(
                f"{path} holds experts that were trained together with the model's other weights, and this model has "
                "different ones: save the whole model (rome.save_model), or load them anyway with any_backbone=True"
            )
        fit(target, tensors, expected=expected, path=path)

    copy_with_experts(model, metadata.get("experts") or [], path, copy_into)
    if not any_backbone and metadata.get("beside") != fingerprint(model):
        say(f"{path}: the model has other weights than the one that these experts were saved from")
    return model


def copy_with(change: Callable[[dict[str, Any]], dict[str, Any]], path: Path, target: Path, *, bare: bool) -> None:
    """Copy a file of :func:`save_model` with changed metadata.

    Args:
        change: returns the new metadata, given the old.
        bare: keep only the backbone's tensors, under the names that timm uses. The normalisation is in the metadata, so
            :func:`load_model` still reads the file.
    """
    metadata, tensors = read_tensors(path)
    if bare:
        metadata["format"] = BARE
        tensors = {name.removeprefix(INSIDE): each for name, each in tensors.items() if name.startswith(INSIDE)}
    _write(tensors, target, change(metadata))


@trust.opens_files
def load_model(path: str | Path, model: nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """Load a model saved by :func:`save_model`, and return it in evaluation mode.

    Args:
        path: the file, a run's folder, or a model on the Hub: ``hf://USER/NAME`` or ``hf://USER/NAME@REVISION`` for a
            commit, branch or tag (:mod:`rome.models.hub`).
        model: your own module to load into; None builds the model from the metadata in the file.
        trust_code: run code that the file names for building the model, even if none of your trainings on this machine
            wrote the file (:mod:`rome.core.trust`).

    Raises:
        UserError: the file was not written by :func:`save_model`, or does not fit.
    """
    metadata, tensors = read_tensors(path, follow=model is None)
    if metadata.get("format") == "experts":
        raise UserError(f"{path} holds only experts, without a backbone; use rome.load_experts(model, path)")
    built = model is None
    if not metadata and built:
        raise UserError(
            f"{path} was not saved by rome and does not say how to build its model: start from it as model.weights, or "
            "pass the module to load it into"
        )
    if model is None:
        model = _built(metadata.get("model") or {}, path)
    if metadata.get("format") == BARE and isinstance(unwrapped(model), Classifier):
        tensors = {INSIDE + name: each for name, each in tensors.items()} | _normalization(
            metadata["model"] or {}, path
        )

    def copy_into(target: nn.Module) -> None:
        fit(target, tensors, expected=set(bare_state(target)), path=path)

    copy_with_experts(model, metadata.get("experts") or [], path, copy_into)
    if different := other_layers(metadata, model):
        message = f"{path} was saved from a model with {different}"
        if built:
            raise UserError(f"{message}: it was changed after it was built; pass the module to load it into")
        say(message)
    return model.eval()


def _built(recipe: dict[str, Any], path: str | Path) -> nn.Module:
    """Build the model that a file's metadata describes, without loading its initial weights."""
    own = {key: value for key, value in recipe.items() if key in ModelSettings.model_fields}
    args = {key: value for key, value in recipe.items() if key not in own}
    try:
        return build_without_weights(ModelSettings(**own, args=args).without_weights())
    except UserError as error:
        raise UserError(
            f"the model of {path} cannot be built from the file's metadata ({error}); pass the module to load it into"
        ) from error


def _normalization(recipe: dict[str, Any], path: str | Path) -> dict[str, Tensor]:
    """Return the buffers ``mean`` and ``std`` of a :class:`Classifier` from the metadata of a file of its backbone."""
    try:
        return {name: torch.tensor(recipe[name], dtype=torch.float32).view(1, -1, 1, 1) for name in ("mean", "std")}
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not state the normalisation of its model; train or copy it again") from error


def _metadata(kind: str, model: nn.Module, config: dict[str, Any] | None) -> dict[str, Any]:
    recipe = getattr(unwrapped(model), "recipe", None)
    try:
        json.dumps(recipe)
    except TypeError:  # an argument such as act_layer=nn.GELU: users must rebuild such a model themselves
        recipe = None
    return {
        "format": kind,
        "version": __version__,
        "model": recipe,
        "experts": settings_of(model) or None,
        "config": config,
        "layers": layer_counts(model),
    }


def _write(state: dict[str, Tensor], path: str | Path, metadata: dict[str, Any]) -> None:
    own = {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}  # clones: weights may be tied
    try:
        file = Path(path).expanduser()
        replace_with(file, lambda partial: save_file(own, partial, {"rome": json.dumps(metadata)}))
        trust.record(file, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({first_line(error)}): check the path and the free disk space"
        ) from error


def _own_experts(model: nn.Module) -> dict[str, Tensor]:
    state = expert_state(model)
    if not state:
        raise UserError("this model has no experts to save or load: call rome.add_experts(model) first")
    return state
