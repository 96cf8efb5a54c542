"""Building models by name, or from a config for a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from rome.core.component import Settings
from rome.core.console import say
from rome.core.errors import Interrupted, UserError, first_line
from rome.core.trial import checked_logits, without_side_effects
from rome.experts import Experts
from rome.models.classifier import Classifier
from rome.models.hub import on_hub, pinned
from rome.models.loading import holds_experts, load_weights
from rome.models.sources import ROBUSTBENCH, TWINS, expected_normalization, make_backbone

_WEIGHTS_OPTIONS = {
    "weights_key": "selects a part",
    "drop_head": "drops the last layer",
    "drop_experts": "drops the experts",
}
"""Settings that need ``weights``, and what they do."""


class ModelSettings(Settings):
    """The ``model`` section of a config, and the settings of :func:`create_model`."""

    name: str
    """A backbone in :mod:`rome.models.backbones` or a timm model (``rome list models``), ``file.py:function`` or
    ``package.module:function`` that returns a module, or ``robustbench:NAME``."""
    num_classes: int | None = Field(default=None, ge=2)
    """Number of classes; None takes the data set's."""
    img_size: int | None = Field(default=None, ge=1)
    """Height and width of the images in pixels, for models that are built for one size."""
    patch_size: int | None = Field(default=None, ge=1)
    """Side of a patch in pixels, for timm's transformers; None keeps the model's default."""
    in_chans: int | None = Field(default=None, ge=1)
    """Number of image channels; None takes the data set's."""
    pretrained: bool = False
    """Start from timm's pretrained weights."""
    mean: tuple[float, ...] | None = None
    """Channel means for normalising images in [0, 1] inside the model; None takes those of the weights, or 0.5."""
    std: tuple[float, ...] | None = None
    """Channel standard deviations of the normalisation; None as for ``mean``."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the model or the function, such as ``depth: 6``."""
    weights: str | None = None
    """Weights to start from: a run's folder, a safetensors file, ``hf://USER/NAME``, a checkpoint of ``torch.save`` or
    ``pyautoattack``; see :func:`rome.models.load_weights`."""
    weights_key: str | None = None
    """Which model to take if ``weights`` holds several, such as ``state_dict`` or ``teacher``."""
    drop_head: bool = False
    """Leave out the last layer of ``weights`` and initialise it anew, for other classes."""
    drop_experts: bool = False
    """Leave out the experts of ``weights``; otherwise the config must have the same, and they train on."""

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        for key, purpose in _WEIGHTS_OPTIONS.items():
            if self.weights is None and getattr(self, key):
                raise ValueError(f"model.{key} {purpose} of model.weights, which is not set; set it too")
        if fields := sorted(self.args.keys() & type(self).model_fields.keys() - {"args"}):
            raise ValueError(f"args: {', '.join(fields)} is a setting of the model itself; write model.{fields[0]}")
        return self

    def without_weights(self) -> Self:
        """Return the settings without weights to start from."""
        start = ("pretrained", "weights", *_WEIGHTS_OPTIONS)
        return self.model_copy(update={key: type(self).model_fields[key].default for key in start})

    def pinned(self) -> Self:
        """Return the settings with models on the Hub pinned to their current commits, since a branch may move on.

        Raises:
            UserError: a model cannot be downloaded.
        """
        return self.model_copy(
            update={key: pinned(at) for key in ("name", "weights") if on_hub(at := getattr(self, key))}
        )

    def architecture_only(self) -> Self:
        """Return settings without weights, for counting parameters and operations.

        A RobustBench model gets the name of its architecture in timm or rome, if it has one, so that RobustBench need
        not be installed.
        """
        zoo, _, name = self.name.rpartition(":")
        twin = TWINS.get((self.args.get("dataset", "cifar10"), name)) if f"{zoo}:" == ROBUSTBENCH else None
        renamed = {} if twin is None else {"name": twin, "args": {}}
        return self.without_weights().model_copy(update=renamed)


def create_model(
    name: str, *, num_classes: int, in_chans: int = 3, weights: str | Path | None = None, **settings: Any
) -> Classifier:
    """Create a classifier of images in [0, 1] from a model's name or from your own function.

    Args:
        name: one of

            - a backbone in :mod:`rome.models.backbones`: ``resnet_18``, ``wide_resnet_28_10``, ...;
            - a timm model, optionally with a weight tag (``vit_base_patch16_224.augreg_in21k``);
            - ``file.py:function`` / ``package.module:function``, called with ``num_classes`` and ``args``;
            - ``robustbench:NAME``, a model of RobustBench's zoo with its weights, if that package is installed;
              ``args``: ``dataset="cifar10"``, ``threat_model="Linf"``, ``model_dir="models"``.
        num_classes: number of logits.
        in_chans: number of image channels.
        weights: weights to start from, with their experts if they have any; see :func:`rome.models.load_weights`, whose
            remarks go to standard error.
        settings: settings of :class:`ModelSettings`, and further arguments of the model or the function
            (``depth=6, embed_dim=192``). timm resamples position and patch embeddings of pretrained weights.

    Raises:
        UserError: unknown name, an argument that the model does not take, or weights that do not fit.
    """
    own = {key: settings.pop(key) for key in settings.keys() & ModelSettings.model_fields.keys()}
    start = None if weights is None else str(weights)
    chosen = ModelSettings(name=name, num_classes=num_classes, in_chans=in_chans, weights=start, args=settings, **own)
    model = build_without_weights(chosen)
    if weights is not None:
        _load_start(model, chosen)
    return model


def build_without_weights(settings: ModelSettings) -> Classifier:
    """Build the model that settings with ``num_classes`` describe, without loading their ``weights``.

    Raises:
        UserError: unknown name, or an argument that the model does not take.
    """
    name, channels = settings.name, settings.in_chans or 3
    sizes = settings.model_dump(include={"img_size", "patch_size"}, exclude_none=True)
    options, num_classes = {**sizes, **settings.args}, settings.num_classes
    if num_classes is None:
        raise UserError("model.num_classes is missing")
    try:
        backbone = make_backbone(name, num_classes, channels, options, pretrained=settings.pretrained)
    except (UserError, Interrupted):
        raise
    except OSError as error:
        raise UserError(
            f"the weights of {name} cannot be downloaded: {first_line(error)}. Offline, set model.pretrained=false and "
            "model.weights=FILE, or HF_HUB_OFFLINE=1 and HF_HOME to a copy of another machine's cache"
        ) from error
    except Exception as error:  # a user's function can raise anything
        hint = "; null removes an inherited setting that the model does not take (model.img_size=null)" if sizes else ""
        all_args = ", ".join(f"{key}={value}" for key, value in {**options, "in_chans": channels}.items())
        raise UserError(f"model {name} cannot be built with {all_args}: {first_line(error)}{hint}") from error
    if not isinstance(backbone, nn.Module):
        raise UserError(f"{name} returned a {type(backbone).__name__}, not a torch module")
    expected = expected_normalization(backbone)
    mean = _per_channel(expected.mean if settings.mean is None else settings.mean, channels, "mean")
    std = _per_channel(expected.std if settings.std is None else settings.std, channels, "std")
    if min(std) <= 0:
        raise UserError(f"model.std must be positive, not {std}")
    model = Classifier(backbone, mean, std)
    model.recipe = {"name": name, "num_classes": num_classes, "in_chans": channels, "mean": mean, "std": std} | options
    return model


def _load_start(model: Classifier, settings: ModelSettings) -> None:
    """Load the weights to start from, and print the remarks on them."""
    remarks = load_weights(
        model,
        str(settings.weights),
        drop_head=settings.drop_head,
        drop_experts=settings.drop_experts,
        key=settings.weights_key,
        keep_normalization=settings.mean is not None or settings.std is not None,
    )
    for remark in remarks:
        say(remark)


def build_model(
    settings: ModelSettings, experts: Experts | None, *, classes: int, shape: tuple[int, int, int]
) -> Classifier:
    """Build a config's model, with its experts, for a data set with ``classes`` classes and images of shape (C, H, W).

    Raises:
        UserError: the settings do not fit the data, each other, or the starting weights.
    """
    if settings.num_classes not in (None, classes):
        raise UserError(f"model.num_classes is {settings.num_classes} but the data has {classes} classes; leave it out")
    if settings.in_chans not in (None, shape[0]):
        raise UserError(f"model.in_chans is {settings.in_chans} but the data has {shape[0]} channels; leave it out")
    continues = keeps_experts(settings, experts)
    model = build_without_weights(settings.model_copy(update={"num_classes": classes, "in_chans": shape[0]}))
    if settings.weights is not None and not continues:
        _load_start(model, settings)
    images, name, side = torch.zeros(2, *shape), f"model {settings.name}", settings.img_size
    hint = "set model.img_size and model.patch_size"
    if side not in (None, shape[-1]):
        hint = (
            f"the data has images of {shape[-1]} pixels, not model.img_size={side}: make them equal (data.size={side})"
        )
    with without_side_effects(model):
        outputs = checked_logits(model, images, name=name, hint=hint).shape[1]
        # in training mode some models also return auxiliary logits
        checked_logits(model.train(), images, name=f"{name} in training mode")
    if outputs != classes:
        raise UserError(f"{name} outputs {outputs} classes, and the data has {classes}")
    if experts is not None:
        experts.inject(model, images)
    if continues:
        try:
            _load_start(model, settings)
        except UserError as error:
            raise UserError(f"{error} (model.drop_experts=true starts with new experts)") from error
    return model.train()


def keeps_experts(settings: ModelSettings, experts: Experts | None) -> bool:
    """Whether training continues with the experts of the starting weights.

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


def _per_channel(values: Sequence[float], channels: int, name: str) -> tuple[float, ...]:
    if len(values) == channels:
        return tuple(values)
    if len(values) == 1 or channels == 1:
        return (sum(values) / len(values),) * channels
    raise UserError(f"model.{name} has {len(values)} values but the images have {channels} channels")
