"""Reading weights: files of ours and checkpoints of others, into models that they fit."""

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
from rome.models.adapted import fill, inject
from rome.models.classifier import Classifier
from rome.models.fitting import find, fit, head_names, numbers, within
from rome.models.hub import local_file
from rome.models.module_tree import layer_counts
from rome.models.pickles import load_pickle

PYAUTOATTACK = "pyautoattack"
"""Names the weights of ``resnet_18`` for CIFAR-10 that come with that package, wherever it is installed."""
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".tar")
"""Usual endings of files that ``torch.save`` wrote. Files are recognised by their content, where it can be read."""
DEPTH = 8
"""How deep in a checkpoint's dicts and lists tensors are looked for."""


def load_weights(
    model: nn.Module,
    source: str | Path,
    *,
    drop_head: bool = False,
    drop_experts: bool = False,
    key: str | None = None,
    keep_normalization: bool = False,
) -> list[str]:
    """Start from saved weights.

    Args:
        model: with or without experts; one without gets those that a file of rome's has.
        source: one of

            - a run's folder or a safetensors file saved by rome, with its normalisation and its experts;
            - a safetensors file of others, a folder or index of several (``model.safetensors.index.json``), or a
              checkpoint of ``torch.save``: the model is found wherever in it all names of the model are, behind one
              prefix (``state_dict.module.``, ``model.net.``). Where there are several that differ, timm's averaged
              weights are taken (``state_dict_ema``, ``model_ema``); others are refused without a ``key``. Normalisation
              is the file's if it has one beside the model (``mean`` and ``std``, ``0.mean``, ``normalizer.new_mean``),
              or that of timm's ``config.json`` in its folder, otherwise the model's;
            - ``hf://USER/NAME`` or ``hf://USER/NAME@REVISION``: the safetensors file of that repository on the Hub;
            - ``pyautoattack``: the ResNet-18 for CIFAR-10 that comes with that package.
        drop_head: leave the file's last layer out, and the model's as it is.
        drop_experts: leave the file's experts out.
        key: where in the file, if there are several: ``state_dict``, ``teacher``.
        keep_normalization: keep the model's, whatever the file has.

    Returns:
        What a reader of results should know: what was chosen, left out, converted.

    Raises:
        UserError: no such file, not readable as tensors alone, or it does not fit: the message counts and names what
            is missing, unexpected, of another shape or another type of number. The model is unchanged then.
    """
    file = weights_file(source)
    metadata, tensors = read_weights(file)
    if metadata.get("format") == "experts":
        raise UserError(f"{file} holds experts alone, without a backbone; use rome.load_experts(model, path)")
    name = str(source)
    head = tuple(f"{layer}." for layer in head_names(model))
    if drop_head and not head:
        raise UserError("this model has no Linear layer, so which layer is its head to drop is unknown")
    # the file's model may lie deeper in a module than ours, or less deep: its experts go to the whole model
    saved = [{key: value for key, value in each.items() if key != PART} for each in metadata.get("experts") or []]
    left_out = head if drop_head else ()
    if drop_experts and saved:
        left_out += tuple(expert_state(inject(saved, copy.deepcopy(model), name)))
    remarks: list[str] = []

    def copy_into(target: nn.Module) -> None:
        backbone, inside = within(target)
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
        normalization = found.normalization or _beside(file)
        if normalization is not None and isinstance(target, Classifier) and normalization[0].numel() in (1, channels):
            remarks.extend(_normalize(target, *normalization, name, keep_normalization))

    fill(unwrapped(model), [] if drop_experts else saved, name, copy_into)
    different = "" if drop_experts else other_layers(metadata, model)
    remarks += [f"{name} was saved of a model with {different}"] if different else []
    return remarks + _other_arguments(unwrapped(model), metadata.get("model"), name)


def _beside(file: Path) -> tuple[Tensor, Tensor] | None:
    """The normalisation in the ``config.json`` that timm writes beside weights for the Hub, if there is one."""
    try:
        config = parse_json((file.parent / "config.json").read_bytes())["pretrained_cfg"]
        mean, std = torch.tensor(config["mean"]), torch.tensor(config["std"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (mean, std) if mean.shape == std.shape and bool((std > 0).all()) else None


def _normalize(model: Classifier, mean: Tensor, std: Tensor, source: str, keep: bool) -> list[str]:
    """Take a file's normalisation, or say that it is not taken."""
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
    """What names that a model does not have suggest."""
    if any(re.search(r"\.(A|B|gate\.\w+(\.\w+)?|router\..+)$", name) for name in unexpected):
        return (
            "; it seems to have experts, whose settings a file of rome.save_model alone keeps: give that one, or a "
            "finished run"
        )
    if any(name.endswith("block1.layer.0.conv1.weight") for name in unexpected):
        return "; its names are those of model.name=wide_resnet_trades"
    return ""


def _other_arguments(model: nn.Module, saved: Any, source: str) -> list[str]:
    """That a file was saved of a model that was built otherwise: what is in no tensor, such as activations."""
    own = getattr(model, "recipe", None)
    if not own or not saved:
        return []
    plain = json.loads(json.dumps([saved, own], default=str))
    theirs, ours = ({k: v for k, v in each.items() if k not in ("num_classes", "mean", "std")} for each in plain)
    differing = sorted(k for k in theirs.keys() | ours.keys() if theirs.get(k) != ours.get(k))
    said = ", ".join(f"{k}={theirs.get(k)} (here {ours.get(k)})" for k in differing)
    return [f"{source} was saved of a model with {said}"] if differing else []


def other_layers(metadata: Mapping[str, Any], model: nn.Module) -> str:
    """Of which classes the model that was saved had more or fewer modules, such as activations, which are in no
    tensor; empty where that is unknown or nothing differs."""
    saved, own = metadata.get("layers") or {}, layer_counts(model)
    differing = [k for k in sorted({*saved, *own}) if saved.get(k) != own.get(k)] if saved else []
    return ", ".join(f"{saved.get(k, 0)} {k} (here {own.get(k, 0)})" for k in differing)


def weights_file(source: str | Path) -> Path:
    """The file that a source of weights stands for.

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
    """The metadata of rome's in a file of weights, and its tensors.

    Raises:
        UserError: no such file, or not readable as tensors alone.
    """
    if file.name.endswith(".index.json"):
        return {}, _read_shards(file)
    try:
        with open(file, "rb") as opened:
            start = opened.read(9)
    except OSError:
        start = b""
    ours = start[8:] == b"{" and int.from_bytes(start[:8], "little") < file.stat().st_size
    pickled = start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"
    if not ours and (pickled or file.suffix in CHECKPOINTS):
        return {}, read_checkpoint(file)
    return read_tensors(file)


def _read_shards(index: Path) -> dict[str, Tensor]:
    """The tensors of several safetensors files, as an index in Hugging Face's form lists them."""
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {file: read_tensors(index.parent / Path(file).name)[1] for file in sorted(set(places.values()))}
        return {name: files[file][name] for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{index} is not an index of safetensors files that are all there: {first_line(error)}"
        ) from error


def holds_experts(source: str | Path) -> bool:
    """Whether a file of weights says that it has experts.

    Raises:
        UserError: no such file, or not readable.
    """
    return bool(read_weights(weights_file(source))[0].get("experts"))


class _Metadata(BaseModel):
    """The form of what rome writes into a file, so that whoever follows it finds no surprise."""

    format: str | None = None
    model: dict[str, Any] | None = None
    experts: list[dict[str, Any]] | None = None
    config: dict[str, Any] | None = None
    classes: list[str] | None = None
    layers: dict[str, int] | None = None


def read_tensors(path: str | Path, *, follow: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and tensors of a safetensors file; ``path`` may be a run's folder, or ``hf://USER/NAME``. Only ours
    have metadata.

    Args:
        follow: what the metadata names will be built, so it must not name code (:mod:`rome.core.trust`).

    Raises:
        UserError: no such file, not a safetensors file, or metadata that is not of ours.
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
        raise UserError(f"{file} is not a file of rome's: {where}: {first['msg']}; train or copy it again") from error
    except Unreadable as error:
        raise UserError(f"{file} is not a file of rome's: metadata: {error}; train or copy it again") from error
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(
            f"{file} is not a readable safetensors file ({first_line(error)}); train or copy it again"
        ) from error


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a file of ``torch.save`` on the CPU, named by the keys above them. Nothing in it is executed.

    Raises:
        UserError: no such file, one that cannot be read, or one without tensors in dicts.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no checkpoint at {file}; give an existing file ({', '.join(CHECKPOINTS)})")
    held = load_pickle(file)
    tensors = dict(_flat(held)) if isinstance(held, Mapping) else {}
    if not tensors:
        keys = some(list(map(str, held))) if isinstance(held, Mapping) else ""
        raise UserError(
            f"{file} holds no state dict but a {type(held).__name__}{f' ({keys})' if keys else ''}; "
            "save model.state_dict(), alone or under a key such as state_dict"
        )
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UserError(f"{file}: {name} has no plain numbers (sparse, quantized or meta); save dense tensors")
    return tensors


def _flat(held: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in dicts and lists, the keys above them as parts of their names."""
    if isinstance(held, Tensor):
        yield name, held
    elif depth < DEPTH and isinstance(held, (Mapping, list, tuple)):
        for key, value in held.items() if isinstance(held, Mapping) else enumerate(held):
            yield from _flat(value, f"{name}.{key}" if depth else str(key), depth + 1)
