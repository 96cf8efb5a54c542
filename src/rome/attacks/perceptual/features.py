"""The perceptual distance of Laidlaw et al. (2021) and the features it compares.

    phi(x) = concatenation over layers of a_l(x) / (|a_l(x)|_2 sqrt(H_l W_l)),   d(x, x') = |phi(x) - phi(x')|_2

a_l are a layer's activations; |a_l|_2 is taken over channels at each position. d is neither weighted nor squared, so it
is not the distance of the ``lpips`` package; one layer contributes at most 2 to it. The details follow the paper and
the repository cassidylaidlaw/perceptual-advex.
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
"""Added to the norm over channels."""
ALL = slice(None)


def distance(phi: Tensor, other: Tensor) -> Tensor:
    """Distance d between features (B, D): (B,)."""
    return torch.linalg.vector_norm(phi - other, dim=1)


def measure(threat: Perceptual, model: Model, x_adv: Tensor, x: Tensor) -> Tensor:
    """Distance d of each pair of images, measured by the threat's network in evaluation mode (``model`` if the network
    is ``self``): (B,)."""
    perception = Perception(model, [(threat, ALL)], x.device)
    with frozen(model), perception.frozen(), torch.no_grad():
        return distances(perception.features(x_adv), perception.features(x))


def feature_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the modules of a model's backbone whose outputs form phi.

    A backbone can name them in an attribute ``feature_layers: tuple[str, ...]`` (``alexnet_cifar``: its five ReLUs).
    Otherwise they are the four stages of a ResNet (``layer1`` .. ``layer4``, as in perceptual-advex), the five ReLUs
    before the classifier of torchvision's AlexNet, the stages of a ConvNeXt or Swin, the groups of a Wide ResNet, or
    the last block in each quarter of a ViT (3, 6, 9, 12 of 12).

    Raises:
        UserError: the backbone is none of these.
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
        f"the feature layers of a {type(backbone).__name__} are unknown; name them (layers=...), or give the network "
        f"an attribute feature_layers. Its modules are {', '.join(name for name, _ in backbone.named_children())}"
    )


class Features:
    """A network's logits and features phi in one forward; all hooks are removed from its modules afterwards.

    Args:
        model: maps images (B, C, H, W) in [0, 1] to logits.
        layers: names of modules of its backbone; empty: those of :func:`feature_layers`. Outputs may be (B, C, H, W),
            tokens (B, N, C), of which only the patches count, or (B, C).

    Raises:
        UserError: the model is not a module, has no such layer, or its layers are unknown.
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
        """Features alone; the forward stops at the last feature layer."""
        with suppress(_Enough), self.recording(last=True) as found:
            self.model(images)
        return self.joined(found)

    @contextmanager
    def recording(self, rows: slice = ALL, *, last: bool = False) -> Iterator[dict[str, Tensor]]:
        """Record the layers' outputs for these rows during a forward inside the context, for :meth:`joined`; with
        ``last``, stop the forward after the last layer by raising :class:`_Enough`."""
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
        """Concatenate the recorded outputs to phi (B, D).

        Raises:
            UserError: a layer did not run.
        """
        for name in self._modules:
            if name not in found:
                raise UserError(f"layer {name} did not run in this forward; choose layers that always run")
        return torch.cat([found[name] for name in self._modules], dim=1)

    def _normalised(self, name: str, output: Any, rows: slice) -> Tensor:
        """Activations of these rows, scaled to norm 1 / sqrt(positions) at each position: (B, positions * channels)."""
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
    """Perceptual features of a batch, computed by the networks of the examples' threats.

    Features are a list with one tensor (rows, D) for each group of examples, because D differs between networks.

    Args:
        model: the attacked model, which is also the network of threats with features ``self``.
        groups: perceptual threats and the rows of their examples.
        device: where to put networks that must be loaded first.

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
    def frozen(self) -> Iterator[None]:
        """Freeze all networks except the attacked model inside the context."""
        with ExitStack() as stack:
            for network in dict.fromkeys(part.features.model for part in self._parts if not part.own):
                stack.enter_context(frozen(network))
            yield

    def bounds(self, x: Tensor) -> Tensor:
        """The bound for each example: (B,)."""
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
        """The features alone; each network processes only its own examples."""
        return [part.phi(images) for part in self._parts]


def distances(phi: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Distance d of each example, from the features of all groups: (B,)."""
    return torch.cat([distance(one, two) for one, two in zip(phi, other, strict=True)])


class _Part(NamedTuple):
    """One group of a batch and the network that computes its features."""

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
    """Return the threat with its network, loaded from its file if necessary, in evaluation mode and without parameter
    gradients; a threat with features ``self`` is returned unchanged.

    Raises:
        UserError: the file does not exist, or is not a model of rome.
    """
    if threat.features == "self" or threat.network is not None:
        return threat
    try:
        network = load_model(threat.features)
    except UserError as error:
        raise UserError(
            f"no network to measure perceptual distances with: {error}. Train it (rome train "
            "experiments/alexnet/cifar10.yaml --out runs/alexnet; on the digits experiments/digits/cnn.yaml --out "
            "runs/cnn), or name a different one (rome evaluate --features PATH)"
        ) from error
    return threat.measured_by(network.to(device).requires_grad_(False))


def network_hash(threat: Threat) -> str | None:
    """SHA-256 of the file of a perceptual threat's network; None if the network is the attacked model, if there is no
    such file, and for all other threats."""
    if not isinstance(threat, Perceptual) or threat.features == "self":
        return None
    file = weights_file(threat.features)
    return file_hash(file) if file.is_file() else None


class _Enough(Exception):  # noqa: N818
    """Raised to stop a forward after all feature layers have run."""


def _backbone(model: nn.Module) -> nn.Module:
    """The module whose layers users name: the model without its normalisation and compilation wrappers."""
    return getattr(unwrapped(model), "backbone", unwrapped(model))


def _eager(model: nn.Module) -> AbstractContextManager[Any]:
    """Run a compiled model uncompiled inside the context, because compiled code ignores temporary hooks."""
    if hasattr(model, "_orig_mod") or any(module._compiled_call_impl is not None for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
