"""JPEG-Linf: adversarial rounding of JPEG coefficients (Kang et al., arXiv:1908.08016; github.com/ddkang/advex-uar,
``jpeg.py``, ``jpeg_attack.py``; quantisation tables from ITU-T T.81, annex K).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rome.attacks.transforms.base import SignAscent, Transform
from rome.core.component import Number

BLOCK = 8
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
"""Quantisation tables of luma and chroma at quality 50."""
TO_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136, -0.714136), (1.0, 1.772, 0.0))


class JPEG(SignAscent):
    """Adversarial JPEG, by search over an offset for every quantised coefficient.

    The image is converted to YCbCr, its chroma is subsampled by means (4:2:0), and the cosine transforms of 8 x 8
    blocks are divided by the quantisation tables of quality 50. Instead of rounding, v/2 is added, with variables v in
    [-bound, bound], so that a coefficient moves by at most half the bound; then everything is inverted. Bound 0 still
    halves the resolution of colour.

    Images are padded to whole blocks of 16 (gray: 8) pixels by repeating their right and lower edge.
    """

    kind = "jpeg"
    channels = (1, 3)
    bound: Number = Field(default=0.125, ge=0)
    """Largest value of a variable, in quantisation steps."""

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        return (sum(math.prod(plane) for plane in planes(image)),)

    def prepare(self, x: Tensor, noise: Tensor) -> Transform:
        transform = _JPEG(x, noise, self.bound)
        if self.form == "published":  # that code multiplies by the bound once more before the first gradient
            transform.first = self.bound * transform.start
        return transform


def planes(image: torch.Size) -> list[tuple[int, int]]:
    """Height and width of the padded luma plane and, for colour images (C, H, W), of both chroma planes."""
    unit = BLOCK if image[0] == 1 else 2 * BLOCK
    height, width = (-(-side // unit) * unit for side in image[1:])
    return [(height, width)] + [(height // 2, width // 2)] * (image[0] - 1)


class _JPEG(Transform):
    """Every step is linear, so the image is coded and decoded only once; the loop decodes just the offsets."""

    def __init__(self, x: Tensor, noise: Tensor, bound: float) -> None:
        super().__init__(bound * (2 * noise - 1))
        self.low, self.high = -bound, bound
        self.size, self.planes = x.shape[2:], planes(x.shape[1:])
        self.cosines, self.to_rgb = cosines().to(x), x.new_tensor(TO_RGB)
        self.steps = [x.new_tensor(table) / 255 for table in (LUMA, CHROMA, CHROMA)][: len(self.planes)]
        self.base = x if len(self.planes) == 1 else self.subsampled(x)

    def subsampled(self, x: Tensor) -> Tensor:
        height, width = self.planes[0]
        padded = F.pad(x, (0, width - x.shape[3], 0, height - x.shape[2]), mode="replicate")
        ycbcr = _coloured(padded, x.new_tensor(TO_YCBCR))
        return self.joined([ycbcr[:, :1], *torch.split(F.avg_pool2d(ycbcr[:, 1:], 2), 1, dim=1)])

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Join planes (B, 1, h, w), chroma at half the size, to RGB or gray (B, C, H, W) without the padding."""
        luma, *chroma = parts
        if chroma:
            chroma = [F.interpolate(part, scale_factor=2.0, mode="nearest") for part in chroma]
            luma = _coloured(torch.cat((luma, *chroma), dim=1), self.to_rgb)
        return luma[:, :, : self.size[0], : self.size[1]]

    def images(self, variables: Tensor) -> Tensor:
        sizes = [height * width for height, width in self.planes]
        parts = zip(torch.split(variables, sizes, dim=1), self.planes, self.steps, strict=True)
        return (self.base + self.joined([self.decoded(v, plane, step) for v, plane, step in parts])).clamp(0, 1)

    def decoded(self, variables: Tensor, plane: tuple[int, int], step: Tensor) -> Tensor:
        """Decode v/2 quantisation steps in every coefficient to pixels: (B, h w) -> (B, 1, h, w)."""
        blocks = variables.view(-1, plane[0] // BLOCK, plane[1] // BLOCK, BLOCK, BLOCK) * (step / 2)
        pixels = (blocks.mT @ self.cosines).mT @ self.cosines  # (B, rows, columns, 8, 8)
        return pixels.transpose(2, 3).reshape(-1, 1, *plane)


def _coloured(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("dc,bchw->bdhw", matrix, x)


def cosines() -> Tensor:
    """Matrix of the orthonormal DCT-II of 8 numbers: float64 (frequency, position)."""
    u, x = torch.arange(BLOCK, dtype=torch.float64)[:, None], torch.arange(BLOCK, dtype=torch.float64)
    matrix = torch.cos((2 * x + 1) * u * math.pi / (2 * BLOCK)) / 2
    matrix[0] /= math.sqrt(2)
    return matrix
