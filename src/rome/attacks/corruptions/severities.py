"""Common corruptions: 15 types at 5 severities, read from CIFAR-10-C's files or generated on the fly.

Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations" (ICLR 2019);
constants from github.com/hendrycks/robustness, ``make_cifar_c.py`` and ``make_imagenet_c.py``. CIFAR-10-C's severities
are milder than ImageNet-C's. Generated images follow the published distributions but are not the published images:
random numbers and frost differ, and ImageNet-C's images were also stored as JPEGs of quality 85.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator
from torch import Tensor

from rome.attacks.corruptions import distortions
from rome.core.errors import UserError, did_you_mean
from rome.data.base import one_line

Constants = Literal["cifar10-c", "imagenet-c"]


SEVERITIES: dict[str, dict[Constants, list[Any]]] = json.loads(
    Path(__file__).with_suffix(".json").read_text(encoding="utf-8")
)
"""Constants of each function in ``distortions`` for severities 1 to 5. Frost's last number is the scale of its texture;
those of the elastic transform are shares of the image's side."""
for row in SEVERITIES["elastic_transform"]["imagenet-c"]:
    row[:] = [244 / 224 * value for value in row]  # the original sets them for 244 pixels but uses 224
CORRUPTIONS = tuple(SEVERITIES)


def _known(name: str) -> str:
    if name not in CORRUPTIONS:
        raise ValueError(f"there is no corruption {name!r}.{did_you_mean(name, CORRUPTIONS)}")
    return name


CorruptionType = Annotated[str, AfterValidator(_known)]
SEEDS = 4
"""Number of random numbers that seed an image's generator."""
_ROWS = 10_000
"""Number of images of each severity in a CIFAR-10-C file."""


def constants_for(side: int) -> Constants:
    """CIFAR-10-C's up to 32 pixels, ImageNet-C's above."""
    return "cifar10-c" if side <= 32 else "imagenet-c"


def corrupt(
    x: Tensor, name: CorruptionType, severity: int, noise: Tensor, constants: Constants | None = None
) -> Tensor:
    """Return corrupted images (B, C, H, W) in [0, 1], multiples of 1/255, with dtype and device of ``x``.

    Args:
        x: images (B, C, H, W) in [0, 1] with C = 1 or 3; they are rounded to bytes first.
        name: one of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        noise: U[0, 1), (B, 4): seeds each image's random numbers, together with name and severity.
        constants: which benchmark's severities to use; None: depends on the size of the images.

    Raises:
        UserError: a different number of channels, or images smaller than 8 pixels.
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
        found[i] = distort(image, c, rng).clip(0, 255)  # truncated to whole numbers, as published
    return torch.from_numpy(found).permute(0, 3, 1, 2).to(x.device).to(x.dtype).div_(255).contiguous()


def read_cifar10c(
    path: str | Path, name: CorruptionType, severity: int, numbers: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Read images of CIFAR-10-C: float32 (n, 3, 32, 32) in [0, 1], on the CPU.

    Args:
        path: the unpacked folder with ``{name}.npy``, uint8 (50000, 32, 32, 3), where severity s starts at row
            10000 (s-1), and ``labels.npy``.
        numbers: which of the 10,000 test images to read, int64 (n,), in the order of CIFAR-10's test set.
        labels: the expected labels, int64 (n,), to detect a different order.

    Raises:
        UserError: a file is missing or malformed, a number exceeds 9,999, or a label differs.
    """
    wrong = numbers[(numbers < 0) | (numbers >= _ROWS)]
    if len(wrong):
        raise UserError(f"CIFAR-10-C has no image {int(wrong[0])}: they are numbered 0 to {_ROWS - 1}")
    rows = (numbers.cpu() + _ROWS * (severity - 1)).numpy()
    truth = torch.from_numpy(load_cifar10c(path, "labels")[rows].astype(np.int64))
    if labels is not None and not torch.equal(truth, labels.cpu()):
        raise UserError(
            f"{int((truth != labels.cpu()).sum())} of {len(rows)} labels differ from those in {path}: "
            "CIFAR-10-C belongs to the test images of CIFAR-10 in their original order"
        )
    images = load_cifar10c(path, name)[rows]
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous()


def load_cifar10c(path: str | Path, name: str) -> NDArray[np.uint8]:
    """Open a file of CIFAR-10-C, memory-mapped.

    Raises:
        UserError: the file is missing or malformed.
    """
    file = Path(os.path.expanduser(path)) / f"{name}.npy"
    shape = (5 * _ROWS,) if name == "labels" else (5 * _ROWS, 32, 32, 3)
    if not file.is_file():
        raise UserError(f"{file} is missing: give the unpacked folder of CIFAR-10-C, which contains it")
    try:
        array: NDArray[np.uint8] = np.lib.format.open_memmap(file, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None
    if array.shape != shape or array.dtype != np.uint8:
        raise UserError(f"{file} must hold uint8 {shape}, not {array.dtype} {array.shape}")
    return array
