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
    """A common corruption: a fixed transform of every image, independent of the model, and so not an attack.

    All images count towards its accuracy, because a misclassified image may become correctly classified. Without
    ``path`` the corrupted images are generated here; with it they are read from CIFAR-10-C by their number in the test
    set, which only :meth:`images` is given.
    """

    kind = "corruption"
    accepts = (AnyImage, "is a fixed transform: run it under AnyImage(label=NAME)")
    channels = (1, 3)
    needs_gradients: ClassVar[bool] = False
    draws_by_image: ClassVar[bool] = True
    not_for_training: ClassVar[str] = "is a fixed change that searches nothing"

    type: CorruptionType
    """Name of the corruption in CIFAR-10-C, such as ``fog`` or ``gaussian_noise``."""
    severity: int = Field(ge=1, le=5)
    """From 1, the weakest, to 5."""
    path: str | None = None
    """The unpacked folder of CIFAR-10-C; None: the images are generated."""
    constants: Constants | None = None
    """Which benchmark's severities to generate; None: CIFAR-10-C's up to 32 pixels and ImageNet-C's above."""

    @model_validator(mode="after")
    def _made_or_read(self) -> Self:
        if self.path is not None and self.constants is not None:
            raise ValueError("constants apply to generated images and path to images that are read: leave one out")
        return self

    def unsupported_reason(self, channels: int) -> str:
        if self.path is not None and channels != 3:
            return f"needs images of 3 channels, not {channels}"
        return super().unsupported_reason(channels)

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        return (SEEDS,)

    def images(self, x: Tensor, y: Tensor, numbers: Tensor, source: Stream) -> Tensor:
        """Return the corrupted images, with shape, dtype and device of ``x``.

        Args:
            x: clean images (B, C, H, W) in [0, 1].
            y: their labels, int64 (B,).
            numbers: their positions in the test set, int64 (B,); used for CIFAR-10-C.
            source: random numbers for generated images.

        Raises:
            UserError: CIFAR-10-C is missing, or its labels or the size of its images differ.
        """
        if self.path is None:
            return corrupt(x, self.type, self.severity, source.by_image(x, (SEEDS,)), self.constants)
        if x.shape[1:] != (3, 32, 32):
            raise UserError(f"CIFAR-10-C has images of 3 x 32 x 32, not {' x '.join(map(str, x.shape[1:]))}")
        return read_cifar10c(self.path, self.type, self.severity, numbers, y).to(x)

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        if self.path is not None:
            raise UserError(
                "a corruption that is read from CIFAR-10-C needs the numbers of the images: call Corruption.images, "
                "or leave path out to generate the images"
            )
        found = corrupt(x, self.type, self.severity, noise, self.constants)
        return AttackResult(found, found, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)
