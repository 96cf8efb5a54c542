"""Models that no run of ours made: timm's, a function's, and modules saved by torch.jit or torch.export."""

from __future__ import annotations

import logging
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from rome.errors import UserError, did_you_mean
from rome.models import Classifier, create_model, file_hash, load_weights
from rome.trial import check_attackable, last_line

TORCHSCRIPT, EXPORTED = (".pt", ".ts", ".pth", ".torchscript"), ".pt2"
HOW_TO_EXPORT = (
    'torch.export.export(model.eval(), (images,), dynamic_shapes=({0: torch.export.Dim("batch")},)) '
    "with two or more images, then torch.export.save"
)


@dataclass
class Named:
    """A model that a name or a file stands for."""

    model: nn.Module
    name: str
    facts: dict[str, Any]
    """JSON data for the result's provenance."""
    remarks: list[str] = field(default_factory=list)
    """What a reader of the result should know."""


class SavedModule(nn.Module):
    """A module from a file: its code is the file's, so the file's hash belongs to its state.

    It is in evaluation mode for good: what was exported cannot change its mode, and some cannot even be asked.
    """

    def __init__(self, inner: nn.Module, digest: str) -> None:
        super().__init__()
        self.inner, self.digest = inner, digest
        self.training = False
        for module in inner.modules():
            module.training = False

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images)

    def train(self, mode: bool = True) -> SavedModule:
        self.training = mode
        return self

    def get_extra_state(self) -> dict[str, str]:
        return {"sha256": self.digest}

    def set_extra_state(self, state: dict[str, str]) -> None:
        """Nothing to do: the file was read already."""


def is_file(name: str) -> bool:
    """Whether the name is that of a saved module and not of a timm model or a function."""
    return ":" not in name and Path(name).suffix in (*TORCHSCRIPT, EXPORTED)


def preprocessing(name: str, img_size: int | None) -> dict[str, Any]:
    """How a timm model wants files of images to be resized, as settings of an image folder."""
    config = _pretrained(name)
    if config is None:
        return {} if img_size is None else {"size": img_size}
    modes = {"nearest", "bilinear", "bicubic", "lanczos"}
    wanted = {"size": img_size or config.input_size[-1], "crop_pct": config.crop_pct}
    return wanted | ({"interpolation": config.interpolation} if config.interpolation in modes else {})


def _pretrained(name: str) -> Any:
    """What timm knows of the weights of a model of that name; None where it has no such model."""
    if ":" in name or is_file(name) or not timm.is_model(name):
        return None
    try:
        return get_pretrained_cfg(name)
    except RuntimeError as error:
        near = did_you_mean(name, timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise UserError(f"--model {name}: {last_line(error).rstrip('.')}.{near}") from error


def named_model(
    name: str,
    *,
    classes: int,
    images: Tensor,
    weights: str | None = None,
    num_classes: int | None = None,
    img_size: int | None = None,
    patch_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 1,
) -> Named:
    """The classifier that a name or a file stands for, in evaluation mode, on a device.

    Args:
        name: a timm model, ``path.py:function`` or ``package.module:function``, a TorchScript file (.pt, .ts), or one
            of torch.export (.pt2).
        classes: of the data.
        images: (B, C, H, W), to try it on.
        weights: a file for a timm model or a function's; without it, a timm model's are those of its tag.
        num_classes: logits of the model, where it has more than the data has classes.
        img_size, patch_size: of a timm model that is built for one size; None takes the images' and the model's own.
        mean, std: normalisation per channel. Without them timm models use their own; functions and files get none.
        batch_size: the largest batch it will be asked.

    Raises:
        UserError: unknown, unreadable, or it does not take such images or give so many logits.
    """
    if (mean is None) != (std is None):
        raise UserError("--mean and --std go together: give both, or neither")
    if mean is not None and std is not None:
        if any(len(values) not in (1, images.shape[1]) for values in (mean, std)) or min(std) <= 0:
            raise UserError(
                f"--mean and --std need one number, or one for each of {images.shape[1]} channels; --std positive ones"
            )
        mean, std = (tuple(values) * (images.shape[1] // len(values)) for values in (mean, std))
    outputs = num_classes or classes
    if is_file(name):
        if weights is not None:
            raise UserError(f"{name} holds its weights already: leave --weights out")
        named = _from_file(Path(name), mean, std, device, batch_size)
    else:
        sizes = {"img_size": img_size or images.shape[-1], "patch_size": patch_size}
        named = _from_name(name, outputs, images.shape[1], weights, sizes, mean, std)
    named.model.to(device).eval()
    _try(named.model, name, images.to(device), outputs)
    return named


def _from_name(
    name: str,
    outputs: int,
    channels: int,
    weights: str | None,
    sizes: dict[str, int | None],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Named:
    function, known = ":" in name, ":" not in name and timm.is_model(name)
    config = _pretrained(name)
    pretrained = not function and weights is None
    if pretrained and known:
        if config is None or not config.has_weights:
            raise UserError(f"{name} has no pretrained weights: give --weights FILE, or a tag (NAME.TAG) of timm's")
        if config.num_classes != outputs:
            raise UserError(
                f"the pretrained weights of {name} are for {config.num_classes} classes, not {outputs}, so its head "
                "would be random: give --weights FILE, or "
                f"--num-classes {config.num_classes} if the data's classes are the first of them"
            )
    if config is None or not config.fixed_input_size or config.input_size[-1] == sizes["img_size"]:
        sizes = {**sizes, "img_size": None}
    plain = function and mean is None
    if plain:
        mean, std = (0.0,), (1.0,)
    model = create_model(
        name,
        num_classes=outputs,
        img_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        in_chans=channels,
        pretrained=pretrained,
        mean=mean,
        std=std,
    )
    facts: dict[str, Any] = {"name": name, "normalisation": None}
    if weights is not None:
        load_weights(model, weights)
        facts["weights"] = str(weights)
        facts["weights_sha256"] = file_hash(weights) if Path(weights).is_file() else None
    if plain:
        return Named(model, name.rpartition(":")[2], facts, [_no_normalisation(name)])
    facts["normalisation"] = {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    return Named(model, name.rpartition(":")[2], facts)


def _from_file(
    file: Path, mean: Sequence[float] | None, std: Sequence[float] | None, device: torch.device | str, batch_size: int
) -> Named:
    if not file.is_file():
        raise UserError(
            f"there is no file {file}; --model is a timm model, path.py:function or a file (.pt, .ts, .pt2)"
        )
    digest = file_hash(file)
    inner = _exported(file, device, batch_size) if file.suffix == EXPORTED else _scripted(file, device)
    model = SavedModule(inner, digest)
    facts: dict[str, Any] = {"name": file.name, "sha256": digest, "normalisation": None}
    if mean is None or std is None:
        return Named(model, file.stem, facts, [_no_normalisation(str(file))])
    facts["normalisation"] = {"mean": list(mean), "std": list(std)}
    return Named(Classifier(model, mean, std), file.stem, facts)


def _no_normalisation(name: str) -> str:
    return f"no normalisation added: {name} gets images in [0, 1] (give --mean and --std if it expects others)"


def _scripted(file: Path, device: torch.device | str) -> nn.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch would rather have modules exported
            return torch.jit.load(str(file), map_location=device).eval()  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{file} is not a TorchScript module ({last_line(error)}); for a file of weights give the model's name "
            f"with --model and the file with --weights"
        ) from error


def _exported(file: Path, device: torch.device | str, batch_size: int) -> nn.Module:
    if not zipfile.is_zipfile(file):
        raise UserError(f"{file} is not a file of torch.export.save; write it again: {HOW_TO_EXPORT}")
    try:
        with _quiet():
            program = torch.export.load(str(file))
    except Exception as error:  # it raises almost any kind
        raise UserError(
            f"{file} is not a file of torch.export.save that this torch can read: {last_line(error)}"
        ) from error
    inputs = [
        node
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    ]
    if len(inputs) != 1:
        raise UserError(f"{file} was exported with {len(inputs)} inputs; rome gives one: a batch of images")
    batch = inputs[0].meta["val"].shape[0]
    if isinstance(batch, int):
        raise UserError(
            f"{file} was exported for batches of exactly {batch}, and attacks need batches of any size; "
            f"export it with a dynamic batch: {HOW_TO_EXPORT}"
        )
    bounds = program.range_constraints.get(batch.node.expr)
    if bounds is not None and (int(bounds.lower) > 2 or bounds.upper < batch_size):  # 2: what torch writes for "any"
        raise UserError(
            f"{file} was exported for batches of {bounds.lower} to {bounds.upper}, and it would get 1 to {batch_size}: "
            f"give --batch-size {bounds.upper}, or export it with a dynamic batch: {HOW_TO_EXPORT}"
        )
    if torch.device(device).type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, str(device))
    return program.module()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.export's logged tracebacks: what is wrong with a file is in the exception."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.export.pt2_archive._package")]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _try(model: nn.Module, name: str, images: Tensor, outputs: int) -> None:
    """It can be attacked on such images, and gives so many logits."""
    hint = "it must take batches of any size; for another image size give --img-size"
    classes = check_attackable(model, images, name=name, hint=hint)
    if classes != outputs:
        raise UserError(
            f"{name} gives {classes} classes, not {outputs}; if it has more classes than the data, and its first ones "
            "are the data's, give --num-classes"
        )
