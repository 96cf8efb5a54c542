"""Reading weights: files of ours, checkpoints of others, and whether they fit a model."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor, nn

from rome import trust
from rome.errors import UserError, first_line
from rome.files import Unreadable, parse_json
from rome.models.classifier import Classifier
from rome.models.pickles import load_pickle

PYAUTOATTACK = "pyautoattack"
"""Names the weights of ``resnet_18`` for CIFAR-10 that come with that package, wherever it is installed."""
CHECKPOINTS = (".pt", ".pth", ".ckpt", ".bin", ".tar")
"""Endings of files that ``torch.save`` wrote; everything else is read as safetensors."""
WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
"""Keys under which checkpoints keep the state dict."""
PREFIXES = ("module.", "model.", "backbone.", "_orig_mod.")
"""What DataParallel, wrappers and torch.compile put before every name."""
NORMALIZATIONS = (("mean", "std"), ("mu", "sigma"), ("normalize.mean", "normalize.std"))
"""Names under which others keep their normalisation."""
SHOWN = 3


def load_weights(model: nn.Module, source: str | Path, *, drop_head: bool = False) -> None:
    """Start from saved weights; what the file holds beside the backbone (our experts) is left out.

    Args:
        model: without experts.
        source: one of

            - a run's folder or a safetensors file saved by rome, with its normalisation;
            - a safetensors file of somebody else, or a checkpoint of ``torch.save`` (``.pt``, ``.pth``, ``.ckpt``,
              ``.bin``, ``.tar``): a state dict, or a dict with one under ``state_dict``, ``model_state_dict``,
              ``model`` or ``net``. The prefixes ``module.``, ``model.``, ``backbone.`` and ``_orig_mod.`` may stand
              before all names. Normalisation is the file's if it has one (``mean`` and ``std``, ``mu`` and ``sigma``),
              otherwise the model's;
            - ``pyautoattack``: the ResNet-18 for CIFAR-10 that comes with that package.
        drop_head: leave the file's last layer out, and the model's as it is.

    Raises:
        UserError: no such file, not readable as tensors alone, or it does not fit: the message counts and names what
            is missing, unexpected or of another shape. The model is unchanged then.
    """
    file = pyautoattack_weights() if str(source) == PYAUTOATTACK else Path(source)
    own = set(model.state_dict())
    if not file.is_dir() and file.suffix in CHECKPOINTS:
        metadata, tensors = dict[str, Any](), read_checkpoint(file)
    else:
        metadata, tensors = read_tensors(file)
    if metadata.get("format") == "experts":
        raise UserError(f"{file} holds experts alone, without a backbone; use rome.load_experts(model, path)")
    if metadata:
        expected = own
        tensors = {name: tensor for name, tensor in tensors.items() if name in own or not _within_a_layer(name, own)}
    else:
        inside = _backbone(model)[1]
        expected = {n for n in own if n.startswith(inside) and not n.endswith("num_batches_tracked")}
        tensors = _as_ours(tensors, model)
    head = tuple(f"{name}." for name in head_names(model))
    if drop_head:
        if not head:
            raise UserError("this model has no Linear layer, so which layer is its head to drop is unknown")
        expected = {name for name in expected if not name.startswith(head)}
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(head)}
    fit(model, tensors, expected=expected, path=source, head=head)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give the logits: as timm knows them, otherwise the last Linear layer."""
    backbone, inside = _backbone(model)
    known = (getattr(backbone, "pretrained_cfg", None) or {}).get("classifier")
    if known:
        return tuple(inside + name for name in ([known] if isinstance(known, str) else known))
    linears = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    return tuple(inside + name for name in linears[-1:])


class _Metadata(BaseModel):
    """The form of what rome writes into a file, so that whoever follows it finds no surprise."""

    format: str | None = None
    model: dict[str, Any] | None = None
    experts: dict[str, Any] | list[dict[str, Any]] | None = None
    config: dict[str, Any] | None = None


def read_tensors(path: str | Path, *, follow: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metadata and tensors of a safetensors file; ``path`` may be a run's folder. Only ours have metadata.

    Args:
        follow: what the metadata names will be built, so it must not name code (:mod:`rome.trust`).

    Raises:
        UserError: no such file, not a safetensors file, or metadata that is not of ours.
    """
    file = Path(path)
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
    """The state dict in a file of ``torch.save``, on the CPU. Nothing in the file is executed.

    Raises:
        UserError: no such file, one that cannot be read, or one without a state dict.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"there is no checkpoint at {file}; give an existing file ({', '.join(CHECKPOINTS)})")
    held = load_pickle(file)
    while isinstance(held, Mapping) and not _is_state(held):
        inner = next((held[key] for key in WRAPPERS if isinstance(held.get(key), Mapping)), None)
        if inner is None:
            break
        held = inner
    if not isinstance(held, Mapping) or not _is_state(held):
        keys = [str(key) for key in held] if isinstance(held, Mapping) else []
        raise UserError(
            f"{file} holds no state dict but a {type(held).__name__}{f' ({_some(keys)} in it)' if keys else ''}; "
            f"save model.state_dict(), alone or under {', '.join(WRAPPERS[:-1])} or {WRAPPERS[-1]}"
        )
    for name, tensor in held.items():
        if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
            raise UserError(f"{file}: {name} has no plain numbers (sparse, quantized or meta); save dense tensors")
    return dict(held)


def pyautoattack_weights() -> Path:
    """The file of ResNet-18's weights that pyautoattack ships.

    Raises:
        UserError: the package is not installed or has no such file.
    """
    found = importlib.util.find_spec(PYAUTOATTACK)
    file = Path(found.origin).parent / "examples" / "model_test.pt" if found and found.origin else None
    if file is None or not file.is_file():
        raise UserError("pyautoattack is not installed with its example weights: pip install pyautoattack==0.2.0")
    return file


def fit(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    expected: Collection[str],
    path: str | Path,
    head: tuple[str, ...] = (),
) -> None:
    """Copy tensors into a model, all or none.

    Args:
        expected: names that must be there; every tensor must be in the model too.
        path: for the message.
        head: prefixes of the last layer's names; where nothing else is wrong, the message says how to drop it.

    Raises:
        UserError: they do not fit.
    """
    own = model.state_dict()
    missing = sorted(set(expected) - set(tensors))
    unexpected = sorted(set(tensors) - set(own))
    resized = sorted(name for name in set(tensors) & set(own) if tensors[name].shape != own[name].shape)
    problems = [f"{_some(missing)} missing in the file"] if missing else []
    problems += [f"{_some(unexpected)} not in the model"] if unexpected else []
    shapes = [f"{n} is {tuple(tensors[n].shape)} in the file, {tuple(own[n].shape)} in the model" for n in resized]
    problems += shapes[:SHOWN]
    problems += [f"and {len(shapes) - SHOWN} more of other shapes"] if len(shapes) > SHOWN else []
    if problems:
        only = head and all(name.startswith(head) for name in (*missing, *unexpected, *resized))
        hint = "; only the head differs: set model.drop_head=true (drop_head=True) to start it anew" if only else ""
        raise UserError(f"{path} does not fit the model: {'; '.join(problems)}{hint}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _as_ours(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Tensors of somebody else under the model's names, with as many prefixes stripped as gives most known names."""
    own = model.state_dict()
    _, inside = _backbone(model)
    normalization: dict[str, Tensor] = {}
    best: dict[str, Tensor] = {}
    rest = dict(tensors)
    while True:
        for names in NORMALIZATIONS if inside else ():
            if rest.keys() >= set(names) and not any(inside + name in own for name in names):
                normalization = {ours: rest.pop(name) for ours, name in zip(("mean", "std"), names, strict=True)}
        placed = {inside + name: tensor for name, tensor in rest.items()}
        placed |= {name: tensor.reshape(1, -1, 1, 1) for name, tensor in normalization.items()}
        if not best or len(own.keys() & placed.keys()) > len(own.keys() & best.keys()):
            best = placed
        prefix = next((prefix for prefix in PREFIXES if rest and all(n.startswith(prefix) for n in rest)), None)
        if prefix is None:
            return best
        rest = {name.removeprefix(prefix): tensor for name, tensor in rest.items()}


def _backbone(model: nn.Module) -> tuple[nn.Module, str]:
    """The part others would save, and what stands before its names in ours."""
    return (model.backbone, "backbone.") if isinstance(model, Classifier) else (model, "")


def _is_state(held: Mapping[Any, Any]) -> bool:
    return bool(held) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in held.items())


def _within_a_layer(name: str, own: Collection[str]) -> bool:
    """Whether a tensor lies in a layer of the model, as experts do: ``qkv.gate.local.bias`` beside ``qkv.weight``."""
    parts = name.split(".")
    return any(".".join([*parts[:depth], "weight"]) in own for depth in range(1, len(parts)))


def _some(names: list[str]) -> str:
    """``a is``, ``a, b are``, ``a, b, c and 7 more are``."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{', '.join(names[:SHOWN])}{more} {'is' if len(names) == 1 else 'are'}"
