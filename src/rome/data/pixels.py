"""The pixels of image files as in timm's and torchvision's readers: ``Image.open(file).convert("RGB")``.

Transparency, colour profiles and the EXIF orientation are therefore ignored, and only the first frame is read. Images
with more than 8 bits per channel are the exception: those readers clip their values at 255, which makes the images
white (or black, for floats in [0, 1]); here the values are scaled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import IO

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from rome.core.errors import UserError
from rome.data.base import one_line

TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262


class Images(ABC):
    """Encoded images by number."""

    @abstractmethod
    def filename(self, row: int, /) -> str:
        """Return the file of an image, or, if it has no file of its own, its name for messages."""

    def __getitem__(self, row: int, /) -> IO[bytes]:
        """Return the opened file of an image."""
        return open(self.filename(row), "rb")

    def picture(self, row: int) -> Image.Image:
        """Return an image decoded in mode RGB, by Pillow because torchvision's decoder crashes on some broken files.

        Raises:
            UserError: the file is not a readable image.
        """
        try:
            with self[row] as file, Image.open(file) as opened:
                return eight_bits(opened).convert("RGB")
        except UserError:
            raise
        except Exception as error:  # Pillow raises almost any exception for a broken file
            problem = "no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
            where = self.filename(row)
            raise UserError(f"{where}: cannot be read as an image ({problem}); replace or remove it") from None

    def decoded(self, rows: Sequence[int] | np.ndarray, size: tuple[int, int] | None = None) -> Tensor:
        """Return decoded images as uint8 (N, 3, H, W).

        Args:
            size: the width and height that every image must have; None: those of the first image.

        Raises:
            UserError: an image is broken or has another size.
        """
        wanted = size or self.picture(rows[0]).size
        pixels = np.empty((len(rows), wanted[1], wanted[0], 3), dtype=np.uint8)
        for place in np.argsort(rows):  # in this order because neighbours may be read together
            row = rows[place]
            image = self.picture(row)
            if image.size != wanted:
                raise UserError(
                    f"{self.filename(row)} is an image of {image.width}x{image.height} pixels, not "
                    f"{wanted[0]}x{wanted[1]}: is this another data set? For images of several sizes set "
                    "data.kind=parquet and data.size=PIXELS (--img-size PIXELS)"
                )
            pixels[place] = np.asarray(image)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def eight_bits(opened: Image.Image) -> Image.Image:
    """Return an opened image with at most 8 bits per channel: the image itself, or one in mode L scaled to white = 255.

    White is 65535 in gray PNG and PGM files of more than 8 bits, the largest value in unsigned TIFF files of 12 or 16
    bits, and 1 for floats. Pillow itself reduces 16-bit colours to 8 bits.

    Raises:
        ValueError: integers in a format that does not define white, floats outside [0, 1], or a program (EPS).
    """
    if opened.format == "EPS":
        raise ValueError("PostScript is a program and is not run")
    if opened.mode[0] not in "IF":
        return opened
    tags = getattr(opened, "tag_v2", {})
    values = np.asarray(opened).astype(np.float64)
    if opened.mode == "F":
        white = 1
        if not (values.min() >= 0 and values.max() <= 1):  # also true for NaN
            raise ValueError(
                f"floats from {values.min():g} to {values.max():g}; black must be 0 and white 1, or save it with 8 bits"
            )
    elif opened.mode == "I" and opened.format not in ("PNG", "PPM"):
        raise ValueError(
            "32-bit or signed integers, whose white is unknown; save it with 8 bits, or with 16 unsigned bits"
        )
    else:
        white = 2 ** tags.get(TIFF_BITS, (16,))[0] - 1
    if tags.get(TIFF_PHOTOMETRIC) == 0:  # 0 is white, which Pillow respects only up to 8 bits
        values = white - values
    image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if "exif" in opened.info:
        image.info["exif"] = opened.info["exif"]
    return image
