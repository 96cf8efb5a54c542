"""The perceptual threat: images within a distance that a network measures."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from rome.core.component import Number
from rome.core.errors import UserError
from rome.threats.base import Threat


class Perceptual(Threat):
    """All images in [0,1] whose perceptual distance d to the original is at most ``bound`` (Laidlaw et al. 2021).

    d compares the activations of a network (:mod:`rome.attacks.perceptual.features`), so the threat alone cannot
    compute it and checks only the box. The network is the attacked model itself, or one that attacks load from a file.
    """

    kind = "perceptual"
    bound: Number = Field(ge=0)
    """The largest distance allowed."""
    features: str = Field(default="self", min_length=1)
    """The network: ``self`` for the attacked model, or a run's folder or a safetensors file saved by rome."""
    layers: tuple[str, ...] = ()
    """The modules of its backbone whose activations are compared; empty: those of
    :func:`rome.attacks.perceptual.features.feature_layers`."""
    _network: nn.Module | None = PrivateAttr(default=None)

    @property
    def name(self) -> str:
        path = Path(self.features)
        if path.suffix == ".safetensors":
            path = path.parent if path.stem == "model" and path.parent.name else path.with_suffix("")
        return f"LPIPS-{path.name}"

    @property
    def network(self) -> nn.Module | None:
        """The loaded network; None: not loaded yet, or the attacked model."""
        return self._network

    def measured_by(self, network: nn.Module) -> Self:
        """Return this threat with a loaded network, so that attacks need not load it at every call."""
        threat = self.model_copy()
        threat._network = network
        return threat

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        raise UserError(
            f"{self.name} cannot measure without a network: call rome.attacks.perceptual.features.measure(threat, ...)"
        )
