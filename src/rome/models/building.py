"""Building models: by name, or as a config says for its data."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field
from torch import nn

from rome.core.component import Settings
from rome.core.errors import Interrupted, UserError, first_line
from rome.core.trial import ask, tried
from rome.experts import Experts
from rome.models.classifier import Classifier
from rome.models.loading import holds_experts, load_weights
from rome.models.sources import ROBUSTBENCH, TWINS, expected_normalization, make_backbone

_NO_START = {"weights": None, "weights_key": None, "drop_head": False, "drop_experts": False}


class ModelSettings(Settings):
    """The ``model`` part of a config, and the arguments of :func:`create_model`."""

    name: str
    """One of :mod:`rome.models.backbones`, a timm model, ``file.py:function`` / ``package.module:function`` that
    returns a module, or ``robustbench:NAME``; ``rome list models`` names the first two."""
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
    weights_key: str | None = None
    """Where in ``weights``, if it holds several models: ``state_dict``, ``teacher``."""
    drop_head: bool = False
    """Leave the last layer of ``weights`` out and start it anew, for other classes."""
    drop_experts: bool = False
    """Leave the experts of ``weights`` out; otherwise the config must have the same, and they go on."""

    def without_weights(self) -> Self:
        """The same without weights to start from."""
        return self.model_copy(update={"pretrained": False, **_NO_START})

    def architecture_only(self) -> Self:
        """The same for counting parameters and operations: also without RobustBench's package where the architecture
        has another name too."""
        zoo = self.name.startswith(ROBUSTBENCH)
        twin = TWINS.get((self.args.get("dataset", "cifar10"), self.name.removeprefix(ROBUSTBENCH))) if zoo else None
        return (
            self.without_weights()
            if twin is None
            else self.without_weights().model_copy(update={"name": twin, "args": {}})
        )


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
    weights_key: str | None = None,
    drop_head: bool = False,
    drop_experts: bool = False,
    **args: Any,
) -> Classifier:
    """A model by name, or your own, as a classifier of images in [0, 1].

    Args:
        name: one of

            - :mod:`rome.models.backbones`: ``resnet_18``, ``preact_resnet_18``, ``wide_resnet_28_10``, ...;
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
            ResNets and RobustBench's models, timm's for timm's, otherwise 0.5. That of ``weights`` comes before these
            but not before an argument here.
        weights: what to start from, with its experts if it has some; see :func:`rome.models.load_weights`. What there
            is to say of it goes to standard error.
        weights_key: where in ``weights``, if it holds several models.
        drop_head: leave the last layer of ``weights`` out, for other classes.
        drop_experts: leave the experts of ``weights`` out.
        args: passed on, such as ``depth=6, embed_dim=192``.

    Raises:
        UserError: unknown name, an argument that the model does not take, or weights that do not fit.
    """
    parts = {"drop_head drops the last layer": drop_head, "drop_experts drops the experts": drop_experts}
    parts["weights_key names a part"] = weights_key is not None
    needless = [text for text, wanted in parts.items() if wanted]
    if weights is None and needless:
        raise UserError(f"model.{needless[0]} of model.weights, and there are none; name them")
    options = {"img_size": img_size, "patch_size": patch_size}
    sizes = {key: value for key, value in options.items() if value is not None}
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
    keep, expected = mean is not None or std is not None, expected_normalization(backbone)
    mean = _per_channel(expected.mean if mean is None else mean, in_chans, "mean")
    std = _per_channel(expected.std if std is None else std, in_chans, "std")
    if min(std) <= 0:
        raise UserError(f"model.std must be positive, not {std}")
    model = Classifier(backbone, mean, std)
    model.recipe = {"name": name, "num_classes": num_classes, **sizes, "in_chans": in_chans, "mean": mean, "std": std}
    model.recipe |= args
    if weights is not None:
        drops = {"drop_head": drop_head, "drop_experts": drop_experts}
        say(load_weights(model, weights, **drops, key=weights_key, keep_normalization=keep))
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
    goes_on = trains_on(settings, experts)
    later = _NO_START if goes_on else {}
    model = create_model(**{**own, "num_classes": classes, "in_chans": shape[0], **later}, **settings.args)
    images, name = torch.zeros(2, *shape), f"model {settings.name}"
    with tried(model):
        outputs = ask(model, images, name=name, hint="set model.img_size and model.patch_size").shape[1]
        ask(model.train(), images, name=f"{name} in training mode")  # where some give auxiliary logits too
    if outputs != classes:
        raise UserError(f"{name} gives {outputs} classes, and the data has {classes}")
    if experts is not None:
        experts.inject(model, images)
    if settings.weights is not None and goes_on:
        keep = settings.mean is not None or settings.std is not None
        try:
            start, key = settings.weights, settings.weights_key
            say(load_weights(model, start, key=key, drop_head=settings.drop_head, keep_normalization=keep))
        except UserError as error:
            raise UserError(f"{error} (model.drop_experts=true starts with new experts)") from error
    return model.train()


def trains_on(settings: ModelSettings, experts: Experts | None) -> bool:
    """Whether the experts of the starting weights are those that are trained.

    Raises:
        UserError: the weights have experts and the config has none; or the weights cannot be read.
    """
    if settings.weights is None or settings.drop_experts or not holds_experts(settings.weights):
        return False
    if experts is None:
        raise UserError(
            f"{settings.weights} (model.weights) has experts, and the config has none: give it the same experts "
            "(experts: ...), or set model.drop_experts=true to start without them"
        )
    return True


def say(remarks: Sequence[str]) -> None:
    """Remarks on a model to standard error, by the first of several processes."""
    for remark in remarks if os.environ.get("RANK", "0") == "0" else ():
        print(remark, file=sys.stderr)


def _per_channel(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1 or channels == 1:
        return (sum(values) / len(values),) * channels
    raise UserError(f"model.{name} has {len(values)} values but images have {channels} channels")
