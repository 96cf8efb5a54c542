"""Read uploaded files as images of a model's input shape."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rome.core.errors import UserError
from rome.data.base import one_line
from rome.data.pixels import eight_bits

MOST_BYTES = 20 * 2**20
MOST_PIXELS = 50_000_000
"""Larger images are refused before they are decoded."""


class Shown(NamedTuple):
    """The image on the page, as the models read it."""

    image: Tensor
    """float32 (C, H, W) in [0, 1]."""
    description: str
    """Description: what the image is, where it comes from and how it was converted."""
    label: int | None = None
    """None if unknown."""


def read_upload(path: str | Path, shape: tuple[int, int, int]) -> Shown:
    """Read an image file as float32 (C, H, W): rotated as its EXIF says, cropped to the centre, resized (bicubic).

    Transparent parts become white; of several frames the first is taken.

    Args:
        shape: (C, H, W) with one or three channels.

    Raises:
        UserError: the file is empty, broken, too large or not an image, or the model reads neither 1 nor 3 channels.
    """
    path = Path(path)
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"this model reads images of {channels} channels, which no image file has; use a test image")
    image, steps = _opened(path)
    left, top, side, tall = _centre(image.size, (width, height))
    if (side, tall) != image.size:
        image = image.crop((left, top, left + side, top + tall))
        steps.append(f"cropped to the central {side} x {tall}")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        steps.append(f"resized to {width} x {height}")
    if image.mode != (target := "L" if channels == 1 else "RGB"):
        steps.append("converted to gray" if channels == 1 else "gray repeated in three channels")
        image = image.convert(target)
    pixels = np.array(image, dtype=np.float32).reshape(height, width, channels) / 255
    said = f"{path.name}: {', '.join(steps)}."
    return Shown(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), said)


def _opened(path: Path) -> tuple[Image.Image, list[str]]:
    """Decode an image to gray or RGB; also return its original size and mode, and the conversions made."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror}); upload it again") from None
    if size == 0:
        raise UserError(f"{path.name} is empty; upload an image file, such as PNG or JPEG")
    if size > MOST_BYTES:
        raise UserError(f"{path.name} is larger than {MOST_BYTES // 2**20} MiB; upload a smaller file")
    try:
        with Image.open(path) as opened:
            wide, tall = opened.size
            if wide * tall > MOST_PIXELS:
                raise Image.DecompressionBombError
            steps = [f"{wide} x {tall} {opened.mode}"]
            if getattr(opened, "n_frames", 1) > 1:
                steps.append("first frame only")
            image = ImageOps.exif_transpose(eight_bits(opened))
            if opened.getexif().get(0x0112, 1) not in (0, 1):
                steps.append("rotated as its EXIF says")
            image = _plain(image, steps)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{path.name} has more than {MOST_PIXELS // 10**6} million pixels; upload a smaller image"
        ) from None
    except Exception as error:  # Pillow raises almost any exception for a broken file
        raise UserError(
            f"{path.name} cannot be read as an image ({one_line(error)}); upload an image file, such as PNG or JPEG"
        ) from None
    return image, steps


def _plain(image: Image.Image, steps: list[str]) -> Image.Image:
    """Convert to mode L or RGB, with transparent parts on white."""
    if image.mode in ("L", "RGB"):
        if "transparency" not in image.info:
            return image
    elif image.mode == "1":
        return image.convert("L")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        if over.getchannel("A").getextrema() != (255, 255):
            steps.append("transparent parts on white")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
    return image.convert("RGB")


def _centre(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the largest centred crop with the aspect ratio of ``target``: left, top, width, height."""
    scale = min(size[0] / target[0], size[1] / target[1])
    width, height = (max(1, min(have, round(want * scale))) for have, want in zip(size, target, strict=True))
    return (size[0] - width) // 2, (size[1] - height) // 2, width, height
