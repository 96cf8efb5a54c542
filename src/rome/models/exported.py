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
from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from rome.core.errors import UserError, did_you_mean
from rome.core.trial import check_attackable, last_line
from rome.core.trust import PROGRAMS, names_code
from rome.models import Classifier, create_model, file_hash, load_weights, weights_file

EXPORTED = ".pt2"
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

    told_by_state = True
    """What is inside need not be looked at to tell it from others."""

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
    return Path(name).suffix in PROGRAMS  # never of a function: its name has no dot


def preprocessing(name: str, img_size: int | None) -> dict[str, Any]:
    """How a timm model wants files of images to be resized, as settings of an image folder: what
    ``timm.data.resolve_data_config`` says of its weights, and at their test size what it says of that.

    Raises:
        UserError: it wants images that are not square.
    """
    config = _pretrained(name)
    if config is None:
        return {} if img_size is None else {"size": img_size}
    tested = img_size is not None and img_size == (config.test_input_size or (0,))[-1]
    resolve: Any = resolve_data_config
    wanted = resolve({}, pretrained_cfg=config.to_dict(), use_test_size=tested)
    _, height, width = wanted["input_size"]
    if img_size is None and height != width:
        raise UserError(
            f"--model {name}: it reads images of {width} x {height} pixels, not square ones: give --img-size"
        )
    resizing = {key: wanted[key] for key in ("crop_pct", "crop_mode", "interpolation")}
    return {"size": img_size or width, **resizing}


def of_another_size(name: str, size: int) -> str:
    """A remark where images have the size of the weights' training, and timm validates them at another one."""
    config = _pretrained(name)
    if config is None or config.test_input_size is None or size != config.input_size[-1]:
        return ""
    test = config.test_input_size[-1]
    said = f"images of {size} pixels, as {name} was trained; timm validates these weights at {test} (--img-size {test})"
    return said if test != size else ""


def _pretrained(name: str) -> Any:
    """What timm knows of the weights of a model of that name; None where it has no such model."""
    if names_code(name) or is_file(name) or not timm.is_model(name):
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
    weights_key: str | None = None,
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
        weights: a file for a timm model or a function's; the model gets its experts if it has some. Without it, a timm
            model's are those of its tag.
        weights_key: where in that file, if it holds several models.
        num_classes: logits of the model, where it has more than the data has classes.
        img_size, patch_size: of a timm model that is built for one size; None takes the images' and the model's own.
        mean, std: normalisation per channel. Without them that of ``weights`` counts if it has one; else timm models
            use their own, and functions and files get none.
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
        named = _from_name(name, outputs, images.shape[1], weights, weights_key, sizes, mean, std)
    named.model.to(device).eval()
    _try(named.model, name, images.to(device), outputs)
    return named


def _from_name(
    name: str,
    outputs: int,
    channels: int,
    weights: str | None,
    weights_key: str | None,
    sizes: dict[str, int | None],
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Named:
    function, known = names_code(name), not names_code(name) and timm.is_model(name)
    if function and {"/", "\\", "."} & set(name.rpartition(":")[2]):  # the colon is one of a path
        raise UserError(f"--model {name}: a function is named path.py:function; files are .pt, .ts or .pt2")
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
    given, plain = mean is not None, function and mean is None
    model = create_model(
        name,
        num_classes=outputs,
        img_size=sizes["img_size"],
        patch_size=sizes["patch_size"],
        in_chans=channels,
        pretrained=pretrained,
        mean=(0.0,) if plain else mean,
        std=(1.0,) if plain else std,
    )
    facts: dict[str, Any] = {"name": name, "normalisation": None}
    remarks: list[str] = []
    if weights is not None:
        remarks = load_weights(model, weights, key=weights_key, keep_normalization=given)
        facts["weights"] = str(weights)
        facts["weights_sha256"] = file_hash(weights_file(weights))
    if plain and bool((model.mean == 0).all() and (model.std == 1).all()):
        remarks.append(_no_normalisation(name))
    else:
        facts["normalisation"] = {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    return Named(model, name.rpartition(":")[2], facts, remarks)


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
