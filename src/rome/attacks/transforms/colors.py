"""Differentiable conversion from sRGB to CIELUV and back.

CIE 1976 L*u*v* (CIE 15:2004) over linear sRGB (IEC 61966-2-1), scaled as in Laidlaw and Feizi (NeurIPS 2019): L/100,
(u + 100)/200, (v + 100)/200, with white at u' = .1978, v' = .4683. Most colours are then in the unit cube, but
saturated ones are not: red has u = 175. The conversion back uses the exact inverse of the matrix, where the published
code rounds it to four digits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
_TO_RGB = torch.linalg.inv(torch.tensor(_TO_XYZ, dtype=torch.float64)).tolist()
_WHITE_U, _WHITE_V = 0.1978, 0.4683
_KAPPA = (29 / 3) ** 3
"""Slope of L over Y near black; the two pieces of L(Y) meet at L = 8."""
_TINY = 1e-10


def rgb_to_luv(rgb: Tensor) -> Tensor:
    """Convert sRGB in [0, 1] to scaled CIELUV: (..., 3) -> (..., 3)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)
    x, y, z = _product(_TO_XYZ, linear)
    total = (x + 15 * y + 3 * z).clamp(min=_TINY)
    cubic = 116 * y.clamp(min=8 / _KAPPA) ** (1 / 3) - 16
    lightness = torch.where(y <= 8 / _KAPPA, _KAPPA * y, cubic)
    u = 13 * lightness * (4 * x / total - _WHITE_U)
    v = 13 * lightness * (9 * y / total - _WHITE_V)
    return torch.stack([lightness / 100, (u + 100) / 200, (v + 100) / 200], dim=-1)


def luv_to_rgb(luv: Tensor) -> Tensor:
    """Convert scaled CIELUV to sRGB in [0, 1], clipping each channel of colours outside sRGB: (..., 3) -> (..., 3).

    With p = u + 13 L u'_white and q = v + 13 L v'_white: X = 9 Y p / (4 q), Z = Y (156 L - 3 p - 20 q) / (4 q), so that
    q is the only divisor that can vanish.
    """
    lightness, u, v = luv.unbind(-1)
    lightness, u, v = 100 * lightness, 200 * u - 100, 200 * v - 100
    p, q = u + 13 * lightness * _WHITE_U, v + 13 * lightness * _WHITE_V
    y = torch.where(lightness <= 8, lightness / _KAPPA, ((lightness + 16) / 116) ** 3)
    ratio = y / (4 * torch.where(q.abs() < _TINY, _TINY, q))
    xyz = torch.stack([9 * p * ratio, y, (156 * lightness - 3 * p - 20 * q) * ratio], dim=-1).clamp(0, 1.1)
    linear = torch.stack(_product(_TO_RGB, xyz), dim=-1)
    curved = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    return torch.where(linear <= 0.0031308, 12.92 * linear, curved).clamp(0, 1)


def _product(rows: Sequence[Sequence[float]], colours: Tensor) -> list[Tensor]:
    """Matrix times colours (..., 3), one tensor (...) for each row; written out so that autocast does not round it."""
    one, two, three = colours.unbind(-1)
    return [a * one + b * two + c * three for a, b, c in rows]
