"""The adversarial patch: its place and start from the noise, its content by the steps, nothing else touched."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.problems import Digits
from rome.attacks import Patch
from rome.attacks.free import changed_pixels
from rome.core.errors import UserError
from rome.core.randomness import stream
from rome.threats import AnyImage

PATCH = AnyImage(label="patch")


def drawn(x: Tensor, size: int, seed: int = 0) -> tuple[list[tuple[int, int]], Tensor]:
    """Where the patch of each image lies and how it starts, from the stream that attacks use."""
    u = stream(seed, "attack").by_image(x, (2 + x.shape[1] * size**2,)).double()
    free = [x.shape[2] - size + 1, x.shape[3] - size + 1]
    places = [(int(row[0] * free[0]), int(row[1] * free[1])) for row in u]
    return places, u[:, 2:].view(len(x), x.shape[1], size, size)


class Linear(nn.Module):
    """Logits (0, <w, x>): with label 0 the loss rises with <w, x>."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.w).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


def linear_problem(height: int = 12, width: int = 15) -> tuple[Linear, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    w = torch.randn(3, height, width, generator=g, dtype=torch.float64) / 10
    return Linear(w), torch.rand(6, 3, height, width, generator=g, dtype=torch.float64), torch.zeros(6).long()


@pytest.mark.parametrize(("size", "steps"), [(8, 50), (8, 200), (1, 7), (12, 3)])
def test_on_a_linear_model_every_pixel_of_the_patch_moves_along_its_weight(size: int, steps: int) -> None:
    """By steps * step_size, or to the bound of the box: with 128 steps and more the best patch there is."""
    model, x, y = linear_problem()
    found = Patch(size=size, steps=steps)(model, x, y, PATCH)
    places, start = drawn(x, size)
    expected = x.clone()
    for i, (top, left) in enumerate(places):
        window = (slice(None), slice(top, top + size), slice(left, left + size))
        expected[i][window] = (start[i] + steps * 2 / 255 * model.w[window].sign()).clamp(0, 1)
        if steps >= 128:
            assert torch.equal(expected[i][window], (model.w[window] > 0).double())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_it_may_start_from_the_image() -> None:
    model, x, y = linear_problem()
    found = Patch(steps=4, start="image")(model, x, y, PATCH)
    ((top, left), *_), _ = drawn(x, 8)
    inside = torch.zeros_like(x[0], dtype=torch.bool)
    inside[:, top : top + 8, left : left + 8] = True
    expected = torch.where(inside, (x[0] + 8 / 255 * model.w.sign()).clamp(0, 1), x[0])
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-12)
    assert torch.equal(Patch(steps=0, start="image")(model, x, y, PATCH), x)
    assert torch.equal(Patch(size=0)(model, x, y, PATCH), x)


def test_places_are_uniform_over_where_the_patch_fits() -> None:
    x = torch.rand(2000, 1, 6, 5, generator=torch.Generator().manual_seed(0))
    model = Linear(torch.zeros(1, 6, 5))
    changed = Patch(size=3, steps=0)(model, x, torch.zeros(2000).long(), PATCH) != x
    assert (changed.flatten(1).sum(1) == 9).all()
    tops = changed.any(3).squeeze(1).int().argmax(1)
    lefts = changed.any(2).squeeze(1).int().argmax(1)
    counts = torch.bincount(tops * 3 + lefts, minlength=12).double()
    assert counts.numel() == 12  # four rows, three columns
    assert (counts - 2000 / 12).abs().max() < 4.5 * (2000 / 12) ** 0.5


def test_gradients_that_are_not_finite_are_no_robustness() -> None:
    """Torch's sign of NaN is 0: the start would come back as if nothing could be found."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x).flatten(1).sum(1, keepdim=True).sqrt() + torch.tensor([1.0, 0.0])

    with pytest.raises(FloatingPointError, match="non-finite images for 2 of 2 examples"):
        Patch(size=2, steps=1)(Broken(), torch.rand(2, 3, 8, 8), torch.tensor([0, 0]), PATCH)


def test_an_image_of_the_size_of_the_patch_is_all_patch() -> None:
    model, x, y = linear_problem(8, 8)
    found = Patch(steps=200)(model, x, y, PATCH)
    assert torch.equal(found, (model.w > 0).double().expand_as(found))


def test_a_patch_that_does_not_fit_is_refused() -> None:
    model, x, y = linear_problem(7, 20)
    with pytest.raises(UserError, match=r"patch of 8x8 does not fit into images of 7x20.*smaller"):
        Patch()(model, x, y, PATCH)


@pytest.mark.slow
def test_larger_patches_and_more_steps_fool_more(digits: Digits, digits_model: nn.Module) -> None:
    x, y = (part[:200] for part in digits.test)

    def loss(attack: Patch) -> float:
        found = attack(digits_model, x, y, PATCH)
        assert (changed_pixels(found, x) <= attack.size**2).all()
        return F.cross_entropy(digits_model(found), y).item()

    by_size = [loss(Patch(size=size)) for size in (0, 1, 2, 3, 4)]
    assert all(b > 1.05 * a for a, b in itertools.pairwise(by_size))
    by_steps = [loss(Patch(size=3, steps=steps)) for steps in (0, 5, 20, 80)]
    assert all(b > 1.1 * a for a, b in itertools.pairwise(by_steps))


def test_a_patch_is_opaque_and_so_no_trace_of_the_image_is_left_in_it() -> None:
    """Two images that differ only under the patch become one image."""
    model, x, y = linear_problem()
    attack = Patch(size=5, steps=3)
    (top, left), *_ = drawn(x, 5)[0]
    noise = stream(0, "attack").by_image(x[:1], attack.noise_shape(x.shape[1:]))
    other = x[:1].clone()
    other[0, :, top : top + 5, left : left + 5] = 0.123
    one, two = (attack.search(model, images, y[:1], [], noise).images for images in (x[:1], other))
    assert torch.equal(one, two)
