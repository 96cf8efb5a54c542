"""The perceptual distance of Laidlaw et al. (2021) and the features it compares.

    phi(x) = concatenation over layers of a_l(x) / (|a_l(x)|_2 sqrt(H_l W_l)),   d(x, x') = |phi(x) - phi(x')|_2

a_l are a layer's activations, |.|_2 is taken over channels at each position. d is neither weighted nor squared, so it
is not the distance of the ``lpips`` package; one layer contributes at most 2 to it. Facts from the paper and from the
repository cassidylaidlaw/perceptual-advex.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rome.attacks.engine import Model, at_least_float32, frozen
from rome.core.errors import UserError, did_you_mean
from rome.core.trial import failure
from rome.core.wrappers import unwrapped
from rome.experts.placement import channels_last
from rome.models import file_hash, load_model, weights_file
from rome.threats import Perceptual, Threat

EPS = 1e-10
"""Added to the length over channels."""
ALL = slice(None)


def distance(phi: Tensor, other: Tensor) -> Tensor:
    """d between features (B, D): (B,)."""
    return torch.linalg.vector_norm(phi - other, dim=1)


def measure(threat: Perceptual, model: Model, x_adv: Tensor, x: Tensor) -> Tensor:
    """d of each pair of images, by the threat's network (``model`` itself where that is ``self``), in evaluation mode:
    (B,)."""
    seen = Perception(model, [(threat, ALL)], x.device)
    with frozen(model), seen.still(), torch.no_grad():
        return distances(seen.features(x_adv), seen.features(x))


def feature_layers(model: nn.Module) -> tuple[str, ...]:
    """The modules of a model's backbone whose outputs make phi.

    A backbone with an attribute ``feature_layers: tuple[str, ...]`` says it itself (``alexnet_cifar``: its five ReLUs).
    Otherwise: the four stages of a ResNet (``layer1`` .. ``layer4``, as in perceptual-advex), the five ReLUs before the
    classifier of torchvision's AlexNet, the stages of a ConvNeXt or Swin, the groups of a Wide ResNet, the blocks that
    end the quarters of a ViT's depth (3, 6, 9, 12 of 12).

    Raises:
        UserError: none of these.
    """
    backbone = _backbone(model)
    own = getattr(backbone, "feature_layers", None)
    if own:
        return tuple(own)
    blocks = getattr(backbone, "blocks", None)
    if hasattr(backbone, "patch_embed") and isinstance(blocks, (nn.Sequential, nn.ModuleList)) and len(blocks):
        last = dict.fromkeys(math.ceil(len(blocks) * quarter / 4) for quarter in (1, 2, 3, 4))
        return tuple(f"blocks.{number - 1}" for number in last)
    stages = tuple(f"layer{number}" for number in (1, 2, 3, 4))
    if all(isinstance(getattr(backbone, name, None), nn.Module) for name in stages):
        return stages
    from torchvision.models import AlexNet

    if isinstance(backbone, AlexNet):
        return tuple(f"features.{i}" for i, module in backbone.features.named_children() if isinstance(module, nn.ReLU))
    for name in ("stages", "layers", "layer"):
        found = getattr(backbone, name, None)
        if isinstance(found, (nn.Sequential, nn.ModuleList)) and len(found) > 1:
            return tuple(f"{name}.{number}" for number in range(len(found)))
    raise UserError(
        f"the layers that show what a {type(backbone).__name__} sees are unknown; name them (layers=...), or give "
        f"the network an attribute feature_layers. It has {', '.join(name for name, _ in backbone.named_children())}"
    )


class Features:
    """A network's logits and features phi, in one forward; nothing stays on its modules afterwards.

    Args:
        model: images (B, C, H, W) in [0, 1] to logits.
        layers: modules of its backbone; none: those of :func:`feature_layers`. Outputs may be (B, C, H, W), tokens
            (B, N, C), of which only the patches count, or (B, C).

    Raises:
        UserError: not a module, no such layer, or layers that are unknown.
    """

    def __init__(self, model: Model, layers: Sequence[str] = ()) -> None:
        if not isinstance(model, nn.Module):
            raise UserError(f"features are read from the layers of a torch module, not of a {type(model).__name__}")
        self.model, backbone = model, _backbone(model)
        modules, self.layers = dict(backbone.named_modules()), tuple(layers or feature_layers(model))
        for name in self.layers:
            if name not in modules:
                raise UserError(f"{type(backbone).__name__} has no layer {name!r}.{did_you_mean(name, modules)}")
        self._modules = {name: modules[name] for name in self.layers}
        self._patches = getattr(getattr(backbone, "patch_embed", None), "num_patches", None)
        self._prefix = int(getattr(backbone, "num_prefix_tokens", 0))
        self._channels_last = {name for name in self.layers if channels_last(backbone, name)}

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) and phi (B, D)."""
        with self.recording() as found:
            logits = self.model(images)
        return logits, self.joined(found)

    def phi(self, images: Tensor) -> Tensor:
        """Features alone: the forward ends at the last layer."""
        with suppress(_Enough), self.recording(last=True) as found:
            self.model(images)
        return self.joined(found)

    @contextmanager
    def recording(self, rows: slice = ALL, *, last: bool = False) -> Iterator[dict[str, Tensor]]:
        """What the layers give for these rows in a forward inside the context, for :meth:`joined`."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if name in found:
                    raise UserError(f"layer {name} runs more than once in a forward; choose layers that run once")
                found[name] = self._normalised(name, output, rows)
                if last and len(found) == len(self._modules):
                    raise _Enough

            return hook

        with ExitStack() as stack:
            stack.enter_context(_eager(self.model))
            for name, module in self._modules.items():
                stack.callback(module.register_forward_hook(keep(name)).remove)
            yield found

    def joined(self, found: dict[str, Tensor]) -> Tensor:
        """phi (B, D) of what was recorded.

        Raises:
            UserError: a layer did not run.
        """
        for name in self._modules:
            if name not in found:
                raise UserError(f"layer {name} did not run in this forward; choose layers that always run")
        return torch.cat([found[name] for name in self._modules], dim=1)

    def _normalised(self, name: str, output: Any, rows: slice) -> Tensor:
        """Activations of these rows (B, positions * channels), of length 1 / sqrt(positions) at each position."""
        if not isinstance(output, Tensor) or output.ndim not in (2, 3, 4):
            what = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UserError(f"layer {name} gives {what}, not images (B, C, H, W) or tokens (B, N, C); choose another")
        output = at_least_float32(output[rows])
        channels = -1 if output.ndim == 3 or name in self._channels_last else 1
        if output.ndim == 3 and output.shape[1] != self._patches:
            output = output[:, self._prefix :]
        positions = output[0].numel() // output.shape[channels]
        length = torch.linalg.vector_norm(output, dim=channels, keepdim=True) + EPS
        return (output / (length * math.sqrt(positions))).flatten(1)


class Perception:
    """How the examples of a batch look to the networks that their threats measure with.

    Features are a list with one tensor (rows, D) for each group of examples, because networks differ in D.

    Args:
        model: the attacked model, which is the network of every ``self``.
        groups: perceptual threats and the rows of their examples.
        device: where to put networks that have to be read first.

    Raises:
        UserError: a network cannot be read, or its layers cannot be found.
    """

    def __init__(self, model: Model, groups: Sequence[tuple[Any, ...]], device: torch.device | str = "cpu") -> None:
        self.model, self._parts = model, list[_Part]()
        for threat, rows, *_ in groups:
            network = model if threat.features == "self" else loaded(threat, device).network
            assert network is not None
            self._parts.append(_Part(threat, rows, Features(network, threat.layers)))

    @contextmanager
    def still(self) -> Iterator[None]:
        """The networks that are not the model frozen inside."""
        with ExitStack() as stack:
            for network in dict.fromkeys(part.features.model for part in self._parts if not part.own):
                stack.enter_context(frozen(network))
            yield

    def bounds(self, x: Tensor) -> Tensor:
        """The bound of every example: (B,)."""
        return torch.cat([x.new_empty(0), *(x.new_full((len(x[p.rows]),), p.threat.bound) for p in self._parts)])

    def __call__(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits of the model (B, classes) and the features of ``images``, in one forward of each network."""
        with ExitStack() as stack:
            recorded = [
                stack.enter_context(part.features.recording(part.rows)) if part.own else {} for part in self._parts
            ]
            logits = self.model(images)
        found = zip(self._parts, recorded, strict=True)
        phi = [part.features.joined(own) if part.own else part.phi(images) for part, own in found]
        return at_least_float32(logits), phi

    def features(self, images: Tensor) -> list[Tensor]:
        """The features alone; each network sees the examples that it measures."""
        return [part.phi(images) for part in self._parts]


def distances(phi: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """d of every example, from the features of all groups: (B,)."""
    return torch.cat([distance(one, two) for one, two in zip(phi, other, strict=True)])


class _Part(NamedTuple):
    """One group of a batch, and the network that measures it."""

    threat: Perceptual
    rows: slice
    features: Features

    @property
    def own(self) -> bool:
        """Whether the network is the attacked model."""
        return self.threat.features == "self"

    def phi(self, images: Tensor) -> Tensor:
        images = images[self.rows]
        try:
            return self.features.phi(images)
        except RuntimeError as error:
            if self.own:
                raise
            raise failure(error, self.features.model, images, f"the network of {self.threat.name}") from error


def loaded(threat: Perceptual, device: torch.device | str) -> Perceptual:
    """The threat with its network in hand: read from its file unless it is, frozen, in evaluation mode. ``self`` stays.

    Raises:
        UserError: there is no such file, or it is not a model of ours.
    """
    if threat.features == "self" or threat.network is not None:
        return threat
    try:
        network = load_model(threat.features)
    except UserError as error:
        raise UserError(
            f"no network to measure perceptual distances with: {error}. Train it (rome train "
            "experiments/alexnet/cifar10.yaml --out runs/alexnet; on the digits experiments/digits/cnn.yaml --out "
            "runs/cnn), or name another (rome evaluate --features PATH)"
        ) from error
    return threat.measured_by(network.to(device).requires_grad_(False))


def network_hash(threat: Threat) -> str | None:
    """SHA-256 of the file that a perceptual threat's network is read from; None where it is the attacked model, where
    there is no such file, and of other threats."""
    if not isinstance(threat, Perceptual) or threat.features == "self":
        return None
    file = weights_file(threat.features)
    return file_hash(file) if file.is_file() else None


class _Enough(Exception):  # noqa: N818
    """Every layer has run; the rest of the forward is not needed."""


def _backbone(model: nn.Module) -> nn.Module:
    """The module whose layers a person names: without normalisation and compilation around it."""
    return getattr(unwrapped(model), "backbone", unwrapped(model))


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Compiled code does not see hooks that come and go; such a model runs uncompiled inside."""
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
