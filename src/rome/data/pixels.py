"""The pixels of image files as timm's and torchvision's readers give them: ``Image.open(file).convert("RGB")``.

So transparency and colour profiles are left aside, nothing is turned as its EXIF says, and of several frames the first
counts. Images of more than 8 bits a channel are the exception: those readers cut their values at 255, which makes them
white (or, floats in [0, 1], black); here they are scaled.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262


def read_rgb(file: IO[bytes] | Path) -> Image.Image:
    """The decoded image in mode RGB.

    Raises:
        ValueError: its range of values is unknown.
        Exception: almost any kind, from Pillow, where the file is broken or no image.
    """
    with Image.open(file) as opened:
        return eight_bits(opened).convert("RGB")


def eight_bits(opened: Image.Image) -> Image.Image:
    """An opened image with at most 8 bits a channel: itself, or one in mode L whose 255 is the file's white.

    White is 65535 in gray PNG and PGM files of more than 8 bits, the largest number in unsigned TIFF files of 12 or 16,
    and 1 where values are floats. Pillow reduces colours of 16 bits to 8 by itself.

    Raises:
        ValueError: integers of which no format says what is white, floats outside [0, 1], or a program (EPS).
    """
    if opened.format == "EPS":
        raise ValueError("PostScript is a program and is not run")
    if opened.mode[0] not in "IF":
        return opened
    tags = getattr(opened, "tag_v2", {})
    values = np.asarray(opened).astype(np.float64)
    if opened.mode == "F":
        white = 1
        if not (values.min() >= 0 and values.max() <= 1):  # NaN is neither
            raise ValueError(
                f"floats from {values.min():g} to {values.max():g}; black must be 0 and white 1, or save it in 8 bits"
            )
    elif opened.mode == "I" and opened.format not in ("PNG", "PPM"):
        raise ValueError(
            "integers of 32 bits or with a sign, whose white is unknown; save it in 8 bits, or 16 unsigned"
        )
    else:
        white = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    if tags.get(TIFF_PHOTOMETRIC) == 0:  # 0 is white, which Pillow heeds up to 8 bits only
        values = white - values
    image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if "exif" in opened.info:
        image.info["exif"] = opened.info["exif"]
    return image
