"""Models: logits from images in [0, 1], normalisation inside; building, saving and loading them."""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors
import timm
import torch
from pydantic import Field
from safetensors.torch import save_file
from torch import Tensor, nn

from rome.component import Settings
from rome.errors import UserError, did_you_mean
from rome.experts import Experts, expert_layers, record_gates


class Classifier(nn.Module):
    """A backbone behind its normalisation: images (B, C, H, W) in [0, 1] to logits (B, classes)."""

    mean: Tensor
    std: Tensor
    recipe: dict[str, Any] | None = None
    """The arguments of :func:`create_model`, saved with the weights."""

    def __init__(self, backbone: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.backbone((images - self.mean) / self.std)


class ModelSettings(Settings):
    """The ``model`` part of a config, and the arguments of :func:`create_model`."""

    name: str
    """A timm model, or ``file.py:function`` / ``package.module:function`` that returns a module."""
    num_classes: int | None = Field(default=None, ge=2)
    """None takes the data set's."""
    img_size: int | None = Field(default=None, ge=1)
    patch_size: int | None = Field(default=None, ge=1)
    in_chans: int | None = Field(default=None, ge=1)
    pretrained: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the timm model or the function, such as ``depth: 6``."""
    weights: str | None = None
    """A safetensors file saved by rome, or a run's folder, to start from."""


def create_model(
    name: str,
    *,
    num_classes: int,
    img_size: int | None = None,
    patch_size: int | None = None,
    in_chans: int = 3,
    pretrained: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    **args: Any,
) -> Classifier:
    """A timm model, or your own, as a classifier of images in [0, 1].

    Args:
        name: a timm model name, optionally with a weight tag (``vit_base_patch16_224.augreg_in21k``), or
            ``file.py:function`` / ``package.module:function`` called with ``num_classes`` and ``args``.
        num_classes: number of logits.
        img_size, patch_size: in pixels; None leaves the model's own. Position and patch embeddings of pretrained
            weights are resampled by timm.
        in_chans: image channels.
        pretrained: load the tag's weights (needs the network once).
        mean, std: normalisation per channel; None takes the model's own from timm, or 0.5.
        args: passed on, such as ``depth=6, embed_dim=192``.

    Raises:
        UserError: unknown name or an argument that the model does not take.
    """
    sizes: dict[str, Any] = {
        key: value for key, value in (("img_size", img_size), ("patch_size", patch_size)) if value is not None
    }
    try:
        if ":" in name:
            backbone = _own_function(name)(num_classes=num_classes, **sizes, **args)
        else:
            if not timm.is_model(name):
                near = difflib.get_close_matches(name, timm.list_models(), n=8, cutoff=0.5)
                hint = did_you_mean(name, near) if near else " timm.list_models() names all."
                raise UserError(f"unknown model {name!r}.{hint}")
            backbone = timm.create_model(
                name, pretrained=pretrained, num_classes=num_classes, in_chans=in_chans, **sizes, **args
            )
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError, LookupError) as error:
        given = ", ".join(f"{key}={value}" for key, value in {**sizes, "in_chans": in_chans, **args}.items())
        raise UserError(f"model {name} cannot be built with {given}: {_first_line(error)}") from error
    except OSError as error:
        raise UserError(f"the weights of {name} cannot be had: {_first_line(error)}") from error
    if not isinstance(backbone, nn.Module):
        raise UserError(f"{name} returned a {type(backbone).__name__}, not a torch module")
    known = getattr(backbone, "pretrained_cfg", None) or {}
    mean = _per_channel(mean if mean is not None else known.get("mean", (0.5,)), in_chans, "mean")
    std = _per_channel(std if std is not None else known.get("std", (0.5,)), in_chans, "std")
    if min(std) <= 0:
        raise UserError(f"model.std must be positive, not {std}")
    model = Classifier(backbone, mean, std)
    model.recipe = {"name": name, "num_classes": num_classes, **sizes, "in_chans": in_chans, "mean": mean, "std": std}
    model.recipe |= args
    return model


def build_model(
    settings: ModelSettings, experts: Experts | None, *, classes: int, shape: tuple[int, int, int]
) -> Classifier:
    """The model of a config for a data set of that many classes and image shape (C, H, W), with its experts.

    Raises:
        UserError: the settings do not fit the data, each other, or the starting weights.
    """
    if settings.num_classes not in (None, classes):
        raise UserError(f"model.num_classes is {settings.num_classes} but the data has {classes} classes; leave it out")
    if settings.in_chans not in (None, shape[0]):
        raise UserError(f"model.in_chans is {settings.in_chans} but the data has {shape[0]} channels; leave it out")
    own = settings.model_dump(exclude={"args", "weights"}, exclude_none=True)
    twice = sorted(set(settings.args) & (set(ModelSettings.model_fields) - {"args", "weights"}))
    if twice:
        raise UserError(f"model.args: {', '.join(twice)} is a setting of the model itself; write model.{twice[0]}")
    model = create_model(**{**own, "num_classes": classes, "in_chans": shape[0]}, **settings.args)
    if settings.weights is not None:
        load_weights(model, settings.weights)
    if experts is not None:
        experts.inject(model)
    model.eval()
    try:
        with torch.no_grad(), record_gates(model) if experts is not None else nullcontext() as recorder:
            logits = model(torch.zeros(2, *shape))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UserError(
            f"model {settings.name} does not take images of {'x'.join(map(str, shape))}: {_first_line(error)}; "
            "set model.img_size and model.patch_size"
        ) from error
    if logits.shape != (2, classes):
        raise UserError(f"model {settings.name} gives outputs {tuple(logits.shape)} for 2 images, not (2, {classes})")
    if recorder is not None:
        for name, gates in recorder.gates.items():
            if len(gates.weights) != 2:
                raise UserError(
                    f"layer {name} sees {len(gates.weights)} inputs for 2 images, so its global gate would not average "
                    "over the image. Leave it out of experts.layers."
                )
    return model.train()


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
    target = model
    if not expert_layers(model):
        if not metadata.get("experts"):
            raise UserError(f"{path} does not say which experts it holds; call rome.add_experts(model, ...) first")
        target = _experts(metadata["experts"], path).inject(copy.deepcopy(model))  # nothing changes if it does not fit
    _fit(target, tensors, expected=set(_expert_state(target)), path=path)
    if target is not model:
        _experts(metadata["experts"], path).inject(model)
        _fit(model, tensors, expected=set(_expert_state(model)), path=path)
    return model


def load_model(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A model from a file saved by :func:`save_model`, in evaluation mode.

    Args:
        path: the file, or a run's folder.
        model: your own module to load into; None builds the model from the config in the file.

    Raises:
        UserError: not such a file, or it does not fit.
    """
    metadata, tensors = read_tensors(path)
    if metadata.get("format") == "experts":
        raise UserError(f"{path} holds experts alone, without a backbone; use rome.load_experts(model, path)")
    if model is None:
        if not metadata.get("model"):
            raise UserError(f"{path} does not say how its model is built; pass the module to load it into")
        model = create_model(**metadata["model"])
    if metadata.get("experts") and not expert_layers(model):
        trial = _experts(metadata["experts"], path).inject(copy.deepcopy(model))  # nothing changes if it does not fit
        _fit(trial, tensors, expected=set(trial.state_dict()), path=path)
        _experts(metadata["experts"], path).inject(model)
    _fit(model, tensors, expected=set(model.state_dict()), path=path)
    return model.eval()


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Start from the weights of a saved model without experts, or of its backbone where it has some."""
    _, tensors = read_tensors(path)
    wanted = set(model.state_dict())
    _fit(model, {name: tensor for name, tensor in tensors.items() if name in wanted}, expected=wanted, path=path)


def read_tensors(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and tensors of a safetensors file of ours; ``path`` may be a run's folder.

    Raises:
        UserError: no such file, or not a safetensors file.
    """
    file = Path(path)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        hint = " (the run is not finished: rome train ... --resume)" if (file.parent / "last.pt").exists() else ""
        raise UserError(f"there is no model at {file}{hint}; give a finished run's folder or a .safetensors file")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = json.loads((opened.metadata() or {}).get("rome", "{}"))
            return metadata, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise UserError(
            f"{file} is not a readable safetensors file ({_first_line(error)}); train or copy it again"
        ) from error


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    own = {
        name: tensor.detach().clone().contiguous() for name, tensor in state.items()
    }  # tied weights are written twice
    save_file(own, partial, {"rome": json.dumps(metadata)})
    os.replace(partial, file)


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


def _experts(settings: dict[str, Any], path: str | Path) -> Experts:
    plain = dict(settings)
    try:
        return Experts.of_kind(plain.pop("kind")).model_validate(plain)
    except Exception as error:
        raise UserError(f"{path} holds experts this version cannot build: {_first_line(error)}") from error


def _fit(model: nn.Module, tensors: dict[str, Tensor], *, expected: set[str], path: str | Path) -> None:
    own = model.state_dict()
    problems = [f"{name} is missing in the file" for name in sorted(expected - set(tensors))]
    problems += [f"{name} is not in the model" for name in sorted(set(tensors) - set(own))]
    problems += [
        f"{name} is {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in sorted(set(tensors) & set(own))
        if tensors[name].shape != own[name].shape
    ]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")
        raise UserError(f"{path} does not fit the model: {shown}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _own_function(name: str) -> Any:
    place, _, function = name.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        return getattr(module, function)
    except (ImportError, FileNotFoundError, AttributeError, SyntaxError) as error:
        raise UserError(f"model {name!r} cannot be imported: {_first_line(error)}") from error


def _per_channel(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1 or channels == 1:
        return (sum(values) / len(values),) * channels
    raise UserError(f"model.{name} has {len(values)} values but images have {channels} channels")


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
