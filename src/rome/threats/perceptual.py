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

    d compares the activations of a network (:mod:`rome.attacks.perceptual.features`), so the threat alone can measure
    nothing: what it checks is the box. The network that d needs is the attacked model itself, or one that attacks read
    from a file.
    """

    kind = "perceptual"
    bound: Number = Field(ge=0)
    """Largest distance."""
    features: str = Field(default="self", min_length=1)
    """The network: ``self`` for the attacked model, or the folder of a run or a safetensors file of ours."""
    layers: tuple[str, ...] = ()
    """The modules of its backbone to take activations from; none: those of
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
        """The network in hand; None: not read yet, or the attacked model."""
        return self._network

    def measured_by(self, network: nn.Module) -> Self:
        """This threat with its network in hand, so that attacks need not read it at every call."""
        threat = self.model_copy()
        threat._network = network
        return threat

    def size(self, x_adv: Tensor, x: Tensor) -> Tensor:
        raise UserError(
            f"{self.name} needs a network to measure with: call rome.attacks.perceptual.features.measure(threat, ...)"
        )
