"""Fog, snow, Gabor, elastic, JPEG: the transforms against slow literal versions, the ascent by its properties."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn, idctn
from scipy.signal import fftconvolve
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from helpers.problems import case, recorded
from rome.attacks import JPEG, Attack, Elastic, Fog, Gabor, Snow
from rome.attacks.transforms.base import SignAscent, Transform
from rome.attacks.transforms.elastic import smoothing
from rome.attacks.transforms.gabor import flattened, gabor_kernels
from rome.attacks.transforms.jpeg import CHROMA, LUMA
from rome.attacks.transforms.plasma import diamond_square, to_unit
from rome.attacks.transforms.snow import BUDGET, DRAWS, OFFSETS, line_kernels
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.threats import AnyImage, LpBall, PerExample

KINDS: dict[str, type[SignAscent]] = {kind.kind: kind for kind in (Fog, Snow, Gabor, Elastic, JPEG)}
ANY = AnyImage(label="unseen")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> type[SignAscent]:
    return KINDS[request.param]


def tiles(n: int, side: int, seed: int = 0) -> Tensor:
    """Tiles of two photographs at a third of their size, in random order: float32 (n, 3, side, side)."""
    photographs = [torch.from_numpy(photograph.copy()) for photograph in load_sample_images().images]
    small = [photograph[::3, ::3].permute(2, 0, 1).float() / 255 for photograph in photographs]
    cut = [part.unfold(1, side, side // 2).unfold(2, side, side // 2).flatten(1, 2) for part in small]
    found = torch.cat(cut, dim=1).transpose(0, 1)
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:n]].contiguous()


@pytest.fixture(scope="module")
def photos() -> Tensor:
    return tiles(8, 32)


def network(channels: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small convolutional classifier with seeded random weights that reacts to every detail."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(channels, 12, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(12, 12, 3, padding=1), nn.Tanh(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 10),
    )  # fmt: skip
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g) * (3.0 / math.sqrt(p[0].numel()) if p.ndim > 1 else 0.1)
    return model.to(dtype).eval().requires_grad_(False)


MODEL = network()


def answers(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).argmax(1)


def prepared(attack: SignAscent, x: Tensor, seed: int = 0) -> Any:
    noise = stream(seed, "attack").by_image(x, attack.noise_shape(x.shape[1:]))
    return attack.prepare(x, noise.to(x.dtype))


def loss_of(attack: SignAscent, x: Tensor, y: Tensor) -> Tensor:
    return attack.run(MODEL, x, y, ANY).loss


# -- settings ----------------------------------------------------------------------------------------------------------


def test_defaults_are_the_papers(kind: type[SignAscent]) -> None:
    assert kind().bound == {"fog": 12, "snow": 0.5, "gabor": 60, "elastic": 0.125, "jpeg": 0.125}[kind.kind]
    assert (kind().steps, kind().step_size) == (100, None)
    assert Attack.model_validate({"kind": kind.kind, "bound": "1/8", "steps": 3}) == kind(bound=0.125, steps=3)
    with pytest.raises(UserError):
        kind(bound=-1)


def test_other_threats_are_refused_clearly(kind: type[SignAscent], photos: Tensor) -> None:
    ball, y = LpBall(norm="Linf", eps=0.1), answers(MODEL, photos)
    message = rf"{kind.kind} bounds its perturbation itself.* AnyImage\(label='{kind.kind}'\), not LpBall"
    with pytest.raises(UserError, match=message):
        kind(steps=1)(MODEL, photos, y, ball)
    with pytest.raises(UserError, match=message):
        kind(steps=1)(MODEL, photos, y, PerExample((ANY, ball), torch.arange(8) % 2))


def test_channels_a_transform_knows_nothing_of_are_refused() -> None:
    for attack in (Snow(steps=1), JPEG(steps=1)):
        with pytest.raises(UserError, match=f"{attack.kind} needs images of 1 or 3 channels, not 2"):
            attack(network(2), torch.rand(2, 2, 16, 16), torch.zeros(2, dtype=torch.int64), ANY)


# -- the ascent --------------------------------------------------------------------------------------------------------


def test_one_forward_and_backward_a_step_for_the_whole_batch(kind: type[SignAscent], photos: Tensor) -> None:
    y = answers(MODEL, photos)
    with recorded(MODEL) as calls:
        kind(steps=4)(MODEL, photos, y, ANY)
    assert [len(batch) for batch in calls.forwards] == [8] * 4
    assert calls.backwards == [8] * 4


def test_steps_are_signs_of_the_default_size_or_the_one_given(kind: type[SignAscent], photos: Tensor) -> None:
    """One step by hand, projected and shown: of bound/sqrt(1), of 2.5 x the range of fog's and Gabor's variables."""
    x, y = photos[:3].double(), answers(MODEL, photos[:3])
    model = network(dtype=torch.float64)
    attack = kind(steps=1)
    transform = prepared(attack, x)
    v = transform.start.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(transform.images(v)), y, reduction="sum"), v)
    size = {"fog": 2.5, "gabor": 5.0}.get(kind.kind, attack.bound)
    by_hand = transform.images(transform.project(v.detach() + size * gradient.sign()))
    assert torch.equal(attack(model, x, y, ANY, generator=stream(0, "attack")), by_hand)
    half = transform.images(transform.project(v.detach() + 0.3 * size * gradient.sign()))
    assert torch.equal(kind(steps=1, step_size=0.3 * size)(model, x, y, ANY, generator=stream(0, "attack")), half)


def test_the_loss_rises_over_the_iterations(kind: type[SignAscent], photos: Tensor) -> None:
    y = answers(MODEL, photos)
    size = {"fog": 0.05, "snow": 0.01, "gabor": 0.05, "elastic": 0.02, "jpeg": 0.02}[kind.kind]
    start, some, more = (loss_of(kind(steps=n, step_size=size), photos, y).mean() for n in (0, 4, 16))
    assert start < some < more


def test_more_budget_makes_a_stronger_attack(kind: type[SignAscent], photos: Tensor) -> None:
    y = answers(MODEL, photos)
    losses = [loss_of(kind(steps=12, bound=share * kind().bound), photos, y).mean() for share in (0.25, 1, 4)]
    assert losses[0] < losses[1] < losses[2]


def test_a_result_depends_neither_on_batch_mates_nor_on_their_order(kind: type[SignAscent], photos: Tensor) -> None:
    x = photos.double()
    x[3] = 0.02 * x[3]  # a dark image: normalising over the batch would show
    model = network(dtype=torch.float64)
    y, attack = answers(model, x), kind(steps=5)
    whole = attack(model, x, y, ANY, generator=stream(1, "attack"))
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    for part in order.split([1, 3, 4]):
        alone = attack(model, x[part], y[part], ANY, generator=stream(1, "attack"))
        assert torch.allclose(alone, whole[part], atol=1e-9)


def test_repeatable_by_seed_and_the_global_random_state_is_left_alone(kind: type[SignAscent], photos: Tensor) -> None:
    y = answers(MODEL, photos)
    before = torch.get_rng_state()
    first, again, other = (
        kind(steps=2)(MODEL, photos, y, ANY, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_and_precisions(kind: type[SignAscent]) -> None:
    for shape in [(3, 32, 32), (3, 224, 224), (1, 8, 8), (3, 20, 28), (3, 33, 47), (1, 30, 22)]:
        for dtype in [torch.float32, torch.float64] if shape[1] < 100 else [torch.float32]:
            with case(shape, dtype):
                x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).to(dtype)
                model = network(shape[0], dtype)
                found = kind(steps=2)(model, x, answers(model, x), ANY)
                assert (found.dtype, found.shape) == (dtype, x.shape)
                assert bool(((found >= 0) & (found <= 1)).all())
                assert bool(found.isfinite().all())
                assert bool((found != x).flatten(1).any(dim=1).all())


def test_extreme_images_stay_finite(kind: type[SignAscent]) -> None:
    """All black, all white, one channel black."""
    x = torch.stack((torch.zeros(3, 32, 32), torch.ones(3, 32, 32), torch.ones(3, 32, 32)))
    x[2, 0] = 0
    for bound in (0.0, kind().bound):
        found = kind(steps=2, bound=bound)(MODEL, x, answers(MODEL, x), ANY)
        assert bool(found.isfinite().all())


def test_autocast_of_the_model_leaves_the_images_in_full_precision(kind: type[SignAscent], photos: Tensor) -> None:
    y = answers(MODEL, photos)
    plain = kind(steps=0)(MODEL, photos, y, ANY)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kind(steps=0)(MODEL, photos, y, ANY), plain)
        assert kind(steps=2)(MODEL, photos, y, ANY).dtype == torch.float32


def test_the_ascent_asks_nothing_of_the_device(kind: type[SignAscent]) -> None:
    """On a device without values: a host decision raises, and so does a constant left on the CPU."""
    x, attack = torch.rand(3, 3, 32, 32, device="meta"), kind(steps=2)
    noise = torch.rand(3, *attack.noise_shape(x.shape[1:]), device="meta")
    transform = attack.prepare(x, noise)
    variables = attack.ascend(network().to("meta"), transform, torch.zeros(3, dtype=torch.int64, device="meta"))
    assert (variables.shape, variables.device.type) == (transform.start.shape, "meta")
    assert transform.contains(variables).shape == (3,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_the_same_images_and_does_not_wait(kind: type[SignAscent], photos: Tensor) -> None:
    attack, y = kind(steps=3), answers(MODEL, photos)
    on_cpu = prepared(attack, photos)
    on_gpu = prepared(attack, photos.cuda())
    torch.testing.assert_close(
        on_gpu.images(on_gpu.start).cpu(), on_cpu.images(on_cpu.start), atol=2e-3 if kind is Gabor else 1e-4, rtol=0
    )
    model, y = network().cuda(), y.cuda()
    attack.ascend(model, on_gpu, y)  # libraries may wait the first time they are used
    torch.cuda.set_sync_debug_mode("error")
    try:
        attack.ascend(model, on_gpu, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_variables_that_leave_their_range_are_a_bug(photos: Tensor) -> None:
    class Leaking(Transform):
        def __init__(self, x: Tensor) -> None:
            super().__init__(torch.zeros(len(x), 1))
            self.x = x

        def images(self, variables: Tensor) -> Tensor:
            return (self.x + 0.01 * variables[:, :, None, None]).clamp(0, 1)

        def project(self, variables: Tensor) -> Tensor:
            return variables + 2

    class Leaky(SignAscent):
        kind = "leaky"
        bound: float = 1

        def noise_shape(self, image: torch.Size) -> tuple[int, ...]:
            return (1,)

        def prepare(self, x: Tensor, noise: Tensor) -> Transform:
            return Leaking(x)

    Leaky(steps=0)(MODEL, photos, answers(MODEL, photos), ANY)
    with pytest.raises(AssertionError, match=r"leaky left its bound on \d of 8 examples: a bug"):
        Leaky(steps=1)(MODEL, photos, answers(MODEL, photos), ANY)


def test_gradients_that_are_not_finite_are_said_to_be(kind: type[SignAscent], photos: Tensor) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return MODEL(x) + (x - x).flatten(1).sum(1, keepdim=True).sqrt()

    with pytest.raises(FloatingPointError, match=f"{kind.kind}: the gradients of the model are not finite"):
        kind(steps=2)(Broken(), photos, answers(MODEL, photos), ANY)


# -- zero budget: only what is known of each transform -----------------------------------------------------------------


def nothing(kind: type[SignAscent], x: Tensor) -> Tensor:
    return kind(bound=0, steps=3, step_size=0.1)(network(x.shape[1], x.dtype), x, torch.zeros(len(x)).long(), ANY)


def test_fog_without_budget_stretches_every_channel_to_one(photos: Tensor) -> None:
    assert torch.allclose(nothing(Fog, photos), photos / photos.amax(dim=(2, 3), keepdim=True))


def test_snow_without_budget_pales_colours(photos: Tensor) -> None:
    gray = 0.2126 * photos[:, :1] + 0.7152 * photos[:, 1:2] + 0.0722 * photos[:, 2:]
    paled = 0.75 * photos + 0.25 * torch.maximum(photos, 1.5 * gray + 0.5)
    assert torch.allclose(nothing(Snow, photos), paled.clamp(max=1))


def test_gabor_without_budget_changes_nothing(photos: Tensor) -> None:
    assert torch.equal(nothing(Gabor, photos), photos)


def test_elastic_without_budget_changes_nothing_because_corners_are_aligned(photos: Tensor) -> None:
    assert torch.allclose(nothing(Elastic, photos), photos, atol=1e-5)
    assert torch.allclose(nothing(Elastic, photos.double()), photos.double(), atol=1e-13)
    grid = prepared(Elastic(bound=0), photos).identity.permute(1, 2, 0).expand(len(photos), -1, -1, -1)
    shifted = F.grid_sample(photos, grid, align_corners=False)  # what today's default does to the same grid
    assert float((shifted - photos).abs().mean()) > 0.02


def test_jpeg_without_budget_only_halves_the_resolution_of_colour(photos: Tensor) -> None:
    found = nothing(JPEG, photos)
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    inside = ((found > 0) & (found < 1)).all(dim=1)
    assert torch.allclose((found * luma).sum(1)[inside], (photos * luma).sum(1)[inside], atol=1e-5)
    assert 0.2 / 255 < float((found - photos).abs().mean()) < 6 / 255
    even = F.interpolate(F.avg_pool2d(photos, 2), scale_factor=2.0)  # colour that has half the resolution already
    assert torch.allclose(nothing(JPEG, even), even, atol=1e-5)
    gray = photos.mean(dim=1, keepdim=True)
    assert torch.equal(nothing(JPEG, gray), gray)


# -- fog ---------------------------------------------------------------------------------------------------------------


def slow_diamond_square(offsets: list[np.ndarray], size: int) -> np.ndarray:
    """The algorithm point by point, on a torus."""
    grid, step, turn = np.zeros((size, size)), size, iter(offsets)
    while step >= 2:
        half = step // 2
        square, row, column = next(turn), next(turn), next(turn)
        corners = list(itertools.product(range(0, size, step), repeat=2))
        for r, c in corners:
            four = [grid[(r + dr) % size, (c + dc) % size] for dr in (0, step) for dc in (0, step)]
            grid[r + half, c + half] = sum(four) / 4 + square[r // step, c // step]
        for r, c in corners:
            for (dr, dc), offset in (((0, half), row), ((half, 0), column)):
                four = [
                    grid[(r + dr + sr) % size, (c + dc + sc) % size]
                    for sr, sc in ((-half, 0), (half, 0), (0, -half), (0, half))
                ]
                grid[r + dr, c + dc] = sum(four) / 4 + offset[r // step, c // step]
        step = half
    return grid


def test_fog_is_diamond_square_point_by_point() -> None:
    x = tiles(2, 16).double()
    transform = prepared(Fog(), x)
    assert transform.start.shape == (2, 32**2 - 1)
    offsets = transform.offsets(transform.start)
    assert [offset.shape[1] for offset in offsets] == [side for side in (1, 2, 4, 8, 16) for _ in range(3)]
    for i in range(2):
        grid = slow_diamond_square([offset[i].numpy() for offset in offsets], 32)
        fog = (grid - grid.min()) / (grid.max() - grid.min())
        assert np.allclose(transform.fog(transform.start)[i, 0], fog[8:24, 8:24])
        highest = x[i].amax(dim=(1, 2), keepdim=True)
        foggy = (x[i] + 12 / 255 * torch.from_numpy(fog[8:24, 8:24])) / (highest + 12 / 255)
        assert torch.allclose(transform.images(transform.start)[i], foggy)


def test_offsets_halve_from_level_to_level() -> None:
    transform = prepared(Fog(), tiles(1, 32))
    offsets = transform.offsets(torch.ones_like(transform.start))
    assert [float(offset.unique()) for offset in offsets] == [100 / 2**i for i in range(6) for _ in range(3)]
    assert all(bool((offset == 0).all()) for offset in transform.offsets(torch.full_like(transform.start, 0.5)))


def test_every_map_fills_the_range_by_itself() -> None:
    g = torch.Generator().manual_seed(0)
    offsets = [torch.rand(2, 2**i, 2**i, generator=g) for i in range(4) for _ in range(3)]
    offsets = [offset * torch.tensor([1.0, 1000.0]).view(2, 1, 1) for offset in offsets]
    maps = to_unit(diamond_square(offsets))
    assert maps.amin(dim=(1, 2)).tolist() == [0, 0]
    assert torch.allclose(maps.amax(dim=(1, 2)), torch.ones(2))
    assert bool((to_unit(torch.full((1, 4, 4), 3.0)) == 0).all())


def test_maps_are_64_for_32_pixels_and_256_for_224() -> None:
    assert Fog().noise_shape(torch.Size((3, 32, 32))) == (64**2 - 1,)
    assert Fog().noise_shape(torch.Size((3, 224, 224))) == (256**2 - 1,)


# -- snow --------------------------------------------------------------------------------------------------------------


def slow_line(row: int, column: int, width: int) -> np.ndarray:
    """An antialiased line from (6, 6) to (6 + row, 6 + column) and back to the mirrored end, pixel by pixel."""
    kernel = np.zeros((13, 13))
    steep = row > column
    longer, shorter = (row, column) if steep else (column, row)
    w = width * math.sqrt(1 + shorter / longer) / 2
    for a in range(longer + 1):
        for b in range(7):
            value = min(max(1 + w / 2 - abs(b - a * shorter / longer), 0), 1)
            r, c = (a, b) if steep else (b, a)
            kernel[6 + r, 6 + c] = kernel[6 - r, 6 - c] = value
    return kernel


def test_kernels_are_blurred_lines() -> None:
    g = torch.Generator().manual_seed(0)
    draws = torch.rand(12, DRAWS, generator=g, dtype=torch.float64)
    kernels = line_kernels(draws)
    widths = set()
    for i, j in itertools.product(range(12), range(7)):
        r, c, w, s = (float(draws[i, 1 + j + 7 * k]) for k in range(4))
        width = 1 if w < 0.6 else 3 if w < 0.9 else 5
        line = slow_line(2 + int(5 * r), 2 + int(5 * c), width)
        line = line[:, ::-1] if draws[i, 0] < 0.5 else line
        t = np.exp(-0.5 * (np.arange(-1, 2) / (0.41 + 0.19 * s)) ** 2)
        blur = np.outer(t, t) / np.outer(t, t).sum()
        literal = F.conv2d(torch.from_numpy(line.copy())[None, None], torch.from_numpy(blur)[None, None], padding=1)
        assert torch.allclose(kernels[i, j], literal[0, 0])
        widths.add(width)
    assert widths == {1, 3, 5}
    assert torch.allclose(kernels, kernels.flip(2, 3))


def test_flakes_stand_on_their_lattices() -> None:
    """A dense map for each grid, convolved as written."""
    x = torch.rand(2, 3, 32, 24, dtype=torch.float64)
    attack = Snow()
    noise = stream(0, "attack").by_image(x, attack.noise_shape(x.shape[1:])).double()
    transform: Any = attack.prepare(x, noise)
    assert transform.start.shape == (2, 7, 8, 6)
    dense = torch.zeros(2, 7, 32, 24, dtype=torch.float64)
    for grid, (row, column) in enumerate(OFFSETS):
        dense[:, grid, row::4, column::4] = transform.start[:, grid] ** 4
    kernels = line_kernels(noise[:, :DRAWS])
    for i in range(2):
        literal = F.conv2d(dense[i : i + 1], kernels[i : i + 1], padding=6)
        assert torch.allclose(transform.snow(transform.start)[i], literal[0])


def test_snow_never_exceeds_its_budget_in_a_region_not_even_after_the_last_step() -> None:
    x = tiles(2, 96)  # grids of 24: nine regions of 8
    model, seen = network(), []

    class Spying(Snow):
        def prepare(self, x: Tensor, noise: Tensor) -> Transform:
            transform = super().prepare(x, noise)
            shown = transform.images
            transform.images = lambda v: seen.append(v.detach()) or shown(v)  # type: ignore[method-assign]
            return transform

    Spying(steps=3, step_size=0.5)(model, x, answers(model, x), ANY)
    assert len(seen) == 4
    for variables in seen:
        means = variables.view(2, 7, 3, 8, 3, 8).mean(dim=(3, 5))
        assert float(means.max()) <= BUDGET * (1 + 1e-5)
        assert float(variables.min()) >= 0
        assert float(variables.max()) <= 1
    assert float((seen[-1] - seen[-2]).abs().max()) > 0.1, "a test of nothing: nothing moved"


def test_only_regions_above_the_budget_are_scaled() -> None:
    transform = prepared(Snow(), tiles(1, 64))  # 16 x 16 cells
    full = torch.full((1, 7, 16, 16), 0.1)
    full[:, :, :8, :8] = 0.4
    projected = transform.project(full)
    assert torch.allclose(projected[:, :, :8, :8], torch.tensor(0.2))
    assert torch.equal(projected[:, :, 8:], full[:, :, 8:])
    assert float(transform.project(torch.full_like(full, -1.0)).min()) == pytest.approx(1e-9)


# -- gabor -------------------------------------------------------------------------------------------------------------


def test_gabor_noise_is_a_convolution_and_its_normalisation_as_published(photos: Tensor) -> None:
    x = photos.double()
    attack = Gabor()
    noise = stream(0, "attack").by_image(x, attack.noise_shape(x.shape[1:])).double()
    transform = attack.prepare(x, noise)
    kernels = gabor_kernels(noise[:, :4])
    z = F.conv2d(transform.start[None], kernels[:, None], groups=len(x), padding=11)[0]
    mean = z.mean(dim=(1, 2), keepdim=True)
    spectral = torch.fft.irfft2(torch.fft.rfft2((z - mean) ** 2), s=z.shape[1:]).abs().sqrt()
    gain = 1.001 / (0.001 + spectral / spectral.amax(dim=(1, 2), keepdim=True))
    even = mean + (z - mean) * gain
    low, high = even.amin(dim=(1, 2), keepdim=True), even.amax(dim=(1, 2), keepdim=True)
    literal = (x + 60 / 255 * ((even - low) / (high - low))[:, None]).clamp(0, 1)
    assert torch.allclose(transform.images(transform.start), literal, atol=1e-6)


def test_gabor_kernels_point_by_point() -> None:
    draws = torch.rand(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kernel, (n, s, f, a) in zip(gabor_kernels(draws), draws.tolist(), strict=True):
        sides, sigma, frequency, angle = 1 + int(10 * n), 0.1 + 0.3 * s + 0.001, 3 + 2.75 * f, math.pi * a
        for r, c in ((0, 0), (11, 11), (3, 17), (20, 9)):
            x, y = -0.5 + c / 22, -0.5 + r / 22
            value = 0.0
            for j in range(sides):
                t = angle + math.pi * j / sides
                value += math.cos(2 * math.pi * frequency * (x * math.cos(t) + y * math.sin(t)))
            assert float(kernel[r, c]) == pytest.approx(value * math.exp(-(x * x + y * y) / (2 * sigma**2)))


def test_gabor_maps_are_sparse_and_their_support_is_fixed(photos: Tensor) -> None:
    transform = prepared(Gabor(), photos)
    assert (transform.start != 0).sum(dim=(1, 2)).tolist() == [73] * 8  # 1024 / 14
    assert float(transform.start.min()) < -0.9 < 0.9 < float(transform.start.max())
    moved = transform.project(torch.full_like(transform.start, 5.0))
    assert torch.equal(moved, (transform.start != 0).float())
    assert len({tuple(row.tolist()) for row in (transform.start != 0).flatten(1).int()}) == 8
    published = prepared(Gabor(form="published"), photos)
    assert torch.equal(published.start, transform.start)
    assert torch.equal(published.project(torch.full_like(transform.start, 5.0)), 1 - moved)


def test_gabor_noise_spans_zero_to_one_in_all_channels_alike(photos: Tensor) -> None:
    black = torch.zeros_like(photos)
    transform = Gabor(bound=255).prepare(black, prepared_noise(Gabor(), photos))
    images = transform.images(transform.start)
    assert torch.allclose(images.amin(dim=(1, 2, 3)), torch.zeros(8), atol=1e-6)
    assert torch.allclose(images.amax(dim=(1, 2, 3)), torch.ones(8))
    assert torch.equal(images, images[:, :1].expand_as(images))
    assert bool((flattened(torch.zeros(1, 8, 8)) == 0).all())


def prepared_noise(attack: SignAscent, x: Tensor) -> Tensor:
    return stream(0, "attack").by_image(x, attack.noise_shape(x.shape[1:]))


# -- elastic -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "taps", "sigma"), [(32, 5, 3 * 32 / 224), (224, 25, 3.0)])
def test_the_flow_is_smoothed_by_a_reflected_gaussian(side: int, taps: int, sigma: float) -> None:
    flow = torch.randn(2, 2, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.arange(taps, dtype=torch.float64) - taps // 2
    kernel = torch.exp(-(t[:, None] ** 2 + t**2) / (2 * sigma**2))
    padded = F.pad(flow, (taps // 2,) * 4, mode="reflect").numpy()
    literal = fftconvolve(padded, (kernel / kernel.sum())[None, None].numpy(), mode="valid")
    assert np.allclose(smoothing(side, flow).mT @ flow @ smoothing(side, flow), literal)


def test_a_flow_of_a_pixel_shifts_the_image_by_it_and_shows_black_beyond() -> None:
    x = torch.rand(1, 3, 20, 32, dtype=torch.float64)
    transform = prepared(Elastic(bound=2), x)
    pixel = x.new_tensor([32 / 31, 20 / 19]).view(1, 2, 1, 1)  # units of 2/side of a grid that is 2/(side - 1) wide
    right, down = (torch.tensor(axis).view(1, 2, 1, 1) * pixel for axis in ((1.0, 0.0), (0.0, 1.0)))
    blank = torch.zeros_like(transform.start)
    assert torch.allclose(transform.images(blank + right), F.pad(x[..., 1:], (0, 1)), atol=1e-9)
    assert torch.allclose(transform.images(blank + down), F.pad(x[..., 1:, :], (0, 0, 0, 1)), atol=1e-9)


def test_a_flow_stays_within_its_bound(photos: Tensor) -> None:
    transform = prepared(Elastic(bound=0.3), photos)
    assert float(transform.start.abs().max()) <= 0.3
    assert float(transform.start.min()) < -0.29 < 0.29 < float(transform.start.max())
    everywhere = torch.full_like(transform.start, 9.0)
    assert bool((transform.project(everywhere) == 0.3).all())
    assert bool((transform.project(-everywhere) == -0.3).all())


# -- jpeg --------------------------------------------------------------------------------------------------------------


def slow_jpeg(image: np.ndarray, variables: list[np.ndarray]) -> np.ndarray:
    """JPEG by definition: image (3, H, W) on 0..255, sides multiples of 16; variables of y, cb, cr as planes."""
    r, g, b = image
    y = 0.299 * r + 0.587 * g + 0.114 * b
    cb = -0.168736 * r - 0.331264 * g + 0.5 * b + 128
    cr = 0.5 * r - 0.418688 * g - 0.081312 * b + 128
    halved = [plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean(axis=(1, 3)) for plane in (cb, cr)]
    out = []
    for plane, v, table in zip([y, *halved], variables, (LUMA, CHROMA, CHROMA), strict=True):
        decoded = np.empty_like(plane)
        for i, j in itertools.product(range(0, plane.shape[0], 8), range(0, plane.shape[1], 8)):
            block = (slice(i, i + 8), slice(j, j + 8))
            quantised = dctn(plane[block] - 128, norm="ortho") / np.array(table) + v[block] / 2
            decoded[block] = idctn(quantised * np.array(table), norm="ortho") + 128
        out.append(decoded)
    y, (cb, cr) = out[0], (plane.repeat(2, axis=0).repeat(2, axis=1) - 128 for plane in out[1:])
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]).clip(0, 255)


def as_planes(variables: Tensor, height: int, width: int) -> list[np.ndarray]:
    """The variables of one image as planes: blocks in reading order, 8 x 8 coefficients each."""
    sizes = [(height, width), (height // 2, width // 2), (height // 2, width // 2)]
    parts = torch.split(variables, [h * w for h, w in sizes])
    return [
        p.view(h // 8, w // 8, 8, 8).transpose(1, 2).reshape(h, w).numpy()
        for p, (h, w) in zip(parts, sizes, strict=True)
    ]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 48)])
def test_jpeg_by_definition(height: int, width: int) -> None:
    x = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    transform = prepared(JPEG(bound=0.8), x)
    for i in range(2):
        literal = slow_jpeg(255 * x[i].numpy(), as_planes(transform.start[i], height, width)) / 255
        assert np.allclose(transform.images(transform.start)[i], literal)


def test_padding_repeats_the_edge() -> None:
    x = torch.rand(1, 3, 21, 27, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    transform = prepared(JPEG(bound=0.8), x)
    padded = F.pad(x, (0, 5, 0, 11), mode="replicate")
    literal = slow_jpeg(255 * padded[0].numpy(), as_planes(transform.start[0], 32, 32)) / 255
    assert np.allclose(transform.images(transform.start)[0], literal[:, :21, :27])


def test_a_coefficient_moves_by_at_most_half_the_bound() -> None:
    """On gray images away from the box the coefficients of the difference are exactly what was added."""
    x = 0.4 + 0.2 * torch.rand(4, 1, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = network(1, torch.float64)
    difference = JPEG(bound=0.05, steps=30)(model, x, answers(model, x), ANY) - x
    blocks = 255 * difference.view(4, 2, 8, 2, 8).transpose(2, 3).numpy()
    moved = np.abs(dctn(blocks, axes=(3, 4), norm="ortho") / np.array(LUMA))
    assert moved.max() == pytest.approx(0.025)
    assert np.median(moved) > 0.024
