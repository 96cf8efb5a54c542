"""Common corruptions: 15 types of 5 severities, from CIFAR-10-C's files or made on the fly.

Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations" (ICLR 2019);
constants from github.com/hendrycks/robustness, ``make_cifar_c.py`` and ``make_imagenet_c.py``. CIFAR-10-C's severities
are milder than ImageNet-C's. Images made here are of the same distributions as the published ones but not the same
images (other random numbers, another frost); ImageNet-C's are also stored as JPEG of quality 85, which is not done
here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rome.attacks.corruptions import distortions
from rome.core.errors import UserError
from rome.data.base import one_line

CorruptionType = Literal[
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
]
CORRUPTIONS: tuple[CorruptionType, ...] = get_args(CorruptionType)
Constants = Literal["cifar10-c", "imagenet-c"]
SEVERITIES: dict[str, dict[Constants, tuple[Any, ...]]] = {
    "gaussian_noise": {"cifar10-c": (0.04, 0.06, 0.08, 0.09, 0.10), "imagenet-c": (0.08, 0.12, 0.18, 0.26, 0.38)},
    "shot_noise": {"cifar10-c": (500, 250, 100, 75, 50), "imagenet-c": (60, 25, 12, 5, 3)},
    "impulse_noise": {"cifar10-c": (0.01, 0.02, 0.03, 0.05, 0.07), "imagenet-c": (0.03, 0.06, 0.09, 0.17, 0.27)},
    "defocus_blur": {
        "cifar10-c": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "imagenet-c": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    },
    "glass_blur": {
        "cifar10-c": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "imagenet-c": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
    },
    "motion_blur": {
        "cifar10-c": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "imagenet-c": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    },
    "zoom_blur": {
        "cifar10-c": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "imagenet-c": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
    },
    "snow": {
        "cifar10-c": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "imagenet-c": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    },
    "frost": {  # the last number is the size of the texture
        "cifar10-c": ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
        "imagenet-c": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
    },
    "fog": {
        "cifar10-c": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "imagenet-c": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    },
    "brightness": {"cifar10-c": (0.05, 0.1, 0.15, 0.2, 0.3), "imagenet-c": (0.1, 0.2, 0.3, 0.4, 0.5)},
    "contrast": {"cifar10-c": (0.75, 0.5, 0.4, 0.3, 0.15), "imagenet-c": (0.4, 0.3, 0.2, 0.1, 0.05)},
    "elastic_transform": {  # in sides of the image; ImageNet-C's are written for 244 pixels and used at 224
        "cifar10-c": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
        "imagenet-c": tuple(
            tuple(244 / 224 * value for value in row)
            for row in ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
        ),
    },
    "pixelate": {"cifar10-c": (0.95, 0.9, 0.85, 0.75, 0.65), "imagenet-c": (0.6, 0.5, 0.4, 0.3, 0.25)},
    "jpeg_compression": {"cifar10-c": (80, 65, 58, 50, 40), "imagenet-c": (25, 18, 15, 10, 7)},
}
"""What each function of ``distortions`` gets at severities 1 to 5."""

SEEDS = 4
"""Random numbers an image's generator is seeded with."""
_ROWS = 10_000
"""Images of each severity in a CIFAR-10-C file."""


def constants_for(side: int) -> Constants:
    """CIFAR-10-C's up to 32 pixels, ImageNet-C's above."""
    return "cifar10-c" if side <= 32 else "imagenet-c"


def corrupt(
    x: Tensor, name: CorruptionType, severity: int, noise: Tensor, constants: Constants | None = None
) -> Tensor:
    """Corrupted images: (B, C, H, W) in [0, 1], whole 255ths, like ``x`` in dtype and device.

    Args:
        x: images (B, C, H, W) in [0, 1], C 1 or 3; rounded to bytes first.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        noise: U[0, 1), (B, 4): seeds each image's random numbers, together with name and severity.
        constants: whose severities; None goes by the size of the images.

    Raises:
        UserError: another number of channels, or images smaller than 8 pixels.
    """
    if x.shape[1] not in (1, 3) or min(x.shape[2:]) < 8:
        raise UserError(f"{name} needs gray or RGB images of 8 pixels or more, not {tuple(x.shape[1:])} (C, H, W)")
    distort: Callable[..., NDArray[np.float64]] = getattr(distortions, name)
    c = SEVERITIES[name][constants or constants_for(max(x.shape[2:]))][severity - 1]
    pixels = (255 * x.detach()).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    seeds = (noise.cpu().double() * 2**24).long().tolist()
    found = np.empty_like(pixels)
    for i, (image, seed) in enumerate(zip(pixels, seeds, strict=True)):
        rng = np.random.default_rng([*seed, CORRUPTIONS.index(name), severity])
        found[i] = distort(image, c, rng).clip(0, 255)  # cut to whole numbers, as published
    return torch.from_numpy(found).permute(0, 3, 1, 2).to(x.device).to(x.dtype).div_(255).contiguous()


def read_cifar10c(
    path: str | Path, name: CorruptionType, severity: int, numbers: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Images of CIFAR-10-C: float32 (n, 3, 32, 32) in [0, 1], on the CPU.

    Args:
        path: the unpacked folder: ``{name}.npy``, uint8 (50000, 32, 32, 3), severity s at rows 10000 (s-1) and on, and
            ``labels.npy``.
        numbers: which of the 10,000 test images, int64 (n,); the order is that of CIFAR-10's own test set.
        labels: what they should be, int64 (n,): guards against another order.

    Raises:
        UserError: files missing or of another form, numbers beyond 9,999, or other labels.
    """
    folder = Path(os.path.expanduser(path))
    wrong = numbers[(numbers < 0) | (numbers >= _ROWS)]
    if len(wrong):
        raise UserError(f"CIFAR-10-C has no image {int(wrong[0])}: they are numbered 0 to {_ROWS - 1}")
    rows = (numbers.cpu() + _ROWS * (severity - 1)).numpy()
    truth = torch.from_numpy(_load(folder / "labels.npy", (5 * _ROWS,))[rows].astype(np.int64))
    if labels is not None and not torch.equal(truth, labels.cpu()):
        raise UserError(
            f"{int((truth != labels.cpu()).sum())} of {len(rows)} labels differ from those in {folder}: "
            "CIFAR-10-C belongs to the test images of CIFAR-10 in their own order"
        )
    images = _load(folder / f"{name}.npy", (5 * _ROWS, 32, 32, 3))[rows]
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous()


def check_cifar10c(path: str | Path, names: Iterable[str]) -> None:
    """See whether a folder holds CIFAR-10-C's labels and these types.

    Raises:
        UserError: a file is missing or of another form.
    """
    folder = Path(os.path.expanduser(path))
    _load(folder / "labels.npy", (5 * _ROWS,))
    for name in names:
        _load(folder / f"{name}.npy", (5 * _ROWS, 32, 32, 3))


def _load(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A uint8 array of this shape, left on disk."""
    if not file.is_file():
        raise UserError(f"{file} is missing: give the unpacked folder of CIFAR-10-C, with labels.npy and a file a type")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None
    if array.shape != shape or array.dtype != np.uint8:
        raise UserError(f"{file} must hold uint8 {shape}, not {array.dtype} {array.shape}")
    return array
