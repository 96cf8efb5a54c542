"""Common corruptions: 15 types of 5 severities, from CIFAR-10-C's files or made on the fly.

Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations" (ICLR 2019);
constants from github.com/hendrycks/robustness, ``make_cifar_c.py`` and ``make_imagenet_c.py``. CIFAR-10-C's severities
are milder than ImageNet-C's. Images made here are of the same distributions as the published ones but not the same
images (other random numbers, another frost); ImageNet-C's are also stored as JPEG of quality 85, which is not done
here.
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
"""What each function of ``distortions`` gets at severities 1 to 5. Frost's last number is the size of its texture; the
elastic transform's are in sides of the image."""
for row in SEVERITIES["elastic_transform"]["imagenet-c"]:
    row[:] = [244 / 224 * value for value in row]  # they are written for 244 pixels and used at 224
CORRUPTIONS = tuple(SEVERITIES)


def _known(name: str) -> str:
    if name not in CORRUPTIONS:
        raise ValueError(f"there is no corruption {name!r}.{did_you_mean(name, CORRUPTIONS)}")
    return name


CorruptionType = Annotated[str, AfterValidator(_known)]
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
    wrong = numbers[(numbers < 0) | (numbers >= _ROWS)]
    if len(wrong):
        raise UserError(f"CIFAR-10-C has no image {int(wrong[0])}: they are numbered 0 to {_ROWS - 1}")
    rows = (numbers.cpu() + _ROWS * (severity - 1)).numpy()
    truth = torch.from_numpy(load_cifar10c(path, "labels")[rows].astype(np.int64))
    if labels is not None and not torch.equal(truth, labels.cpu()):
        raise UserError(
            f"{int((truth != labels.cpu()).sum())} of {len(rows)} labels differ from those in {path}: "
            "CIFAR-10-C belongs to the test images of CIFAR-10 in their own order"
        )
    images = load_cifar10c(path, name)[rows]
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255).contiguous()


def load_cifar10c(path: str | Path, name: str) -> NDArray[np.uint8]:
    """One of its files, left on disk.

    Raises:
        UserError: it is missing or of another form.
    """
    file = Path(os.path.expanduser(path)) / f"{name}.npy"
    shape = (5 * _ROWS,) if name == "labels" else (5 * _ROWS, 32, 32, 3)
    if not file.is_file():
        raise UserError(f"{file} is missing: give the unpacked folder of CIFAR-10-C, with labels.npy and a file a type")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file} cannot be read: {one_line(error)}") from None
    if array.shape != shape or array.dtype != np.uint8:
        raise UserError(f"{file} must hold uint8 {shape}, not {array.dtype} {array.shape}")
    return array
