"""Common corruptions: published constants and definitions, repeatability, CIFAR-10-C's files, a place in evaluation."""

from __future__ import annotations

import colorsys
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ValidationError
from scipy import ndimage
from scipy.signal import fftconvolve
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

import rome
from helpers.problems import case
from rome.attacks import Attack, Corruption
from rome.attacks.corruptions import distortions
from rome.attacks.corruptions.severities import CORRUPTIONS, SEVERITIES, constants_for, corrupt, read_cifar10c
from rome.attacks.suites.base import Case, Suite
from rome.attacks.suites.unseen import CorruptionsSuite
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.report.columns import show
from rome.threats import AnyImage, LpBall, Threat

Rng = np.random.Generator
ANY = AnyImage(label="corruption")


def tiles(n: int, side: int, stride: int) -> Tensor:
    """Tiles of two photographs, every ``stride``-th pixel of them: float32 (n, 3, side, side)."""
    photographs = [torch.from_numpy(photograph.copy()) for photograph in load_sample_images().images]
    small = [photograph[::stride, ::stride].permute(2, 0, 1).float() / 255 for photograph in photographs]
    cut = [part.unfold(1, side, side).unfold(2, side, side).flatten(1, 2) for part in small]
    found = torch.cat(cut, dim=1).transpose(0, 1)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))[:n]].contiguous()


@pytest.fixture(scope="module")
def small() -> Tensor:
    return tiles(40, 32, 3)


def seeds(x: Tensor, seed: int = 0) -> Tensor:
    return stream(seed, "test").by_image(x, (4,))


def image_of(side: int = 32, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, size=(side, side, 3), dtype=np.uint8)


# -- constants ---------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, tuple[list[Any], list[Any]]] = {
    # make_cifar_c.py, make_imagenet_c.py
    "gaussian_noise": ([0.04, 0.06, 0.08, 0.09, 0.10], [0.08, 0.12, 0.18, 0.26, 0.38]),
    "shot_noise": ([500, 250, 100, 75, 50], [60, 25, 12, 5, 3]),
    "impulse_noise": ([0.01, 0.02, 0.03, 0.05, 0.07], [0.03, 0.06, 0.09, 0.17, 0.27]),
    "defocus_blur": (
        [(0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)],
        [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)],
    ),
    "glass_blur": (
        [(0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)],
        [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)],
    ),
    "motion_blur": (
        [(6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)],
        [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)],
    ),
    "zoom_blur": (
        [np.arange(1, stop, 0.01) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)],
        [np.arange(1, *c) for c in ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))],
    ),
    "snow": (
        [
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ],
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
    ),
    "frost": (
        [(1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)],
        [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)],
    ),
    "fog": (
        [(0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)],
        [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)],
    ),
    "brightness": ([0.05, 0.1, 0.15, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4, 0.5]),
    "contrast": ([0.75, 0.5, 0.4, 0.3, 0.15], [0.4, 0.3, 0.2, 0.1, 0.05]),
    "elastic_transform": (  # in pixels
        [
            (32 * 0, 32 * 0, 32 * 0.08),
            (32 * 0.05, 32 * 0.2, 32 * 0.07),
            (32 * 0.08, 32 * 0.06, 32 * 0.06),
            (32 * 0.1, 32 * 0.04, 32 * 0.05),
            (32 * 0.1, 32 * 0.03, 32 * 0.03),
        ],
        [
            (244 * 2, 244 * 0.7, 244 * 0.1),
            (244 * 2, 244 * 0.08, 244 * 0.2),
            (244 * 0.05, 244 * 0.01, 244 * 0.02),
            (244 * 0.07, 244 * 0.01, 244 * 0.02),
            (244 * 0.12, 244 * 0.01, 244 * 0.02),
        ],
    ),
    "pixelate": ([0.95, 0.9, 0.85, 0.75, 0.65], [0.6, 0.5, 0.4, 0.3, 0.25]),
    "jpeg_compression": ([80, 65, 58, 50, 40], [25, 18, 15, 10, 7]),
}


def test_severities_are_the_published_constants() -> None:
    for name in CORRUPTIONS:
        for which, side, column in [("cifar10-c", 32, 0), ("imagenet-c", 224, 1)]:
            with case(name, which, side, column):
                ours, published = SEVERITIES[name][which], PUBLISHED[name][column]
                assert len(ours) == len(published) == 5
                for own, theirs in zip(ours, published, strict=True):
                    if name == "zoom_blur":
                        own = np.arange(1, *own)
                    elif name == "frost":
                        own, size = own[:2], own[2]
                        assert size == (0.2 if column == 0 else 1)
                    elif name == "elastic_transform":
                        own = [side * value for value in own]
                    assert np.array_equal(own, theirs) or np.allclose(own, theirs, rtol=1e-12)


def test_there_are_fifteen_and_the_size_says_whose_constants() -> None:
    assert len(CORRUPTIONS) == 15
    assert set(SEVERITIES) == set(CORRUPTIONS) == set(PUBLISHED)
    assert (constants_for(32), constants_for(8), constants_for(33), constants_for(224)) == (
        *("cifar10-c",) * 2,
        *("imagenet-c",) * 2,
    )
    x = torch.full((1, 3, 40, 40), 0.5)
    spread = [float(corrupt(x, "gaussian_noise", 1, seeds(x), which).std()) for which in (None, "cifar10-c")]
    assert spread == pytest.approx([0.08, 0.04], rel=0.05)


# -- all of them -------------------------------------------------------------------------------------------------------

NOT_BY_PIXELS = {
    "glass_blur": "severities 1 to 3 differ in a blur too small to see in a mean",
    "motion_blur": "3 and 4 differ in the number of taps alone",
    "frost": "the image's weight falls as the frost's rises",
    "elastic_transform": "the affine part falls as the flow rises",
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_mean_change_rises_with_severity(name: Any, small: Tensor) -> None:
    change = [float((corrupt(small, name, s, seeds(small)) - small).abs().mean()) for s in range(1, 6)]
    if name not in NOT_BY_PIXELS:
        assert change == sorted(change)
        assert len(set(change)) == 5
    elif name != "elastic_transform":
        assert change[4] > 1.2 * change[0]
    assert change[0] > 0.5 / 255


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_sizes_and_channels(name: Any) -> None:
    for shape in [(3, 32, 32), (3, 224, 224), (1, 8, 8), (3, 24, 36), (1, 40, 33)]:
        with case(shape):
            x = torch.randint(256, (1, *shape), generator=torch.Generator().manual_seed(0)) / 255
            for severity in (1, 5) if shape[1] < 100 else (3,):
                found = corrupt(x, name, severity, seeds(x))
                assert (found.shape, found.dtype) == (x.shape, x.dtype)
                levels = 255 * found
                assert torch.allclose(levels, levels.round(), atol=1e-4)
                assert bool(((found >= 0) & (found <= 1)).all())
            double = corrupt(x.double(), name, 3, seeds(x))
            assert double.dtype == torch.float64
            assert torch.allclose(double.float(), corrupt(x, name, 3, seeds(x)), atol=1e-6)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_an_image_is_corrupted_alike_wherever_it_stands(name: Any, small: Tensor) -> None:
    x = small[:6]
    numpy, before = np.random.get_state()[1].copy(), torch.get_rng_state()
    whole = corrupt(x, name, 4, seeds(x))
    order = torch.tensor([4, 0, 5])
    assert torch.equal(corrupt(x[order], name, 4, seeds(x[order])), whole[order])
    assert np.array_equal(np.random.get_state()[1], numpy)
    assert torch.equal(torch.get_rng_state(), before)
    draws = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert torch.equal(corrupt(x, name, 4, seeds(x, seed=1)), whole) is not draws


def test_types_and_severities_draw_different_numbers() -> None:
    x = torch.full((1, 3, 32, 32), 0.5)
    noise = [(corrupt(x, "gaussian_noise", s, seeds(x)) - x)[0].flatten() for s in (1, 2)]
    assert abs(float(torch.corrcoef(torch.stack(noise))[0, 1])) < 0.1


@pytest.mark.parametrize("shape", [(2, 32, 32), (3, 7, 32)])
def test_other_images_are_refused(shape: tuple[int, int, int]) -> None:
    x = torch.rand(1, *shape)
    with pytest.raises(UserError, match=r"fog needs gray or RGB images of 8 pixels or more, not \("):
        corrupt(x, "fog", 1, torch.zeros(1, 4))


# -- one by one --------------------------------------------------------------------------------------------------------


def test_noises_have_their_distributions() -> None:
    gray, rng = np.full((200, 200, 3), 100, dtype=np.uint8), np.random.default_rng(0)
    normal = distortions.gaussian_noise(gray, 0.08, rng) - 100
    assert (normal.mean(), normal.std()) == (pytest.approx(0, abs=0.3), pytest.approx(255 * 0.08, rel=0.02))
    shot = distortions.shot_noise(gray, 60, rng)
    assert shot.mean() == pytest.approx(100, rel=0.02)
    assert shot.var() == pytest.approx(100 * 255 / 60, rel=0.03)  # of n/c 255 with n Poisson of mean 100/255 c
    impulse = distortions.impulse_noise(gray, 0.27, rng)
    shares = [(impulse == level).mean() for level in (0, 255, 100)]
    assert shares == pytest.approx([0.135, 0.135, 0.73], abs=0.01)


def test_defocus_is_a_mean_over_a_disk() -> None:
    image = image_of(40)
    inside = [(r, c) for r in range(-3, 4) for c in range(-3, 4) if r * r + c * c <= 9]
    shifted = np.pad(image.astype(float), ((3, 3), (3, 3), (0, 0)), mode="reflect")
    literal = np.mean([shifted[3 + r : 43 + r, 3 + c : 43 + c] for r, c in inside], axis=0)
    assert np.allclose(distortions.defocus_blur(image, (3, 1e-3), np.random.default_rng(0)), literal)
    point = np.zeros((41, 41, 1), dtype=np.uint8)
    point[20, 20] = 255
    t = np.arange(-8, 9)
    disk = np.pad((t[:, None] ** 2 + t**2 <= 64) / 197, 1, mode="reflect")  # touches the border of its 17 x 17
    gauss = np.exp(-0.5 * (np.arange(-1, 2) / 0.5) ** 2)
    kernel = fftconvolve(disk, np.outer(gauss, gauss) / gauss.sum() ** 2, mode="valid")
    soft = distortions.defocus_blur(point, (8, 0.5), np.random.default_rng(0))[12:29, 12:29, 0]
    assert np.allclose(soft / 255, kernel)
    flat = np.full((32, 32, 3), 77, dtype=np.uint8)
    for c in (*SEVERITIES["defocus_blur"]["cifar10-c"], *SEVERITIES["defocus_blur"]["imagenet-c"]):
        assert np.allclose(distortions.defocus_blur(flat, c, np.random.default_rng(0)), 77, rtol=0.015)


class Replay:
    """A generator whose integers are told beforehand."""

    def __init__(self, draws: NDArray[np.int64]) -> None:
        self.draws = draws

    def integers(self, low: int, high: int, size: tuple[int, int]) -> NDArray[np.int64]:
        return self.draws[:, : size[1]]


@pytest.mark.parametrize("reach", [1, 2])
def test_glass_copies_as_the_published_assignment_does(reach: int) -> None:
    """The published loop, whose swap of two views leaves the second pixel as it is."""
    image, rng = image_of(16), np.random.default_rng(0)
    draws = rng.integers(-reach, reach, size=(2, 16 * 16))
    x = image.copy()
    number = 0
    for h in range(16 - reach, reach, -1):
        for w in range(16 - reach, reach, -1):
            dy, dx = draws[:, number]
            x[h, w], x[h + dy, w + dx] = x[h + dy, w + dx], x[h, w]
            number += 1
    found = distortions.glass_blur(image, (1e-9, reach, 1), Replay(draws))  # type: ignore[arg-type]
    assert np.array_equal(np.rint(found), x)
    assert (x != image).any(axis=2).mean() > 0.4


@pytest.mark.parametrize(("angle", "step"), [(0.0, (0, 1)), (90.0, (1, 0)), (-90.0, (-1, 0)), (45.0, (1, 1))])
def test_motion_is_a_half_gaussian_to_one_side(angle: float, step: tuple[int, int]) -> None:
    """A point leaves a trail of 2 radius + 1 taps, against the direction the taps are read in."""
    image = np.zeros((41, 41, 1))
    image[20, 20] = 10_000
    found = distortions._motion_blurred(image, (6, 2.0), angle)[:, :, 0]
    taps = np.ceil(np.arange(13) * (np.sqrt(0.5) if angle == 45 else 1) - 0.5).astype(int)
    kernel = np.exp(-0.5 * (np.arange(13) / 2.0) ** 2)
    literal = np.zeros((41, 41))
    for weight, t in zip(kernel / kernel.sum(), taps, strict=True):
        literal[20 - t * step[0], 20 - t * step[1]] += 10_000 * weight
    assert np.allclose(found, np.rint(literal))


def test_zoom_keeps_the_size_and_enlarges_the_middle() -> None:
    image = image_of(32).astype(float)
    assert np.array_equal(distortions._zoomed(image, 1.0), image)
    ramp = np.broadcast_to(np.arange(32.0)[:, None, None], (32, 32, 1))
    for factor in (1.06, 1.26, 2.25, 4.5):
        large = distortions._zoomed(ramp, factor)
        assert large.shape == ramp.shape
        slope = np.diff(large[:, 0, 0])
        assert np.allclose(slope, slope[0])
        assert slope[0] == pytest.approx(1 / factor, rel=0.15)
    c = (1.025, 0.01)
    literal = (2 * image + distortions._zoomed(image, 1.01) + distortions._zoomed(image, 1.02)) / 4
    assert np.allclose(distortions.zoom_blur(image.astype(np.uint8), c, np.random.default_rng(0)), literal)


def test_snow_brightens_and_pales() -> None:
    dark = np.zeros((64, 64, 3), dtype=np.uint8)
    dark[:, :, 0] = 40
    c = (0.1, 0.2, 1, 99, 8, 3, 0.8)  # no flake is above the threshold
    pale = distortions.snow(dark, c, np.random.default_rng(0))
    gray = 0.299 * 40
    expected = 0.8 * np.array([40, 0, 0]) + 0.2 * np.maximum([40, 0, 0], 1.5 * gray + 127.5)
    assert np.allclose(pale, expected)
    flakes = distortions.snow(dark, (0.1, 0.2, 1, 0.3, 8, 3, 0.8), np.random.default_rng(0)) - expected
    assert flakes.min() > -1e-9
    assert np.allclose(flakes, np.rot90(flakes, 2))
    assert 5 < flakes.mean() < 60


def test_frost_has_the_photographs_colours_and_contrast() -> None:
    black, rng = np.zeros((96, 96, 3), dtype=np.uint8), np.random.default_rng(0)
    textures = np.stack([distortions.frost(black, (1, 1, 1), rng) for _ in range(24)]) / 255
    tones = np.array([tone for tone, _ in distortions.FROSTS])
    means = textures.mean(axis=(1, 2))
    nearest = np.abs(means[:, None] - tones).sum(axis=2)
    assert nearest.min(axis=1).max() < 0.05
    assert len(set(nearest.argmin(axis=1))) >= 4
    assert np.all((textures.std(axis=(1, 2)) > 0.05) & (textures.std(axis=(1, 2)) < 0.14))
    image = image_of(32)
    seen = [distortions.frost(image, (keep, 0.45, 0.2), np.random.default_rng(1)) for keep in (0.75, 0)]
    assert np.allclose(seen[0] - seen[1], 0.75 * image)


def test_ice_falls_off_like_the_photographs() -> None:
    """Power against frequency between 1/100 and 1/3 a pixel: exponent between -0.8 and -1.7 in the photographs."""
    window = np.outer(np.hanning(224), np.hanning(224))
    frequency = np.hypot(np.fft.fftfreq(224)[:, None], np.fft.fftfreq(224))
    edges = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32]
    exponents = []
    for seed in range(6):
        power = np.abs(np.fft.fft2(window * distortions.frost_texture(224, 224, np.random.default_rng(seed)))) ** 2
        bands = [(frequency >= low) & (frequency < high) for low, high in itertools.pairwise(edges)]
        means = [power[band].mean() for band in bands]
        centres = np.sqrt(np.array(edges[:-1]) * np.array(edges[1:]))
        exponents.append(np.polyfit(np.log(centres), np.log(means), 1)[0])
    assert -1.9 < np.mean(exponents) < -0.8


def test_fog_is_a_plasma_map_brought_back_to_the_images_range() -> None:
    image = image_of(32) // 2
    found = distortions.fog(image, (1.5, 1.75), np.random.default_rng(0)) / 255
    highest = image.max() / 255
    plasma = (found * (highest + 1.5) / highest - image / 255) / 1.5
    assert np.allclose(plasma, plasma[:, :, :1])
    assert (plasma.min(), plasma.max()) == (pytest.approx(0, abs=1e-9), pytest.approx(1))
    smooth, rough = (
        np.abs(np.diff(distortions.fog(image * 0 + 255, (1, decay), np.random.default_rng(0)), axis=0)).mean()
        for decay in (3, 1.4)
    )
    assert rough > 2 * smooth


def test_brightness_is_value_in_hsv() -> None:
    image = image_of(8)
    image[0, 0] = 0
    found = distortions.brightness(image, 0.3, np.random.default_rng(0))
    for r, c in np.ndindex(8, 8):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[r, c] / 255))
        assert np.allclose(found[r, c], 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))))


def test_contrast_keeps_each_channels_mean() -> None:
    image = image_of(32)
    found = distortions.contrast(image, 0.3, np.random.default_rng(0))
    assert np.allclose(found.mean(axis=(0, 1)), image.mean(axis=(0, 1)))
    assert np.allclose(found.std(axis=(0, 1)), 0.3 * image.std(axis=(0, 1)))


def test_pixelate_by_halves_is_a_mean_of_four() -> None:
    image = image_of(32)
    found = distortions.pixelate(image, 0.5, np.random.default_rng(0))
    means = image.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3)).repeat(2, axis=0).repeat(2, axis=1)
    assert np.abs(found - means).max() <= 1  # rounded after the rows and again after the columns


def test_jpeg_loses_more_at_lower_quality_and_keeps_flat_images() -> None:
    flat = np.full((32, 32, 3), 77, dtype=np.uint8)
    assert np.abs(distortions.jpeg_compression(flat, 40, np.random.default_rng(0)) - 77).max() <= 3
    gray = image_of(32)[:, :, :1]
    assert distortions.jpeg_compression(gray, 40, np.random.default_rng(0)).shape == (32, 32, 1)


def test_elastic_is_an_affine_map_and_a_smooth_flow() -> None:
    """A ramp shows where each pixel came from: with jitter alone affinely, with flow by its share."""
    side = 64
    ramp = np.broadcast_to((4 * np.arange(side, dtype=np.uint8))[:, None, None], (side, side, 3))
    assert np.allclose(distortions.elastic_transform(ramp, (0, 0.1, 0), np.random.default_rng(0)), ramp)
    moved = distortions.elastic_transform(ramp, (0, 0, 0.05), np.random.default_rng(0))[16:48, 16:48, 0]
    assert np.abs(np.diff(moved, 2, axis=0)).max() < 1e-6
    assert np.abs(np.diff(moved, 2, axis=1)).max() < 1e-6
    assert 1 < np.abs(moved - ramp[16:48, 16:48, 0]).max() < 4 * 0.05 * side * 3
    # the flow alone: noise, smoothed and scaled, drawn after the affine part's six numbers
    c = (0.5, 0.05, 0)
    rng = np.random.default_rng(0)
    rng.uniform(size=(3, 2))
    rng.uniform(-1, 1, size=(side, side))  # to the right
    down = ndimage.gaussian_filter(rng.uniform(-1, 1, size=(side, side)), 0.05 * side, truncate=3) * 0.5 * side
    shifted = distortions.elastic_transform(ramp, c, np.random.default_rng(0))[:, :, 0]
    inside = (np.arange(side)[:, None] + down > 0) & (np.arange(side)[:, None] + down < side - 1)
    assert np.allclose(shifted[inside], (4 * (np.arange(side)[:, None] + down))[inside])


# -- CIFAR-10-C --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10-C with one type, whose images tell their row; sparse on disk."""
    path = tmp_path_factory.mktemp("CIFAR-10-C")
    labels = np.tile(np.arange(10_000) % 10, 5).astype(np.uint8)
    np.save(path / "labels.npy", labels)
    images = np.lib.format.open_memmap(path / "fog.npy", mode="w+", dtype=np.uint8, shape=(50_000, 32, 32, 3))
    for row in (0, 7, 9_999, 20_000, 20_007, 40_007, 49_999):
        images[row, 0, :4, 0] = row // 10_000, row % 10_000 // 100, row % 100, 255
        images[row, 31, 0] = 1, 2, 3
    images.flush()
    return path


def row_of(image: Tensor) -> int:
    severity, hundreds, ones, full = (255 * image[0, 0, :4]).round().int().tolist()
    assert full == 255
    return 10_000 * severity + 100 * hundreds + ones


def test_severities_lie_ten_thousand_rows_apart(folder: Path) -> None:
    numbers = torch.tensor([7, 0])
    found = read_cifar10c(folder, "fog", 3, numbers, numbers % 10)
    assert (found.shape, found.dtype) == ((2, 3, 32, 32), torch.float32)
    assert [row_of(image) for image in found] == [20_007, 20_000]
    assert torch.allclose(255 * found[0, :, 31, 0], torch.tensor([1.0, 2, 3]))  # channels last on disk
    assert row_of(read_cifar10c(folder, "fog", 1, torch.tensor([9_999]))[0]) == 9_999
    assert row_of(read_cifar10c(folder, "fog", 5, torch.tensor([9_999]))[0]) == 49_999


def test_files_that_are_not_cifar10c_are_refused(folder: Path, tmp_path: Path) -> None:
    first = torch.tensor([0])
    with pytest.raises(UserError, match=r"snow.npy is missing: give the unpacked folder of CIFAR-10-C"):
        read_cifar10c(folder, "snow", 1, first)
    with pytest.raises(UserError, match=r"labels.npy is missing"):
        read_cifar10c(tmp_path, "fog", 1, first)
    with pytest.raises(UserError, match=r"1 of 2 labels differ .* in their original order"):
        read_cifar10c(folder, "fog", 1, torch.tensor([0, 7]), torch.tensor([0, 8]))
    with pytest.raises(UserError, match="has no image 10000: they are numbered 0 to 9999"):
        read_cifar10c(folder, "fog", 1, torch.tensor([0, 10_000]))
    np.save(tmp_path / "labels.npy", np.zeros(50_000, dtype=np.uint8))
    np.save(tmp_path / "fog.npy", np.zeros((10, 32, 32, 3), dtype=np.uint8))
    with pytest.raises(UserError, match=r"must hold uint8 \(50000, 32, 32, 3\), not uint8 \(10, 32, 32, 3\)"):
        read_cifar10c(tmp_path, "fog", 1, first)
    np.save(tmp_path / "snow.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        read_cifar10c(tmp_path, "snow", 1, first)
    with open(tmp_path / "frost.npy", "wb") as file:
        np.savez(file, images=np.zeros(3))
    with pytest.raises(UserError, match="cannot be read"):
        read_cifar10c(tmp_path, "frost", 1, first)


# -- as a case of an evaluation ----------------------------------------------------------------------------------------


class Brightest(nn.Module):
    """Says which of the three channels is brightest on average."""

    def forward(self, x: Tensor) -> Tensor:
        return 10 * x.mean(dim=(2, 3))


def test_a_corruption_is_an_attack_without_steps(small: Tensor) -> None:
    attack = Corruption(type="impulse_noise", severity=3)
    y = torch.zeros(len(small), dtype=torch.int64)
    assert attack.steps_for(ANY) == 0
    found = attack(Brightest(), small, y, ANY, generator=stream(5, "attack"))
    assert torch.equal(found, attack.images(small, y, torch.arange(len(small)), stream(5, "attack")))
    assert torch.equal(found, corrupt(small, "impulse_noise", 3, stream(5, "attack").by_image(small, (4,))))
    with pytest.raises(UserError, match=r"run it under AnyImage\(label=.*\), not LpBall"):
        attack(Brightest(), small, y, LpBall(norm="Linf", eps=0.1))


def test_a_corruption_is_named_in_a_config() -> None:
    data = {"kind": "corruption", "type": "fog", "severity": 2}
    assert Attack.model_validate(data) == Corruption(type="fog", severity=2)
    for wrong in ({"severity": 6}, {"severity": 0}, {"type": "rain"}, {"constants": "mnist-c"}):
        with pytest.raises(ValidationError):
            Attack.model_validate(data | wrong)


@pytest.mark.parametrize(("channels", "path"), [(4, None), (2, None), (1, "cifar-10-c")])
def test_images_of_other_channels_leave_corruptions_out(
    channels: int, path: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)).eval()
    x, y = torch.rand(4, channels, 16, 16), torch.tensor([0, 1, 2, 3])
    corruptions = CorruptionsSuite(types=("fog",), severities=(1, 5), path=path)
    reason = f"needs images of {'1 or 3' if path is None else '3'} channels, not {channels}"
    with pytest.raises(UserError, match=rf"fog-1 {reason}; fog-5 {reason}"):
        rome.evaluate(model, x, y, suite=corruptions)
    report = rome.evaluate(model, x, y, suite=["lp", corruptions], threats=LpBall(norm="Linf", eps=0), progress=True)
    assert report.cases == ("clean", "Linf")
    assert f"fog-1: left out: it {reason}" in capsys.readouterr().err


def test_images_from_files_need_their_numbers(folder: Path) -> None:
    x, y = torch.rand(2, 3, 32, 32), torch.tensor([0, 7])
    attack = Corruption(type="fog", severity=5, path=str(folder))
    found = attack.images(x, y, torch.tensor([0, 7]), stream(0, "attack"))
    assert row_of(found[1]) == 40_007
    with pytest.raises(UserError, match="CIFAR-10-C has images of 3 x 32 x 32, not 3 x 64 x 64"):
        attack.images(torch.rand(2, 3, 64, 64), y, torch.tensor([0, 7]), stream(0, "attack"))
    with pytest.raises(UserError, match=r"needs the numbers of the images: call Corruption\.images"):
        attack(Brightest(), x, y, ANY)


class Both(Suite):
    kind = "fog-and-corruption"

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        unseen = (rome.attacks.Fog(steps=2), Corruption(type="contrast", severity=5))
        return [Case(name=attack.kind, threat=AnyImage(label=attack.kind), attacks=(attack,)) for attack in unseen]


def test_both_kinds_are_cases_like_any_other(small: Tensor, tmp_path: Path) -> None:
    """What the evaluator attacks are the examples that are right on clean images, of which these stay right."""
    model = Brightest()
    y = F.one_hot(model(small).argmax(1), 3).argmax(1)
    y[:4] = (y[:4] + 1) % 3
    report = rome.evaluate(model.eval(), small, y, threats=ANY, suite=Both(), out=tmp_path / "run")
    assert report.cases == ("clean", "fog", "corruption")
    assert report.clean == pytest.approx(36 / 40)
    attack = Corruption(type="contrast", severity=5)
    seen = attack.images(small, y, torch.arange(40), stream_of(0))
    right = (model(seen).argmax(1) == y) & (model(small).argmax(1) == y)
    assert torch.equal(torch.from_numpy(report.correct[:, 2]), right)
    again = rome.evaluate(model, small, y, threats=ANY, suite=Both(), out=tmp_path / "run")
    assert np.array_equal(again.correct, report.correct)


def test_a_report_says_where_the_images_are_from(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).eval()

    def told(side: int = 32, **settings: Any) -> tuple[str, ...]:
        suite = CorruptionsSuite(types=("fog",), severities=(1, 5), **settings)
        report = rome.evaluate(model, F.interpolate(x, side), y, suite=suite)
        assert report.to_json()["corruptions"] == list(report.corruptions)
        show([("net", report)])
        out = capsys.readouterr().out
        assert all(f"net: {sentence}" in out for sentence in report.corruptions)
        return report.corruptions

    assert told() == ("corrupted images made here with the severities of CIFAR-10-C, not its images",)
    assert told(48) == ("corrupted images made here with the severities of ImageNet-C, not its images",)
    assert told(path=str(folder)) == (f"corrupted images read from CIFAR-10-C in {folder}",)
    other = rome.evaluate(model, x, y, suite="lp", threats=LpBall(norm="Linf", eps=0))
    assert other.corruptions == ()


def stream_of(seed: int) -> Any:
    """The stream the evaluator gives an attack."""
    from rome.core.randomness import Stream

    return Stream(torch.Generator().manual_seed(seed))


def test_constants_are_of_images_that_are_made() -> None:
    with pytest.raises(UserError, match=r"constants apply to generated images .* leave one out"):
        Corruption(type="fog", severity=1, path="x", constants="cifar10-c")
