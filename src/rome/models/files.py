"""Saving models and experts, and loading them again: safetensors, with how they were built in the metadata."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from rome import trust
from rome.errors import UserError, first_line
from rome.experts import Experts, expert_layers
from rome.files import replace_with
from rome.models.building import ModelSettings, create_model
from rome.models.loading import fit, read_tensors


def save_model(model: nn.Module, path: str | Path, *, config: dict[str, Any] | None = None) -> None:
    """Write all weights as safetensors, with the config inside its metadata; replaces the file in one step."""
    _write(dict(model.state_dict()), path, _metadata("model", model, config))


def save_experts(model: nn.Module, path: str | Path, *, config: dict[str, Any] | None = None) -> None:
    """Write only what the experts add (A, B, gates, projections) as safetensors, with their settings as metadata."""
    _write(_expert_state(model), path, _metadata("experts", model, config))


def load_experts(model: nn.Module, path: str | Path) -> nn.Module:
    """Read experts saved by :func:`save_experts` into a model; a model without experts gets them first.

    Raises:
        UserError: not such a file, or it does not fit the model (the message names the tensors).
    """
    metadata, tensors = read_tensors(path)
    if metadata.get("format") not in (None, "experts"):
        raise UserError(f"{path} holds a whole model, not experts alone; use rome.load_model(path, model)")
    _check_settings(metadata.get("experts"), model, path)
    target = model
    if not expert_layers(model):
        if not metadata.get("experts"):
            raise UserError(f"{path} does not say which experts it holds; call rome.add_experts(model, ...) first")
        target = _inject(metadata["experts"], copy.deepcopy(model), path)  # nothing changes if it does not fit
    fit(target, tensors, expected=set(_expert_state(target)), path=path)
    if target is not model:
        _inject(metadata["experts"], model, path)
        fit(model, tensors, expected=set(_expert_state(model)), path=path)
    return model


@trust.opens_files
def load_model(path: str | Path, model: nn.Module | None = None, *, trust_code: bool = False) -> nn.Module:
    """A model from a file saved by :func:`save_model`, in evaluation mode.

    Args:
        path: the file, or a run's folder.
        model: your own module to load into; None builds the model from the config in the file.
        trust_code: build it also if the file names code for that, and no training of yours wrote it here
            (:mod:`rome.trust`).

    Raises:
        UserError: not such a file, or it does not fit.
    """
    metadata, tensors = read_tensors(path, follow=model is None)
    if metadata.get("format") == "experts":
        raise UserError(f"{path} holds experts alone, without a backbone; use rome.load_experts(model, path)")
    if model is None:
        if not metadata.get("model"):
            raise UserError(f"{path} does not say how its model is built; pass the module to load it into")
        model = _built(metadata["model"], path)
    _check_settings(metadata.get("experts"), model, path)
    if metadata.get("experts") and not expert_layers(model):
        trial = _inject(metadata["experts"], copy.deepcopy(model), path)  # nothing changes if it does not fit
        fit(trial, tensors, expected=set(trial.state_dict()), path=path)
        _inject(metadata["experts"], model, path)
    fit(model, tensors, expected=set(model.state_dict()), path=path)
    return model.eval()


def _built(recipe: dict[str, Any], path: str | Path) -> nn.Module:
    """The untrained model whose arguments of :func:`create_model` a file keeps; it needs no weights but the file's."""
    own = {key: value for key, value in recipe.items() if key in ModelSettings.model_fields and key != "args"}
    try:
        settings = ModelSettings(**own).untrained().model_dump(exclude={"args"}, exclude_none=True)
        return create_model(**settings, **{key: value for key, value in recipe.items() if key not in own})
    except (ValidationError, TypeError) as error:  # nonsense; the latter without a number of classes
        raise UserError(f"{path} does not say how its model is built; pass the module to load it into") from error


def _metadata(kind: str, model: nn.Module, config: dict[str, Any] | None) -> dict[str, Any]:
    from rome import __version__  # late: rome imports this module

    recipe = getattr(model, "recipe", None)
    try:
        json.dumps(recipe)
    except TypeError:  # an argument such as act_layer=nn.GELU: such a model has to be built by its owner
        recipe = None
    return {
        "format": kind,
        "version": __version__,
        "model": recipe,
        "experts": getattr(model, "experts_settings", None),
        "config": config,
    }


def _write(state: dict[str, Tensor], path: str | Path, metadata: dict[str, Any]) -> None:
    own = {
        name: tensor.detach().clone().contiguous() for name, tensor in state.items()
    }  # tied weights are written twice
    try:
        replace_with(Path(path), lambda partial: save_file(own, partial, {"rome": json.dumps(metadata)}))
        trust.record(Path(path), metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({first_line(error)}): is the disk full?") from error


def _expert_state(model: nn.Module) -> dict[str, Tensor]:
    layers = expert_layers(model)
    if not layers:
        raise UserError("this model has no experts to save or load: call rome.add_experts(model) first")
    return {
        f"{name}.{key}": value
        for name, layer in layers.items()
        for key, value in layer.state_dict().items()
        if key not in layer.shared
    }


NO_MATTER = {"regularizer", "layers", "experts", "rank", "projection", "projection_dim"}
"""Settings of experts that change no output, or that the names and shapes of the tensors tell."""


def _check_settings(saved: Any, model: nn.Module, path: str | Path) -> None:
    """Some settings of gates are in no tensor: the weights would fit a model that computes something else with them.

    Raises:
        UserError: the model's experts were made with other settings than the saved ones.
    """
    theirs = saved if isinstance(saved, list) else [saved] if saved else []
    for own, other in zip(getattr(model, "experts_settings", []), theirs, strict=False):
        for key in (own.keys() & other.keys()) - NO_MATTER:
            if own[key] != other[key]:
                raise UserError(
                    f"{path} holds experts with {key}: {other[key]}, the model's have {own[key]}; "
                    "add them with the same settings, or load into a model without experts"
                )


def _inject(settings: list[dict[str, Any]] | dict[str, Any], model: nn.Module, path: str | Path) -> nn.Module:
    """Add experts as often as the saved model got some; one that got some once may say so without a list."""
    for each in settings if isinstance(settings, list) else [settings]:
        plain = dict(each)
        try:
            Experts.of_kind(plain.pop("kind")).model_validate(plain).inject(model)
        except UserError:
            raise
        except Exception as error:  # also what sizes without sense raise
            raise UserError(f"{path} holds experts this version cannot build: {first_line(error)}") from error
    return model
