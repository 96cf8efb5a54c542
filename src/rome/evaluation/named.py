"""Models that were not trained by a run: turn the options of a command line into a config in memory, and build it.

``rome evaluate --model NAME --data DATA`` evaluates the config that :func:`named_config` makes from its options.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from pydantic_core import PydanticCustomError
from timm.data.config import resolve_data_config
from timm.models import get_pretrained_cfg
from torch import nn

from rome.attacks.suites.composed import parse_suites
from rome.core.errors import UserError, did_you_mean
from rome.core.trial import check_attackable, last_line
from rome.core.trust import names_code
from rome.data import CIFAR10_CLASSES, Cifar10, Data, ImageFolder, Parquet
from rome.data.base import NAMES, Split
from rome.data.resized import Resized
from rome.data.tables import find_tables, labels_in
from rome.models import (
    Classifier,
    ModelSettings,
    create_model,
    file_hash,
    load_model,
    load_weights,
    read_tensors,
    weights_file,
)
from rome.models.exported import SavedModule, is_saved_module
from rome.models.hub import HubModel, on_hub
from rome.runs.config import DATA_BUDGETS, Config, parse, parse_threats
from rome.runs.hints import what_is
from rome.runs.reading import Places
from rome.threats import NAMED_BUDGETS, LpBall, Threat

TRIED = 3
"""Number of images that a model is tried on first."""

_FORMS = (
    "digits; cifar10:PATH; a folder with test/CLASS/*.jpg (or val), with test-*.parquet or with cifar-10-batches-py; a "
    ".parquet file; or settings as in a config: '{path: PATH, test_split: val}'"
)


def named_data(text: str, *, img_size: int | None = None, **settings: Any) -> Data:
    """The data set named on the command line.

    Args:
        text: ``digits``, ``KIND:PATH``, a folder or a Parquet file, whose kind is recognised by its content, or
            settings in braces.
        img_size: side that images are to be resized to, in pixels.
        settings: a model's preferred settings for resizing. They hold for folders of images, and for Parquet files if
            ``img_size`` is given or their images differ in size; other images are not resized.

    Raises:
        UserError: there is no such data set or folder, or its kind is not recognised.
    """
    given = _parse_data(text)
    if img_size is not None:
        settings["size"] = img_size
    try:
        data = Data.of_kind(given.pop("kind"))(**given)
    except (UserError, PydanticCustomError) as error:
        raise UserError(f"data {text!r}: {str(error).rstrip('.')}; give {_FORMS}") from None
    keep_size = isinstance(data, Parquet) and not (img_size or data.size) and data.one_size()
    return type(data)(**{**settings, **given}) if isinstance(data, Resized) and not keep_size else data


def _parse_data(text: str) -> dict[str, Any]:
    """Parse a data set named on the command line into its kind and settings."""
    if text.lstrip().startswith("{"):
        try:
            (given,) = parse_suites(text)
        except ValueError as error:
            raise UserError(f"data: {error}") from None
        return given if "kind" in given else {"kind": _kind_at(str(given.get("path", ""))), **given}
    kind, colon, path = text.partition(":")
    if kind in Data.members():
        return {"kind": kind, **({"path": path} if colon else {})}
    path_like = len(kind) == 1 or {"/", "\\"} & set(kind)  # C:\x, ./a:b
    if colon and not path_like and not os.path.exists(os.path.expanduser(text)):
        raise UserError(f"unknown data {text!r}; give {_FORMS}")
    return {"kind": _kind_at(text), "path": text}


def _kind_at(path: str) -> str:
    """The kind of data at a path, recognised by its content."""
    folder = Path(os.path.expanduser(path))
    is_table = folder.suffix == ".parquet" and os.path.isfile(folder)
    if not is_table and not os.path.isdir(folder):
        near = did_you_mean(str(folder), Data.members()) if len(folder.parts) == 1 else ""
        raise UserError(f"there is no folder {folder} with data; give {_FORMS}.{near}")
    if (folder / "batches.meta").is_file() and folder.name != "cifar-10-batches-py":
        raise UserError(f"{folder} holds CIFAR-10's batches: rename it to cifar-10-batches-py")
    if folder.name == "cifar-10-batches-py" or (folder / "cifar-10-batches-py").is_dir():
        return Cifar10.kind
    if tables := [folder] if is_table else find_tables(folder, *NAMES["test"]):
        return Cifar10.kind if labels_in(tables[0])[0] == CIFAR10_CLASSES else Parquet.kind  # as on the Hub
    tests = [folder / name for name in NAMES["test"] if (folder / name).is_dir()]
    if any(entry.is_dir() for test in tests for entry in test.iterdir()):
        return ImageFolder.kind
    raise UserError(f"{folder} holds no data of a recognised kind; give {_FORMS}")


def named_budgets(text: str) -> tuple[Threat, ...]:
    """The threats for budgets such as ``L2=0.5,Linf=8/255``, or for a name such as ``cifar10``.

    If a norm has several radii, they are part of the threats' names: ``Linf-4_255``.

    Raises:
        UserError: there is no such name, or a budget is not valid.
    """
    return parse_threats(_parse_balls(text), f"--budgets {text}: ")


def _parse_balls(text: str | None) -> Any:
    """Parse balls into the form they have in a config; return a name as it is."""
    if text is None or "=" not in text:
        return text
    balls = [part.partition("=") for part in text.split(",")]
    return [{"norm": norm.strip(), "eps": eps.strip()} for norm, _, eps in balls]


def preprocessing(name: str, img_size: int | None) -> dict[str, Any]:
    """The settings of an image folder by which a model's images are to be resized.

    For a timm model they are from ``timm.data.resolve_data_config``, for the test size of its weights if ``img_size``
    is that; for a model from the Hub that rome pushed, they are those of its training.

    Raises:
        UserError: the model takes images that are not square.
    """
    if on_hub(name):
        data = (read_tensors(name)[0].get("config") or {}).get("data") or {}
        return {key: data[key] for key in ("size", "crop_pct", "crop_mode", "interpolation") if key in data}
    config = _pretrained_cfg(name)
    if config is None:
        return {} if img_size is None else {"size": img_size}
    tested = img_size is not None and img_size == (config.test_input_size or (0,))[-1]
    resolve: Any = resolve_data_config
    wanted = resolve({}, pretrained_cfg=config.to_dict(), use_test_size=tested)
    _, height, width = wanted["input_size"]
    if img_size is None and height != width:
        raise UserError(
            f"--model {name}: it takes images of {width} x {height} pixels, not square ones: give --img-size"
        )
    resizing = {key: wanted[key] for key in ("crop_pct", "crop_mode", "interpolation")}
    return {"size": img_size or width, **resizing}


def _size_remark(name: str, size: int) -> str:
    """Remark that timm validates the weights at a size different from the training size, which the images have."""
    config = _pretrained_cfg(name)
    if config is None or config.test_input_size is None or size != config.input_size[-1]:
        return ""
    test = config.test_input_size[-1]
    remark = f"{name} gets images of {size} pixels, its training size; timm validates it at {test} (--img-size {test})"
    return remark if test != size else ""


def _pretrained_cfg(name: str) -> Any:
    """timm's description of the pretrained weights of this name; None if timm has no such model."""
    if names_code(name) or is_saved_module(name) or not timm.is_model(name):
        return None
    try:
        return get_pretrained_cfg(name)
    except RuntimeError as error:
        near = did_you_mean(name, timm.list_pretrained(f"{name.partition('.')[0]}.*"))
        raise UserError(f"--model {name}: {last_line(error).rstrip('.')}.{near}") from error


def named_config(options: Mapping[str, Any], target: object = None) -> Config | None:
    """Make a config from the options of a command; None if none of them is given.

    Args:
        options: by name ``model``, ``data``, ``weights``, ``weights_key``, ``budgets``, ``num_classes``, ``img_size``,
            ``patch_size``, ``mean`` and ``std``, with values as typed; those that are None are not given.
        target: the run or file that the command names instead of ``model``, for the message.

    Raises:
        UserError: ``model`` is given without ``data``, other options without ``model``, or a value is not valid.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if not given:
        return None
    if "model" not in given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        instead = "" if target is None else f", not with {target}, which has its own config"
        raise UserError(f"{names} can only be given with --model{instead}")
    name, side = given["model"], given.get("img_size")
    if "data" not in given:
        raise UserError(f"--model {name} needs --data: digits, cifar10:PATH, a folder or a .parquet file")
    saved, weights = is_saved_module(name) or on_hub(name), given.get("weights")
    function = names_code(name) and not saved
    if function and {"/", "\\", "."} & set(name.rpartition(":")[2]):  # the colon belongs to a path
        raise UserError(f"--model {name}: a function is named path.py:function; files are .pt, .ts or .pt2")
    if not saved and os.path.isfile(name):
        raise UserError(f"--model {name}: {what_is(Path(name))}")
    if saved and weights is not None:
        raise UserError(f"{name} holds its weights already: leave --weights out")
    if ("mean" in given) != ("std" in given):
        raise UserError("--mean and --std go together: give both, or neither")
    places: Places = {("model", key): f"--{key} {given[key]}: " for key in ("mean", "std") if key in given}
    places["threats",] = f"--budgets {given.get('budgets', '')}: "
    model = {key: given.get(key) for key in ("num_classes", "img_size", "patch_size", "weights", "weights_key")}
    model |= {key: given[key].split(",") for key in ("mean", "std") if key in given}
    model |= {"name": name, "pretrained": not function and not saved and weights is None}
    plain = {
        "name": named_after(name),
        "data": named_data(given["data"], img_size=side, **preprocessing(name, side)),
        "model": model,
        "threats": _parse_balls(given.get("budgets")),
        "loggers": [],
    }
    return parse(plain, places)


def named_after(name: str) -> str:
    """Name for the results of a model, made from its architecture, file or repository."""
    if on_hub(name):
        short = HubModel.parse(name).repository
    else:
        short = Path(name).stem if is_saved_module(name) else name.rpartition(":")[2]
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", short)


def command(config: Config) -> str:
    """The command that evaluates a config made by :func:`named_config`."""
    model, data = config.model, config.data
    given = {name: getattr(data, name) for name, field in type(data).model_fields.items()}
    given = {name: value for name, value in given.items() if value != type(data).model_fields[name].default}
    plain = f"{data.kind}:{data.path}" if data.path else data.kind
    usual = config.threats == NAMED_BUDGETS.get(DATA_BUDGETS.get(data.kind, ""))
    options = {
        "model": model.name,
        "data": json.dumps({"kind": data.kind, **given}, default=str) if given.keys() - {"path"} else plain,
        "budgets": "" if usual else ",".join(f"{b.norm}={b.eps!r}" for b in config.threats if isinstance(b, LpBall)),
        **model.model_dump(include={"weights", "weights_key", "num_classes", "img_size", "patch_size"}),
        **{key: values and ",".join(map(repr, values)) for key, values in (("mean", model.mean), ("std", model.std))},
    }
    words = [word for key, value in options.items() if value for word in (f"--{key.replace('_', '-')}", str(value))]
    return shlex.join(["rome", "evaluate", *words])


def build_named(config: Config, split: Split) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """Build the model of a config made by :func:`named_config`, and try it on the first images of the data.

    Returns:
        The model in evaluation mode, facts about it for the result (JSON), and remarks for the user.

    Raises:
        UserError: the model is unknown or cannot be read, does not take such images, or has a different number of
            logits.
    """
    settings, name = config.model, config.model.name
    channels, side = split.shape[0], split.shape[-1]
    outputs = settings.num_classes or len(split.classes)
    if settings.img_size not in (None, side):
        raise UserError(
            f"--img-size {settings.img_size}: {config.data.kind} has images of {side} pixels, never resized; leave it "
            "out, or give a folder of images"
        )
    mean, std = settings.mean, settings.std
    if mean is not None and std is not None:
        if any(len(values) not in (1, channels) for values in (mean, std)) or min(std) <= 0:
            raise UserError(
                f"--mean and --std take one number, or one for each of {channels} channels; --std must be positive"
            )
        mean, std = mean * (channels // len(mean)), std * (channels // len(std))
    saved = is_saved_module(name)
    facts: dict[str, Any] = {"name": Path(name).name if saved else name, "normalisation": None}
    remarks: list[str] = []
    if on_hub(name):
        model = _load_hub_model(name, mean, std)
        facts["sha256"] = file_hash(weights_file(name))
    elif saved:
        inner = SavedModule(Path(name))
        model = Classifier(inner, mean or (0.0,), std or (1.0,))
        facts["sha256"] = inner.digest
    else:
        model = _create(settings, outputs, channels, side, mean, std)
    if settings.weights is not None:
        remarks = load_weights(model, settings.weights, key=settings.weights_key, keep_normalization=mean is not None)
        facts |= {"weights": settings.weights, "weights_sha256": file_hash(weights_file(settings.weights))}
    elif settings.img_size is None:
        remarks += filter(None, [_size_remark(name, side)])
    bare = bool((model.mean == 0).all() and (model.std == 1).all())
    if bare and mean is None and (saved or names_code(name)) and not on_hub(name):
        remarks.append(
            f"no normalisation added: {name} gets images in [0, 1] (give --mean and --std if it needs normalised ones)"
        )
    else:
        facts["normalisation"] = {"mean": model.mean.flatten().tolist(), "std": model.std.flatten().tolist()}
    hint = "it must take batches of any size; for another image size give --img-size"
    classes = check_attackable(model.eval(), split.first(min(TRIED, len(split)))[0], name=name, hint=hint)
    if classes != outputs:
        raise UserError(
            f"{name} has {classes} classes, not {outputs}; if it has more classes than the data, and its first ones "
            "are the data's, give --num-classes"
        )
    return model, facts, remarks


def _load_hub_model(name: str, mean: object, std: object) -> Classifier:
    """Load a model that rome pushed to the Hub, which includes its normalisation."""
    if mean is not None or std is not None:
        raise UserError(f"{name} includes its normalisation: leave --mean and --std out")
    model = load_model(name)
    assert isinstance(model, Classifier)
    return model


def _create(settings: ModelSettings, outputs: int, channels: int, side: int, mean: Any, std: Any) -> Classifier:
    """Create the model without weights from a file; a timm model may get the pretrained weights of its tag."""
    name, plain = settings.name, mean is None and names_code(settings.name)
    config = _pretrained_cfg(name)
    if settings.pretrained and timm.is_model(name):
        if config is None or not config.has_weights:
            raise UserError(f"{name} has no pretrained weights: give --weights FILE, or one of timm's tags (NAME.TAG)")
        if config.num_classes != outputs:
            raise UserError(
                f"the pretrained weights of {name} are for {config.num_classes} classes, not {outputs}, so its head "
                "would be random: give --weights FILE, or "
                f"--num-classes {config.num_classes} if the data's classes are the first of them"
            )
    fixed = config is not None and config.fixed_input_size and config.input_size[-1] != side
    return create_model(
        name,
        num_classes=outputs,
        img_size=side if fixed else None,
        patch_size=settings.patch_size,
        in_chans=channels,
        pretrained=settings.pretrained,
        mean=(0.0,) if plain else mean,
        std=(1.0,) if plain else std,
    )
