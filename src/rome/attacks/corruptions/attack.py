"""Common corruptions as cases of an evaluation (paper 5.2, Table 2)."""

from __future__ import annotations

from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rome.attacks.base import NOT_EVALUATED, Attack, AttackResult, Group
from rome.attacks.corruptions.severities import SEEDS, Constants, CorruptionType, corrupt, read_cifar10c
from rome.attacks.engine import Model
from rome.core.errors import UserError
from rome.core.randomness import Stream
from rome.threats import AnyImage


class Corruption(Attack):
    """A common corruption: not an attack but a fixed transform of every image, without steps and blind to the model.

    Its accuracy counts all images: one that the model gets wrong may become right. Without ``path`` the images are made
    here; with it they are read from CIFAR-10-C, where they are found by their number, so that :meth:`images` must be
    called.
    """

    kind = "corruption"
    searches = (AnyImage, "is a fixed transform: run it under AnyImage(label=NAME)")
    channels = (1, 3)
    differentiates: ClassVar[bool] = False
    draws_by_image: ClassVar[bool] = True
    untrained: ClassVar[str] = "is a fixed change that searches nothing"

    type: CorruptionType
    """Such as ``fog`` or ``gaussian_noise``, as CIFAR-10-C names them."""
    severity: int = Field(ge=1, le=5)
    """From 1, the weakest, to 5."""
    path: str | None = None
    """The unpacked folder of CIFAR-10-C; None makes the images."""
    constants: Constants | None = None
    """Whose severities to make; None is CIFAR-10-C's up to 32 pixels and ImageNet-C's above."""

    @model_validator(mode="after")
    def _made_or_read(self) -> Self:
        if self.path is not None and self.constants is not None:
            raise ValueError("constants are of images that are made; with path they are read: leave one out")
        return self

    def unsuited(self, channels: int) -> str:
        if self.path is not None and channels != 3:
            return f"needs images of 3 channels, not {channels}"
        return super().unsuited(channels)

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        return (SEEDS,)

    def images(self, x: Tensor, y: Tensor, numbers: Tensor, source: Stream) -> Tensor:
        """The corrupted images, like ``x``.

        Args:
            x: clean images (B, C, H, W) in [0, 1].
            y: their labels, int64 (B,).
            numbers: their places in the test set, int64 (B,); for CIFAR-10-C.
            source: for images made here.

        Raises:
            UserError: CIFAR-10-C is not there, or has other labels or images of another size.
        """
        if self.path is None:
            return corrupt(x, self.type, self.severity, source.by_image(x, (SEEDS,)), self.constants)
        if x.shape[1:] != (3, 32, 32):
            raise UserError(f"CIFAR-10-C has images of 3 x 32 x 32, not {' x '.join(map(str, x.shape[1:]))}")
        return read_cifar10c(self.path, self.type, self.severity, numbers, y).to(x)

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        if self.path is not None:
            raise UserError(
                "a corruption read from CIFAR-10-C needs the numbers of the images: call Corruption.images, "
                "or leave path out to make the images"
            )
        found = corrupt(x, self.type, self.severity, noise, self.constants)
        return AttackResult(found, found, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)
