"""Building models: by name, or as a config says for its data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import nn

from rome.component import Settings
from rome.errors import Interrupted, UserError, first_line
from rome.experts import Experts
from rome.models.classifier import Classifier
from rome.models.loading import load_weights
from rome.models.sources import ROBUSTBENCH, TWINS, expected_normalization, make_backbone
from rome.trial import ask, tried


class ModelSettings(Settings):
    """The ``model`` part of a config, and the arguments of :func:`create_model`."""

    name: str
    """One of :mod:`rome.backbones`, a timm model, ``file.py:function`` / ``package.module:function`` that returns a
    module, or ``robustbench:NAME``; ``rome list models`` names the first two."""
    num_classes: int | None = Field(default=None, ge=2)
    """None takes the data set's."""
    img_size: int | None = Field(default=None, ge=1)
    patch_size: int | None = Field(default=None, ge=1)
    in_chans: int | None = Field(default=None, ge=1)
    pretrained: bool = False
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the model or the function, such as ``depth: 6``."""
    weights: str | None = None
    """What to start from: a run's folder, a safetensors file, a checkpoint of ``torch.save`` or ``pyautoattack``; see
    :func:`rome.models.load_weights`."""
    drop_head: bool = False
    """Leave the last layer of ``weights`` out and start it anew, for other classes."""

    def untrained(self) -> Self:
        """The same architecture without weights to start from."""
        return self.model_copy(update={"pretrained": False, "weights": None, "drop_head": False})

    def outline(self) -> Self:
        """The same architecture for whom weights are nothing, such as who counts: also without RobustBench's package
        where the architecture goes by another name too."""
        zoo = self.name.startswith(ROBUSTBENCH)
        twin = TWINS.get((self.args.get("dataset", "cifar10"), self.name.removeprefix(ROBUSTBENCH))) if zoo else None
        return self.untrained() if twin is None else self.untrained().model_copy(update={"name": twin, "args": {}})


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
    weights: str | Path | None = None,
    drop_head: bool = False,
    **args: Any,
) -> Classifier:
    """A model by name, or your own, as a classifier of images in [0, 1].

    Args:
        name: one of

            - :mod:`rome.backbones`: ``resnet_18``, ``preact_resnet_18``, ``wide_resnet_28_10``, ...;
            - a timm model, optionally with a weight tag (``vit_base_patch16_224.augreg_in21k``);
            - ``file.py:function`` / ``package.module:function``, called with ``num_classes`` and ``args``;
            - ``robustbench:NAME``, a model of RobustBench's zoo with its weights, if that package is installed;
              ``args``: ``dataset="cifar10"``, ``threat_model="Linf"``, ``model_dir="models"``.
        num_classes: number of logits.
        img_size, patch_size: in pixels; None leaves the model's own. Position and patch embeddings of pretrained
            weights are resampled by timm.
        in_chans: image channels.
        pretrained: load the tag's weights (timm only; needs the network once).
        mean, std: normalisation per channel; None takes the model's own: CIFAR-10's for Wide ResNets, none for the
            ResNets and RobustBench's models, timm's for timm's, otherwise 0.5.
        weights: what to start from; see :func:`rome.models.load_weights`.
        drop_head: leave the last layer of ``weights`` out, for other classes.
        args: passed on, such as ``depth=6, embed_dim=192``.

    Raises:
        UserError: unknown name, an argument that the model does not take, or weights that do not fit.
    """
    if drop_head and weights is None:
        raise UserError("model.drop_head drops the last layer of model.weights, and there are none; name them")
    sizes: dict[str, Any] = {
        key: value for key, value in (("img_size", img_size), ("patch_size", patch_size)) if value is not None
    }
    try:
        backbone = make_backbone(
            name, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained, options={**sizes, **args}
        )
    except (UserError, Interrupted):
        raise
    except OSError as error:
        raise UserError(f"the weights of {name} cannot be had: {first_line(error)}") from error
    except Exception as error:  # whatever a function of yours does
        given = ", ".join(f"{key}={value}" for key, value in {**sizes, "in_chans": in_chans, **args}.items())
        hint = "; what a config inherits and it does not take goes with null (model.img_size=null)" if sizes else ""
        raise UserError(f"model {name} cannot be built with {given}: {first_line(error)}{hint}") from error
    if not isinstance(backbone, nn.Module):
        raise UserError(f"{name} returned a {type(backbone).__name__}, not a torch module")
    expected = expected_normalization(backbone)
    mean = _per_channel(expected.mean if mean is None else mean, in_chans, "mean")
    std = _per_channel(expected.std if std is None else std, in_chans, "std")
    if min(std) <= 0:
        raise UserError(f"model.std must be positive, not {std}")
    model = Classifier(backbone, mean, std)
    model.recipe = {"name": name, "num_classes": num_classes, **sizes, "in_chans": in_chans, "mean": mean, "std": std}
    model.recipe |= args
    if weights is not None:
        load_weights(model, weights, drop_head=drop_head)
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
    own = settings.model_dump(exclude={"args"}, exclude_none=True)
    twice = sorted(set(settings.args) & (set(ModelSettings.model_fields) - {"args"}))
    if twice:
        raise UserError(f"model.args: {', '.join(twice)} is a setting of the model itself; write model.{twice[0]}")
    model = create_model(**{**own, "num_classes": classes, "in_chans": shape[0]}, **settings.args)
    images, name = torch.zeros(2, *shape), f"model {settings.name}"
    with tried(model):
        outputs = ask(model, images, name=name, hint="set model.img_size and model.patch_size").shape[1]
    if outputs != classes:
        raise UserError(f"{name} gives {outputs} classes, and the data has {classes}")
    if experts is not None:
        experts.inject(model, images)
    return model.train()


def _per_channel(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1 or channels == 1:
        return (sum(values) / len(values),) * channels
    raise UserError(f"model.{name} has {len(values)} values but images have {channels} channels")
