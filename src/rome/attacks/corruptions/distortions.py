"""The 15 common corruptions of Hendrycks and Dietterich (ICLR 2019), each as a function of one image.

``f(image, c, rng)`` takes an image uint8 (H, W, C) with C = 1 or 3 and the constants c of a severity
(``severities.json``); it returns float (H, W, C) on the scale 0..255, which the caller clips and truncates to whole
numbers. Definitions follow github.com/hendrycks/robustness (``make_cifar_c.py``, ``make_imagenet_c.py``), without
OpenCV, scikit-image and ImageMagick: their filters, borders and angles are stated where they matter.

Only frost differs from the original, which adds crops of photographs that cannot be shipped; here a texture with their
colours, contrasts and spectrum is generated instead.
"""

from __future__ import annotations

from io import BytesIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from rome.attacks.transforms.plasma import diamond_square, to_unit

Array = NDArray[np.float64]
Bytes = NDArray[np.uint8]
Rng = np.random.Generator


def gaussian_noise(image: Bytes, c: float, rng: Rng) -> Array:
    return 255 * (image / 255 + rng.normal(scale=c, size=image.shape))


def shot_noise(image: Bytes, c: float, rng: Rng) -> Array:
    """Poisson counts, with c photons for white."""
    return 255 * rng.poisson(image / 255 * c) / c


def impulse_noise(image: Bytes, c: float, rng: Rng) -> Array:
    """A share c of the values, in each channel independently, becomes 0 or 255."""
    hit = rng.random(image.shape) <= c
    return np.where(hit, 255.0 * (rng.random(image.shape) <= 0.5), image)


def defocus_blur(image: Bytes, c: tuple[float, float], rng: Rng) -> Array:
    """Convolution with a disk of radius c0 whose edge is smoothed by a Gaussian of sigma c1."""
    from scipy import ndimage

    radius, sigma = c
    reach = max(8, int(radius))
    t = np.arange(-reach, reach + 1)
    disk = (t[:, None] ** 2 + t**2 <= radius**2).astype(float)
    disk /= disk.sum()
    taps = np.arange(-1, 2) if radius <= 8 else np.arange(-2, 3)
    soft = np.exp(-0.5 * (taps / sigma) ** 2)
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, soft / soft.sum(), axis=axis, mode="mirror")
    return np.asarray(ndimage.correlate(image.astype(float), disk[:, :, None], mode="mirror"))


def glass_blur(image: Bytes, c: tuple[float, int, int], rng: Rng) -> Array:
    """Blur with sigma c0; c2 times, from the last pixel to the first, give each the colour of a random pixel at most c1
    away; blur again.

    The original is meant to swap the two pixels, but its assignment through views copies one over the other.
    """
    sigma, reach, times = c
    height, width, channels = image.shape
    blurred = _gaussian(image / 255, sigma).clip(0, 1)
    rows, columns = np.arange(height - reach, reach, -1), np.arange(width - reach, reach, -1)
    here = (rows[:, None] * width + columns).ravel()
    source = list(range(height * width))
    for _ in range(times):
        down, right = rng.integers(-reach, reach, size=(2, len(here)))
        for pixel, other in zip(here.tolist(), (here + down * width + right).tolist(), strict=True):
            source[pixel] = source[other]
    shuffled = (255 * blurred).astype(np.uint8).reshape(-1, channels)[source].reshape(image.shape)
    return 255 * _gaussian(shuffled / 255, sigma)


def motion_blur(image: Bytes, c: tuple[int, float], rng: Rng) -> Array:
    return _motion_blurred(image.astype(float), c, rng.uniform(-45, 45))


def zoom_blur(image: Bytes, c: tuple[float, float], rng: Rng) -> Array:
    """The mean of the image and its enlargements by 1, 1 + c1, 1 + 2 c1 .. up to c0."""
    factors = np.arange(1, *c)
    enlarged = [_zoomed(image.astype(float), factor) for factor in factors]
    return np.asarray((image + np.sum(enlarged, axis=0)) / (len(factors) + 1))


def snow(image: Bytes, c: tuple[float, float, float, float, int, float, float], rng: Rng) -> Array:
    """Gaussian flakes (mean c0, standard deviation c1), enlarged by c2, kept above c3 and stretched by a motion blur
    (c4, c5); this layer and its rotation by 180 degrees are added to the image, which is made paler by 1 - c6."""
    mean, deviation, zoom, threshold, radius, sigma, keep = c
    layer = _zoomed(rng.normal(mean, deviation, size=(*image.shape[:2], 1)), zoom)
    layer = np.floor(255 * np.where(layer < threshold, 0, layer).clip(0, 1))
    layer = _motion_blurred(layer, (radius, sigma), rng.uniform(-135, -45))
    weights = (0.299, 0.587, 0.114) if image.shape[2] == 3 else (1.0,)
    gray = (image * np.array(weights)).sum(axis=2, keepdims=True)
    pale = keep * image + (1 - keep) * np.maximum(image, 1.5 * gray + 127.5)
    return pale + layer + np.rot90(layer, 2)


FROSTS = (
    ((0.30, 0.58, 0.65), 0.06),
    ((0.79, 0.81, 0.84), 0.07),
    ((0.79, 0.81, 0.84), 0.07),
    ((0.54, 0.60, 0.65), 0.12),
    ((0.44, 0.48, 0.53), 0.13),
)
"""Mean colours of the five photographs used by the original, and contrasts (standard deviations) of their 224 x 224
crops; two of the photographs are nearly the same."""


def frost(image: Bytes, c: tuple[float, float, float], rng: Rng) -> Array:
    """c0 times the image plus c1 times a frost texture, scaled as a photograph resized by c2."""
    keep, weight, scale = c
    tone, contrast = FROSTS[rng.integers(len(FROSTS))]
    height, width, channels = image.shape
    colour = np.array(tone if channels == 3 else [np.mean(tone)])
    # resized to a fifth, 32 x 32 crops of the photographs have 0.65 times the contrast
    texture = (colour + contrast * scale**0.27 * frost_texture(height, width, rng)[:, :, None]).clip(0, 1)
    return keep * image + weight * 255 * texture


def frost_texture(height: int, width: int, rng: Rng) -> Array:
    """Texture of crossing needles with mean 0 and standard deviation 1: bright along the zeros of three random fields,
    each stretched fourfold along its own direction. Its power falls about as frequency^-1.5 (exponents of the
    photographs: -0.8 to -1.7)."""
    shape = (2 * height, 2 * width)  # fields from an FFT are periodic, so only a quarter is used
    down, right = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    nearest = np.full((height, width), np.inf)
    for angle in rng.uniform(0, np.pi, size=3):
        along, across = np.cos(angle) * right + np.sin(angle) * down, np.cos(angle) * down - np.sin(angle) * right
        frequency = np.hypot(4 * along, across)
        frequency[0, 0] = np.inf
        field = np.fft.irfft2(np.fft.rfft2(rng.normal(size=shape)) * frequency**-1.25, s=shape)
        nearest = np.minimum(nearest, np.abs(field[:height, :width]) / field.std())
    needles: Array = -np.sqrt(nearest)
    return (needles - needles.mean()) / max(needles.std(), 1e-12)


def fog(image: Bytes, c: tuple[float, float], rng: Rng) -> Array:
    """Add c0 times a plasma map in [0, 1], then rescale to the maximum of the image; the map's offsets are within
    +-w^2, w = 100 / c1^level."""
    amount, decay = c
    height, width, _ = image.shape
    offsets = []
    for level in range((max(height, width) - 1).bit_length()):
        wibble = 100 / decay**level
        draws = rng.uniform(-wibble, wibble, size=(3, 1, 2**level, 2**level))
        offsets += list(torch.from_numpy(wibble * draws))
    plasma = to_unit(diamond_square(offsets))[0, :height, :width, None].numpy()
    x, highest = image / 255, image.max() / 255
    return np.asarray(255 * (x + amount * plasma) * highest / (highest + amount))


def brightness(image: Bytes, c: float, rng: Rng) -> Array:
    """Add c to V in HSV, which scales all channels equally; black becomes gray."""
    value = image.max(axis=2, keepdims=True) / 255
    brighter = (value + c).clip(0, 1)
    return 255 * np.where(value > 0, image / 255 * brighter / np.where(value > 0, value, 1), brighter)


def contrast(image: Bytes, c: float, rng: Rng) -> Array:
    """Multiply the distance from each channel's mean by c."""
    x = image / 255
    mean = x.mean(axis=(0, 1), keepdims=True)
    return np.asarray(255 * ((x - mean) * c + mean))


def elastic_transform(image: Bytes, c: tuple[float, float, float], rng: Rng) -> Array:
    """A random affine map, then a random flow. Lengths are shares of the image's side: the flow is c0 times noise in
    [-1, 1] smoothed with sigma c1, and three corners of a square move by up to c2 in each direction."""
    height, width, _ = image.shape
    strength, sigma, jitter = (min(height, width) * value for value in c)
    middle, arm = np.array((width, height)) // 2, min(height, width) // 3
    corners = middle + arm * np.array(((1.0, 1.0), (1.0, -1.0), (-1.0, -1.0)))  # (x, y)
    moved = corners + rng.uniform(-jitter, jitter, size=corners.shape)
    back = np.linalg.solve(np.column_stack((moved, np.ones(3))), corners)  # (x, y, 1) -> source (x, y)
    y, x = np.mgrid[:height, :width].astype(float)
    right, down = np.moveaxis(np.stack((x, y, np.ones_like(x)), axis=2) @ back, 2, 0)
    mapped = _sampled(image / 255, down, right, "mirror")
    flow = [_gaussian(rng.uniform(-1, 1, size=(height, width)), sigma, "reflect", 3) * strength for _ in range(2)]
    return 255 * _sampled(mapped, y + flow[1], x + flow[0], "reflect")


def pixelate(image: Bytes, c: float, rng: Rng) -> Array:
    height, width, _ = image.shape
    small = _pil(image).resize((int(width * c), int(height * c)), Image.Resampling.BOX)
    return _array(small.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(image: Bytes, c: int, rng: Rng) -> Array:
    coded = BytesIO()
    _pil(image).save(coded, "JPEG", quality=c)
    return _array(Image.open(coded))


# -- helpers -----------------------------------------------------------------------------------------------------------


def _pil(image: Bytes) -> Image.Image:
    return Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)


def _array(image: Image.Image) -> Array:
    pixels = np.asarray(image, dtype=float)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _gaussian(image: Array, sigma: float, mode: str = "nearest", truncate: float = 4) -> Array:
    """Gaussian filter over rows and columns only, by default with scikit-image's border mode and truncation."""
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(image, sigma, axes=(0, 1), mode=mode, truncate=truncate))


def _sampled(image: Array, rows: Array, columns: Array, mode: str) -> Array:
    """Sample every channel bilinearly at the positions ``rows`` and ``columns`` (H, W)."""
    from scipy import ndimage

    planes = [ndimage.map_coordinates(plane, (rows, columns), order=1, mode=mode) for plane in np.moveaxis(image, 2, 0)]
    return np.stack(planes, axis=2)


def _zoomed(image: Array, factor: float) -> Array:
    """Enlarge the middle of the image to the size of the image, bilinearly."""
    from scipy import ndimage

    crop = [int(np.ceil(side / factor)) for side in image.shape[:2]]
    top, left = ((side - part) // 2 for side, part in zip(image.shape, crop, strict=False))
    large = ndimage.zoom(image[top : top + crop[0], left : left + crop[1]], (factor, factor, 1), order=1)
    top, left = ((part - side) // 2 for side, part in zip(image.shape[:2], large.shape, strict=False))
    return np.asarray(large[top : top + image.shape[0], left : left + image.shape[1]])


def _motion_blurred(image: Array, c: tuple[int, float], angle: float) -> Array:
    """ImageMagick's motion blur, in whole grey levels: a one-sided Gaussian of sigma c1 with 2 c0 + 1 taps, one pixel
    apart in the direction of the angle (degrees, 0 to the right, 90 down), with edge pixels repeated."""
    radius, sigma = c
    taps = np.arange(2 * radius + 1)
    kernel = np.exp(-0.5 * (taps / sigma) ** 2)
    turn = np.deg2rad(angle)
    right, down = (np.ceil(taps * part - 0.5).astype(int) for part in (np.cos(turn), np.sin(turn)))
    height, width, _ = image.shape
    total = np.zeros(image.shape)
    for weight, dx, dy in zip(kernel / kernel.sum(), right, down, strict=True):
        rows, columns = (np.arange(height) + dy).clip(0, height - 1), (np.arange(width) + dx).clip(0, width - 1)
        total += weight * image[rows[:, None], columns]
    return np.rint(total)
