"""The pixels of image files as timm's and torchvision's readers give them: ``Image.open(file).convert("RGB")``.

So transparency and colour profiles are left aside, nothing is turned as its EXIF says, and of several frames the first
counts. Images of more than 8 bits a channel are the exception: those readers cut their values at 255, which makes them
white (or, floats in [0, 1], black); here they are scaled.
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
    def __getitem__(self, row: int, /) -> IO[bytes]:
        """The opened file of an image."""

    @abstractmethod
    def filename(self, row: int, /) -> str:
        """Its name, for messages."""

    def picture(self, row: int) -> Image.Image:
        """The decoded image in mode RGB.

        Raises:
            UserError: it is none. Pillow, because torchvision's decoder crashes on some broken files.
        """
        try:
            with self[row] as file, Image.open(file) as opened:
                return eight_bits(opened).convert("RGB")
        except UserError:
            raise
        except Exception as error:  # Pillow raises almost any kind for a broken file
            problem = "no known format" if isinstance(error, UnidentifiedImageError) else one_line(error)
            where = self.filename(row)
            raise UserError(f"{where}: cannot be read as an image ({problem}); replace or remove it") from None

    def decoded(self, rows: Sequence[int] | np.ndarray, size: tuple[int, int] | None = None) -> Tensor:
        """Images as uint8 (N, 3, H, W).

        Args:
            size: the width and height that each must have; None: those of the first.

        Raises:
            UserError: one is broken or of another size.
        """
        wanted = size or self.picture(rows[0]).size
        pixels = np.empty((len(rows), wanted[1], wanted[0], 3), dtype=np.uint8)
        for place in np.argsort(rows):  # neighbours may be read together
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
