"""Uploaded files as images of the shape that a model reads."""

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
    """An image in hand, as the models read it."""

    image: Tensor
    """float32 (C, H, W) in [0, 1]."""
    said: str
    """What it is, where it comes from and what was done to it."""
    label: int | None = None
    """None where it is unknown."""


def read_upload(path: str | Path, shape: tuple[int, int, int]) -> Shown:
    """An image file as float32 (C, H, W): turned as its EXIF says, cropped at the centre, resized (bicubic).

    Transparent parts are put on white; of several frames the first is taken.

    Args:
        shape: (C, H, W) with one channel or three.

    Raises:
        UserError: no image, an empty file, one that is broken or too large, or a model of other channels.
    """
    path = Path(path)
    channels, height, width = shape
    if channels not in (1, 3):
        raise UserError(f"this model reads images of {channels} channels, which no image file has; take a test image")
    image, steps = _opened(path)
    left, top, side, tall = _centre(image.size, (width, height))
    if (side, tall) != image.size:
        image = image.crop((left, top, left + side, top + tall))
        steps.append(f"the centre {side} x {tall} cropped")
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        steps.append(f"resized to {width} x {height}")
    if image.mode != (wanted := "L" if channels == 1 else "RGB"):
        steps.append("made gray" if channels == 1 else "gray in all three channels")
        image = image.convert(wanted)
    pixels = np.array(image, dtype=np.float32).reshape(height, width, channels) / 255
    said = f"{path.name}: {', '.join(steps)}."
    return Shown(torch.from_numpy(pixels).permute(2, 0, 1).contiguous(), said)


def _opened(path: Path) -> tuple[Image.Image, list[str]]:
    """The decoded image, in gray or RGB, and what it was and what that took."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path.name} cannot be read ({error.strerror}); upload it again") from None
    if size == 0:
        raise UserError(f"{path.name} is empty; upload an image file, such as PNG or JPEG")
    if size > MOST_BYTES:
        raise UserError(f"{path.name} has more than {MOST_BYTES // 2**20} MiB; upload a smaller one")
    try:
        with Image.open(path) as opened:
            wide, tall = opened.size
            if wide * tall > MOST_PIXELS:
                raise Image.DecompressionBombError
            steps = [f"{wide} x {tall} {opened.mode}"]
            if getattr(opened, "n_frames", 1) > 1:
                steps.append("its first frame")
            image = ImageOps.exif_transpose(eight_bits(opened))
            if opened.getexif().get(0x0112, 1) not in (0, 1):
                steps.append("turned as its EXIF says")
            image = _plain(image, steps)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(
            f"{path.name} has more than {MOST_PIXELS // 10**6} million pixels; upload a smaller one"
        ) from None
    except Exception as error:  # Pillow raises almost any kind for what is no image or a broken one
        raise UserError(
            f"{path.name} is not an image that can be read ({one_line(error)}); upload one, such as PNG or JPEG"
        ) from None
    return image, steps


def _plain(image: Image.Image, steps: list[str]) -> Image.Image:
    """In mode L or RGB."""
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


def _centre(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """The largest central part of these proportions: left, top, width, height."""
    scale = min(size[0] / wanted[0], size[1] / wanted[1])
    width, height = (max(1, min(have, round(want * scale))) for have, want in zip(size, wanted, strict=True))
    return (size[0] - width) // 2, (size[1] - height) // 2, width, height
