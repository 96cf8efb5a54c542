"""Reading weights from rome's files and other projects' checkpoints, and loading them into models."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from rome.core import trust
from rome.core.errors import UserError, first_line, some
from rome.core.plain_data import Unreadable, parse_json
from rome.core.wrappers import bare_state, unwrapped
from rome.experts.state import PART, expert_state
from rome.models.adapted import copy_with_experts, inject
from rome.models.classifier import Classifier
from rome.models.fitting import backbone_and_prefix, find, fit, head_names, numbers
from rome.models.hub import local_file
from rome.models.module_tree import layer_counts
from rome.models.pickles import load_pickle

PYAUTOATTACK = "pyautoattack"
"""Source of the weights of ``resnet_18`` for CIFAR-10 that come with the installed package of this name."""
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".tar")
"""Usual suffixes of files of ``torch.save``. Readable files are recognised by their content instead."""
DEPTH = 8
"""Depth up to which a checkpoint's dicts and lists are searched for tensors."""


def load_weights(
    model: nn.Module,
    source: str | Path,
    *,
    drop_head: bool = False,
    drop_experts: bool = False,
    key: str | None = None,
    keep_normalization: bool = False,
) -> list[str]:
    """Load saved weights into a model, to start from them.

    Args:
        model: with or without experts; a model without experts gets those in a file saved by rome.
        source: one of

            - a run's folder or a safetensors file saved by rome, with its normalisation and its experts;
            - any other safetensors file, a folder or index of several (``model.safetensors.index.json``), or a
              checkpoint of ``torch.save``. The model may be anywhere in it, as long as all its names are there after
              one common prefix (``state_dict.module.``, ``model.net.``). If there are several and they differ, timm's
              averaged weights are taken (``state_dict_ema``, ``model_ema``); other files are refused without a ``key``.
              The normalisation is the file's if it has one near the model (``mean`` and ``std``, ``0.mean``,
              ``normalizer.new_mean``), else that of timm's ``config.json`` in the same folder, else the model's;
            - ``hf://USER/NAME`` or ``hf://USER/NAME@REVISION``: the safetensors file of that repository on the Hub;
            - ``pyautoattack``: the ResNet-18 for CIFAR-10 that comes with that package.
        drop_head: leave out the file's last layer, and keep the model's.
        drop_experts: leave out the file's experts.
        key: which model to take if the file holds several, such as ``state_dict`` or ``teacher``.
        keep_normalization: keep the model's normalisation, even if the file has one.

    Returns:
        What a reader of results should know: what was chosen, left out or converted.

    Raises:
        UserError: the file is missing, holds more than tensors, or does not fit. The message counts and names tensors
            that are missing, unexpected, or of a different shape or number type. The model then stays unchanged.
    """
    file = weights_file(source)
    metadata, tensors = read_weights(file)
    if metadata.get("format") == "experts":
        raise UserError(f"{file} holds only experts, without a backbone; use rome.load_experts(model, path)")
    name = str(source)
    head = tuple(f"{layer}." for layer in head_names(model))
    if drop_head and not head:
        raise UserError("this model has no Linear layer, so it is unknown which layer is its head")
    # the file's model may be nested more or less deeply than this one, so its experts are added to the whole model
    saved = [{key: value for key, value in each.items() if key != PART} for each in metadata.get("experts") or []]
    left_out = head if drop_head else ()
    if drop_experts and saved:
        left_out += tuple(expert_state(inject(saved, copy.deepcopy(model), name)))
    remarks: list[str] = []

    def copy_into(target: nn.Module) -> None:
        backbone, inside = backbone_and_prefix(target)
        skipped = left_out + tuple(inside + unused for unused in getattr(backbone, "unused", ()))
        own = {n.removeprefix(inside): value for n, value in bare_state(target).items() if n.startswith(inside)}
        required = {n for n in own if not n.endswith("num_batches_tracked") and not f"{inside}{n}".startswith(skipped)}
        channels = target.mean.numel() if isinstance(target, Classifier) else None
        found = find(tensors, own, required, source=name, key=key, channels=channels)
        placed = {inside + n: tensor for n, tensor in found.tensors.items() if not f"{inside}{n}".startswith(skipped)}
        hint = _hint(placed.keys() - {inside + n for n in own})
        fit(target, placed, expected={inside + n for n in required}, path=name, head=head, hint=hint)
        remarks[:] = found.remarks
        types = {tensor.dtype for tensor in placed.values() if tensor.is_floating_point()} - {torch.float32}
        if types:
            remarks.append(f"{name}: its weights are {', '.join(sorted(str(t).removeprefix('torch.') for t in types))}")
        normalization = found.normalization or _timm_normalization(file)
        if normalization is not None and isinstance(target, Classifier) and normalization[0].numel() in (1, channels):
            remarks.extend(_normalize(target, *normalization, name, keep_normalization))

    copy_with_experts(unwrapped(model), [] if drop_experts else saved, name, copy_into)
    different = "" if drop_experts else other_layers(metadata, model)
    remarks += [f"{name} was saved from a model with {different}"] if different else []
    return remarks + _other_arguments(unwrapped(model), metadata.get("model"), name)


def _timm_normalization(file: Path) -> tuple[Tensor, Tensor] | None:
    """Normalisation in the ``config.json`` that timm writes next to weights for the Hub, or None."""
    try:
        config = parse_json((file.parent / "config.json").read_bytes())["pretrained_cfg"]
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        return None
    return (mean, std) if mean.shape == std.shape and bool((std > 0).all()) else None


def _normalize(model: Classifier, mean: Tensor, std: Tensor, source: str, keep: bool) -> list[str]:
    """Copy a file's normalisation into the model unless the model's is kept, and return a remark on it."""
    theirs = f"mean {numbers(mean)}, std {numbers(std)}"
    if keep:
        ours = f"mean {numbers(model.mean)}, std {numbers(model.std)}"
        return [] if ours == theirs else [f"normalisation: {ours}, as given; {source} has {theirs}"]
    for own, value in ((model.mean, mean), (model.std, std)):
        own.copy_(value.reshape(1, -1, 1, 1).expand_as(own))
    if model.recipe is not None:
        model.recipe |= {"mean": tuple(model.mean.flatten().tolist()), "std": tuple(model.std.flatten().tolist())}
    return [f"normalisation of {source}: {theirs}"]


def _hint(unexpected: Collection[str]) -> str:
    """Guess from unexpected names what to do about them; empty without a guess."""
    if any(re.search(r"\.(A|B|gate\.\w+(\.\w+)?|router\..+)$", name) for name in unexpected):
        return (
            "; it seems to have experts, but only a file of rome.save_model holds their settings: give such a file, "
            "or a finished run"
        )
    if any(name.endswith("block1.layer.0.conv1.weight") for name in unexpected):
        return "; its names are those of model.name=wide_resnet_trades"
    return ""


def _other_arguments(model: nn.Module, saved: Any, source: str) -> list[str]:
    """Return a remark if the saved model was built with other arguments, which may be in no tensor (activations)."""
    own = getattr(model, "recipe", None)
    if not own or not saved:
        return []
    plain = json.loads(json.dumps([saved, own], default=str))
    theirs, ours = ({k: v for k, v in each.items() if k not in ("num_classes", "mean", "std")} for each in plain)
    differing = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
    arguments = ", ".join(f"{k}={theirs.get(k)} (here {ours.get(k)})" for k in differing)
    return [f"{source} was saved from a model with {arguments}"] if differing else []


def other_layers(metadata: Mapping[str, Any], model: nn.Module) -> str:
    """List the module classes, such as activations, of which the saved model had more or fewer than ``model``; empty
    if the file does not say or nothing differs."""
    saved, own = metadata.get("layers") or {}, layer_counts(model)
    differing = [k for k in sorted({*saved, *own}) if saved.get(k) != own.get(k)] if saved else []
    return ", ".join(f"{saved.get(k, 0)} {k} (here {own.get(k, 0)})" for k in differing)


def weights_file(source: str | Path) -> Path:
    """Return the local file of a source of weights.

    Raises:
        UserError: ``pyautoattack`` is not installed with its weights.
    """
    if str(source) == PYAUTOATTACK:
        package = importlib.util.find_spec(PYAUTOATTACK)
        shipped = Path(package.origin).parent / "examples" / "model_test.pt" if package and package.origin else None
        if shipped is None or not shipped.is_file():
            raise UserError("pyautoattack is not installed with its example weights: pip install pyautoattack==0.2.0")
        return shipped
    file = local_file(source)
    if file.is_dir():
        index = file / "model.safetensors.index.json"
        return index if index.exists() else file / "model.safetensors"
    return file


def read_weights(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read rome's metadata, empty in other files, and the tensors from a file of weights.

    Raises:
        UserError: the file is missing, or not readable without running code.
    """
    if file.name.endswith(".index.json"):
        return {}, _read_shards(file)
    try:
        with open(file, "rb") as opened:
            start = opened.read(9)
    except OSError:
        start = b""
    is_safetensors = start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size
    pickled = start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"
    if not is_safetensors and (pickled or file.suffix in CHECKPOINTS):
        return {}, read_checkpoint(file)
    return read_tensors(file)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """Read the tensors of several safetensors files that an index in Hugging Face's format lists."""
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: read_tensors(index.parent / Path(file).name)[1] for file in sorted(set(places.values()))}
        return {name: files[file][name] for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is not a valid index of safetensors files, or one of them is missing: {first_line(error)}"
        ) from error


def holds_experts(source: str | Path) -> bool:
    """Whether the metadata in a file of weights lists experts.

    Raises:
        UserError: the file is missing or not readable.
    """
    return bool(read_weights(weights_file(source))[0].get("experts"))


class _Metadata(BaseModel):
    """Schema of the metadata that rome writes into a file, for checking a file before its metadata is used."""

    format: str | None = None
    model: dict[str, Any] | None = None
    experts: list[dict[str, Any]] | None = None
    config: dict[str, Any] | None = None
    classes: list[str] | None = None
    layers: dict[str, int] | None = None


def read_tensors(path: str | Path, *, follow: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read rome's metadata, empty in other files, and the tensors from a safetensors file.

    Args:
        path: the file, a run's folder, or ``hf://USER/NAME``.
        follow: the caller will build what the metadata names, so untrusted files must not name code
            (:mod:`rome.core.trust`).

    Raises:
        UserError: the file is missing, is not a safetensors file, or has invalid metadata.
    """
    file = local_file(path)
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        hint = " (the run is not finished: rome train ... --resume)" if (file.parent / "last.pt").exists() else ""
        raise UserError(f"there is no model at {file}{hint}; give a finished run's folder or a .safetensors file")
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            metadata = parse_json((opened.metadata() or {}).get("rome", "{}"))
            _Metadata.model_validate(metadata)
            if follow:
                trust.check(file, metadata)
            return metadata, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(("metadata", *map(str, first["loc"])))
        raise UserError(f"{file} has invalid {where}: {first['msg']}; train or copy it again") from error
    except Unreadable as error:
        raise UserError(f"{file} has invalid metadata: {error}; train or copy it again") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a readable safetensors file ({first_line(error)}); train or copy it again"
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors in a file of ``torch.save``, named by their keys, to the CPU, without running code.

    Raises:
        UserError: the file is missing, cannot be read, or has no tensors in dicts.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no checkpoint at {file}; give an existing file ({', '.join(CHECKPOINTS)})")
    content = load_pickle(file)
    tensors = dict(_flat(content)) if isinstance(content, Mapping) else {}
    if not tensors:
        keys = some(list(map(str, content))) if isinstance(content, Mapping) else ""
        raise UserError(
            f"{file} holds no state dict but a {type(content).__name__}{f' ({keys})' if keys else ''}; "
            "save model.state_dict(), alone or under a key such as state_dict"
        )
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UserError(f"{file}: {name} is sparse, quantized or meta; save dense tensors with numbers")
    return tensors


def _flat(content: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in nested dicts and lists, with the keys that lead to them joined into names."""
    if isinstance(content, Tensor):
        yield name, content
    elif depth < DEPTH and isinstance(content, (Mapping, list, tuple)):
        for key, value in content.items() if isinstance(content, Mapping) else enumerate(content):
            yield from _flat(value, f"{name}.{key}" if depth else str(key), depth + 1)
