"""Gabor: adversarial procedural noise (Kang et al., arXiv:1908.08016; github.com/ddkang/advex-uar, ``gabor.py``,
``gabor_attack.py``; the noise is Co et al.'s, github.com/kenny-co/procedural-advml).

After each step that code multiplies by the mask of the *zeros*, so that from the first step on the sparse points vanish
and the other 13 of 14 pixels move; ``form: published`` reproduces this, with steps of bound / sqrt(steps).
"""

from __future__ import annotations

import math

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.transforms.base import SignAscent, Transform
from rome.core.component import Number

DENSITY = 1 / 14
RADIUS = 11
"""Radius of the kernels, which are 23 x 23."""
DRAWS = 4
"""Number of random numbers for an image's kernel: number of angles, sigma, frequency, first angle."""


class Gabor(SignAscent):
    """Adversarial Gabor noise, by search over a sparse map that is convolved with a random Gabor kernel.

    x' = x + bound/255 noise(v), where noise in [0, 1] is the same in all channels. Variables v: a map (H, W) in [-1, 1]
    that is zero except at one in 14 pixels, which are drawn once.
    """

    kind = "gabor"
    bound: Number = Field(default=60, ge=0)
    """Largest value of the noise, in grey levels of 255."""

    def default_step(self) -> float:
        """5 / steps; bound / sqrt(steps) would jump between the ends of the range and so weaken the attack."""
        return super().default_step() if self.form == "published" else 5 / max(self.steps, 1)

    def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
        return (DRAWS + 2 * math.prod(image[1:]),)

    def prepare(self, x: Tensor, noise: Tensor) -> Transform:
        return _Gabor(x, noise, self.bound / 255, complement=self.form == "published")


class _Gabor(Transform):
    low = -1.0

    def __init__(self, x: Tensor, noise: Tensor, bound: float, *, complement: bool) -> None:
        height, width = x.shape[2:]
        draws, values, ranks = torch.split(noise, [DRAWS, height * width, height * width], dim=1)
        points = max(round(DENSITY * height * width), 1)
        sparse = torch.zeros_like(values, dtype=torch.bool).scatter(1, ranks.topk(points, dim=1).indices, True)
        super().__init__(((2 * values - 1) * sparse).view(-1, height, width))
        self.x, self.bound = x, bound
        # the start is sparse in both forms; the first step of the published form leaves the sparse points
        self.support = (~sparse if complement else sparse).view_as(self.start)
        # convolution by FFT, with enough padding to cut off what wraps around: faster than a direct 23 x 23 convolution
        self.padded = [-(-(side + RADIUS) // 16) * 16 for side in (height, width)]
        self.spectrum = torch.fft.rfft2(gabor_kernels(draws), s=self.padded)

    def images(self, variables: Tensor) -> Tensor:
        return (self.x + self.bound * flattened(self.convolved(variables))[:, None]).clamp(0, 1)

    def convolved(self, variables: Tensor) -> Tensor:
        """Convolve each map (B, H, W) with its kernel, with zero padding; the kernels are point-symmetric."""
        height, width = variables.shape[1:]
        product = torch.fft.rfft2(variables, s=self.padded) * self.spectrum
        whole = torch.fft.irfft2(product, s=self.padded)
        return whole[:, RADIUS : RADIUS + height, RADIUS : RADIUS + width]

    def project(self, variables: Tensor) -> Tensor:
        return super().project(variables) * self.support


def gabor_kernels(draws: Tensor) -> Tensor:
    """Draw Gabor kernels from U[0, 1): (B, 4) -> (B, 23, 23).

    g(x, y) = sum_j exp(-(x^2 + y^2) / (2 (sigma + 0.001)^2)) cos(2 pi f (x cos a_j + y sin a_j)) with x, y in
    [-1/2, 1/2] and n angles a_j = a + pi j / n; n uniform in 1..10, sigma in [0.1, 0.4], f in [3, 5.75], a in [0, pi].
    """
    sides, sigma, frequency, angle = (draw.view(-1, 1, 1, 1) for draw in draws.unbind(1))
    sides = 1 + (10 * sides).floor()
    sigma, frequency, angle = 0.1 + 0.3 * sigma, 3 + 2.75 * frequency, math.pi * angle
    j = torch.arange(10, dtype=draws.dtype, device=draws.device).view(1, -1, 1, 1)
    axis = torch.linspace(-0.5, 0.5, 2 * RADIUS + 1, dtype=draws.dtype, device=draws.device)
    x, y = axis, axis[:, None]
    angles = angle + math.pi * j / sides
    waves = torch.cos(2 * math.pi * frequency * (x * angles.cos() + y * angles.sin()))
    envelope = torch.exp(-0.5 * (x**2 + y**2) / (sigma + 1e-3) ** 2)
    return (envelope * waves * (j < sides)).sum(dim=1)


def flattened(maps: Tensor) -> Tensor:
    """Normalise the spectral variance, then scale each map (B, H, W) to [0, 1]; gain and range are not differentiated.

    The normalised map is m + (z - m) (1 + c) / (c + d / max d) with c = 0.001 and the mean m. The original computes d
    as the root of the inverse Fourier transform of the Fourier transform of (z - m)^2, which is just |z - m|: almost
    all pixels end up near the two extremes.
    """
    dims = (1, 2)
    with torch.no_grad():
        mean = maps.mean(dim=dims, keepdim=True)
        away = (maps - mean).abs()
        tiny = torch.finfo(maps.dtype).tiny
        gain = 1.001 / (0.001 + away / away.amax(dim=dims, keepdim=True).clamp(min=tiny))
    even = mean + (maps - mean) * gain
    with torch.no_grad():
        low, high = even.amin(dim=dims, keepdim=True), even.amax(dim=dims, keepdim=True)
    return (even - low) / (high - low).clamp(min=tiny)
