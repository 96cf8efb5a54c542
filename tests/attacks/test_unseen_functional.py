"""StAdv and ReColorAdv: flows and colours by closed forms, the search step by step, bounds that hold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.attacks import ReColorAdv, StAdv
from rome.attacks.engine import margin
from rome.attacks.transforms.colors import luv_to_rgb, rgb_to_luv
from rome.attacks.transforms.functional import FunctionalAttack, roughness
from rome.core.errors import UserError
from rome.threats import AnyImage

ANY = AnyImage(label="any")
ATTACKS = {"stadv": StAdv(), "recoloradv": ReColorAdv()}


@pytest.fixture(params=ATTACKS)
def attack(request: pytest.FixtureRequest) -> FunctionalAttack:
    return ATTACKS[request.param]


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Tensor, Tensor]:
    """A small smooth CNN in float64, eight blurred images 3x16x16, its own answers as labels."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Tanh(),
        nn.Flatten(), nn.Linear(256, 5),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data *= 3
    model = model.double().eval()
    x = F.avg_pool2d(torch.rand(8, 3, 20, 20, dtype=torch.float64), 5, stride=1)
    x = (x - x.amin()) / (x.amax() - x.amin())
    return model, x, model(x).argmax(1)


# -- the search --------------------------------------------------------------------------------------------------------


def literal_roughness(shift: Tensor) -> Tensor:
    """One grid: every node, every neighbour on either side along each axis; a border node is its own neighbour."""
    *size, _ = shift.shape
    total = torch.zeros((), dtype=shift.dtype)
    for node in itertools.product(*map(range, size)):
        for axis, side in itertools.product(range(len(size)), (-1, 1)):
            other = list(node)
            other[axis] = min(max(other[axis] + side, 0), size[axis] - 1)
            total = total + ((shift[node] - shift[tuple(other)]).square().sum() + 1e-10).sqrt()
    return total


@pytest.mark.parametrize("shape", [(4, 5, 2), (3, 4, 2, 3)])
def test_roughness_sums_over_neighbours(shape: tuple[int, ...]) -> None:
    """Up to the constant 1e-5 for each border node and side."""
    shift = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    nodes = math.prod(shape[:-1])
    borders = sum(2 * nodes // size for size in shape[:-1])
    expected = torch.stack([literal_roughness(one) for one in shift]) - borders * 1e-5
    torch.testing.assert_close(roughness(shift), expected, rtol=1e-12, atol=0)


def literal_search(model: nn.Module, x: Tensor, y: Tensor, attack: FunctionalAttack) -> Tensor:
    """One image: Adam by hand on -margin + tau * roughness, constrained before each forward and at the end."""
    identity = attack.identity(x)
    shift, first, second = (torch.zeros_like(identity) for _ in range(3))

    def constrain(shift: Tensor) -> Tensor:
        return (attack.valid(identity + shift) - identity).clamp(-attack.bound, attack.bound)

    for step in range(1, attack.steps + 1):
        shift = constrain(shift).requires_grad_()
        loss = -margin(model(attack.apply(x, identity + shift)), y).sum() + attack.tau * roughness(shift).sum()
        (gradient,) = torch.autograd.grad(loss, shift)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
        shift = shift.detach() - attack.lr * mean / (square.sqrt() + 1e-8)
    return attack.apply(x, identity + constrain(shift)).clamp(0, 1)


def test_a_batch_is_searched_as_its_images_one_by_one_by_the_letter(
    net: tuple[nn.Module, Tensor, Tensor], attack: FunctionalAttack
) -> None:
    model, x, y = net
    found = attack(model, x[:3], y[:3], ANY)
    for i in range(3):
        expected = literal_search(model, x[i : i + 1], y[i : i + 1], attack)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=0, atol=2e-5)
    assert (found - x[:3]).abs().max() > 1e-3


@pytest.mark.slow
def test_the_margin_rises_with_steps_and_with_the_bound(
    net: tuple[nn.Module, Tensor, Tensor], attack: FunctionalAttack
) -> None:
    model, x, y = net

    def reached(**changes: float) -> float:
        changed = type(attack)(**(attack.model_dump(exclude={"kind"}) | {"tau": 0.0} | changes))
        return margin(model(changed(model, x[:3], y[:3], ANY)), y[:3]).mean().item()

    by_steps = [reached(steps=steps) for steps in (0, 2, 5, 10, 20)]
    assert all(b > a for a, b in itertools.pairwise(by_steps))
    by_bound = [reached(bound=attack.bound * part, lr=10 * attack.lr) for part in (0, 0.1, 0.3, 1)]
    assert all(b > a for a, b in itertools.pairwise(by_bound))


def test_defaults_are_the_sources(attack: FunctionalAttack) -> None:
    expected = {"stadv": (20, 0.05, 0.01, 0.05), "recoloradv": (20, 0.06, 0.001, 0.06)}[attack.kind]
    assert (attack.steps, attack.bound, attack.lr, attack.tau) == expected


def test_gradients_that_are_not_finite_are_said_to_be(attack: FunctionalAttack) -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x).flatten(1).sum(1, keepdim=True).sqrt() * torch.ones(3)

    x = torch.rand(2, 3, 8, 8)
    with pytest.raises(FloatingPointError, match=rf"{attack.kind}: the gradients .* not finite"):
        attack(Broken(), x, torch.tensor([0, 1]), ANY)


# -- StAdv -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 14), (3, 224, 224)])
def test_the_zero_flow_is_the_identity(shape: tuple[int, ...]) -> None:
    x = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 2))
    y = torch.tensor([0, 1])
    for still in (StAdv(steps=0), StAdv(steps=2, bound=0)):
        torch.testing.assert_close(still(model, x, y, ANY), x, rtol=0, atol=5e-5)
    wide = StAdv(steps=0)(model.double(), x.double(), y, ANY)
    torch.testing.assert_close(wide, x.double(), rtol=0, atol=1e-12)


def test_a_flow_of_two_over_the_width_is_one_pixel() -> None:
    """align_corners=False: [-1, 1] spans all W pixels, so that .05 is .8 pixels at 32. Zeros come in from outside."""
    attack, x = StAdv(), torch.rand(1, 3, 6, 10, dtype=torch.float64)
    identity = attack.identity(x)
    right = attack.apply(x, identity + torch.tensor([2 / 10, 0], dtype=torch.float64))
    torch.testing.assert_close(right[..., :-1], x[..., 1:])
    assert right[..., -1].abs().max() < 1e-12
    down = attack.apply(x, identity + torch.tensor([0, 0.4 * 2 / 6], dtype=torch.float64))
    torch.testing.assert_close(down[:, :, :-1], 0.6 * x[:, :, :-1] + 0.4 * x[:, :, 1:])


class Ramp(nn.Module):
    """Logits (0, 100 sum of s_j * pixel_j): on an image that rises from left to right the flow wants to go along s."""

    def __init__(self, signs: Tensor) -> None:
        super().__init__()
        self.signs = nn.Parameter(signs)

    def forward(self, x: Tensor) -> Tensor:
        score = 100 * (x * self.signs).flatten(1).sum(1)
        return torch.stack([torch.zeros_like(score), score], dim=1)


def displacements(tau: float, signs: Tensor) -> Tensor:
    """How many pixels StAdv moved each place of a 32x32 ramp of slope 1/64, at least two pixels from the border."""
    ramp = (torch.arange(32, dtype=torch.float64) / 64 + 0.2).expand(1, 1, 32, 32)
    found = StAdv(tau=tau)(Ramp(signs), ramp, torch.zeros(1, dtype=torch.int64), ANY)
    return (64 * (found - ramp))[0, 0, 2:-2, 2:-2]


def test_the_flow_reaches_its_bound_and_no_further() -> None:
    signs = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sign()
    torch.testing.assert_close(displacements(0, signs), 0.8 * signs[2:-2, 2:-2], rtol=1e-6, atol=0)


def test_tau_smooths_the_flow() -> None:
    """Displacements weighed more by neighbours than by the loss agree with their neighbours."""
    signs = torch.randn(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rough = [displacements(tau, signs).diff().abs().mean().item() for tau in (0.0, 5.0, 50.0)]
    assert rough[1] < 0.7 * rough[0]
    assert rough[2] < 0.2 * rough[0]


# -- ReColorAdv --------------------------------------------------------------------------------------------------------

# sRGB colours and their published CIELUV values for D65 (L, u, v), to the white point's and the matrix's few digits
REFERENCE = {
    (1, 1, 1): (100, 0, 0),
    (0, 0, 0): (0, 0, 0),
    (1, 0, 0): (53.24, 175.01, 37.76),
    (0, 1, 0): (87.73, -83.08, 107.40),
    (0, 0, 1): (32.30, -9.40, -130.34),
    (1, 1, 0): (97.14, 7.71, 106.78),
    (0, 1, 1): (91.11, -70.48, -15.21),
    (1, 0, 1): (60.32, 84.07, -108.68),
    (0.5, 0.5, 0.5): (53.39, 0, 0),
    (119 / 255, 119 / 255, 119 / 255): (50.03, 0, 0),
}


@pytest.mark.parametrize("rgb", REFERENCE)
def test_colours_have_their_published_coordinates(rgb: tuple[float, ...]) -> None:
    lightness, u, v = REFERENCE[rgb]
    found = rgb_to_luv(torch.tensor(rgb, dtype=torch.float64))
    assert found[0] * 100 == pytest.approx(lightness, abs=0.02)
    assert found[1] * 200 - 100 == pytest.approx(u, abs=0.15)
    assert found[2] * 200 - 100 == pytest.approx(v, abs=0.15)


def test_colours_survive_the_way_there_and_back() -> None:
    levels = torch.linspace(0, 1, 18, dtype=torch.float64)
    rgb = torch.cartesian_prod(levels, levels, levels)
    torch.testing.assert_close(luv_to_rgb(rgb_to_luv(rgb)), rgb, rtol=0, atol=2e-8)
    single = rgb.float()
    torch.testing.assert_close(luv_to_rgb(rgb_to_luv(single)), single, rtol=0, atol=2e-5)


def test_colours_that_srgb_lacks_become_some_that_it_has_with_finite_gradients() -> None:
    levels = torch.linspace(0, 1, 12)
    luv = torch.cartesian_prod(levels, levels, levels).requires_grad_()
    rgb = luv_to_rgb(luv)
    assert ((rgb >= 0) & (rgb <= 1)).all()
    (gradient,) = torch.autograd.grad(rgb.sum(), luv)
    assert gradient.isfinite().all()
    for shade in (0.0, 1e-4, 0.5, 1.0):
        luv = rgb_to_luv(torch.full((3,), shade)).requires_grad_()
        (gradient,) = torch.autograd.grad(luv_to_rgb(luv).sum(), luv)
        assert gradient.isfinite().all()


def literal_recolor(luv: Tensor, grid: Tensor) -> Tensor:
    """One colour (3,) through a grid (n1, n2, n3, 3): the eight corners of its cell by hand."""
    sizes = torch.tensor(grid.shape[:3])
    place = luv.clamp(0, 1) * (sizes - 1)
    low = place.floor().long().clamp(max=sizes - 2)
    part = place - low
    out = torch.zeros(3, dtype=grid.dtype)
    for corner in itertools.product((0, 1), repeat=3):
        weight = math.prod(part[a] if corner[a] else 1 - part[a] for a in range(3))
        out = out + weight * grid[tuple(low[a] + corner[a] for a in range(3))]
    return out


def test_colours_go_through_the_grid_by_the_letter() -> None:
    """Saturated ones, which lie outside of the cube, take the value at its surface."""
    attack = ReColorAdv()
    x = torch.rand(2, 3, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :, 0, 0] = torch.tensor([1.0, 0.0, 0.0])
    identity = attack.identity(x)
    grid = identity + 0.05 * torch.randn(2, *identity.shape[1:], dtype=torch.float64)
    found = attack.apply(x, grid)
    for i, row, column in itertools.product(range(2), range(3), range(4)):
        expected = luv_to_rgb(literal_recolor(rgb_to_luv(x[i, :, row, column]), grid[i]))
        torch.testing.assert_close(found[i, :, row, column], expected, rtol=0, atol=1e-9)


def test_the_identity_changes_muted_colours_by_nothing_and_those_at_the_limits_of_srgb_by_little() -> None:
    """Nodes of the grid that sRGB lacks are moved to colours that it has, and a colour beside them moves along. On
    CIFAR-10 that is 0.0007 on average and 0.03 for the worst pixel of an image."""
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    muted = 0.35 + 0.3 * x
    model, y = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), torch.tensor([0, 1])
    for still in (ReColorAdv(bound=0), ReColorAdv(steps=0)):
        torch.testing.assert_close(still(model, muted, y, ANY), muted, rtol=0, atol=2e-5)
    change = (ReColorAdv(steps=0)(model, x, y, ANY) - x).abs()
    assert 0.005 < change.mean() < 0.02  # a third of uniformly random colours are near a limit


def test_no_colour_changes_by_more_than_the_bound(net: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Measured in the colours sRGB has, away from its limits; a fast walk reaches the bound."""
    model, x, y = net
    muted = 0.3 + 0.4 * x
    found = ReColorAdv(lr=0.02, tau=0)(model, muted, y, ANY)
    before, after = (rgb_to_luv(part.permute(0, 2, 3, 1)) for part in (muted, found))
    size = (after - before).abs().amax()
    assert 0.05 < size <= 0.06 + 1e-6


def test_one_colour_becomes_one_colour(net: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Wherever it is in the image; in another image perhaps another one."""
    model, x, y = net
    x = x.clone()
    places = [(0, 0), (5, 11), (15, 2)]
    for row, column in places:
        x[:, :, row, column] = torch.tensor([0.4, 0.5, 0.6], dtype=torch.float64)
    found = ReColorAdv(lr=0.01)(model, x, y, ANY)
    seen = torch.stack([found[:, :, row, column] for row, column in places])
    torch.testing.assert_close(seen, seen[:1].expand_as(seen), rtol=0, atol=1e-12)
    assert (seen[0, 0] - seen[0, 1]).abs().max() > 1e-3


def test_grey_images_have_no_colours_to_change() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(UserError, match=r"recoloradv changes colours: it needs images of 3 channels, not 1"):
        ReColorAdv()(model, torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), ANY)


def test_autocast_touches_the_model_alone(attack: FunctionalAttack) -> None:
    """bf16 has 8 bits: it would move colours and places by visible steps."""
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model, y = nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), torch.tensor([0, 1])
    still = type(attack)(steps=0)
    with torch.autocast("cpu", torch.bfloat16):
        found = still(model, x, y, ANY)
        moved = attack(model, x, y, ANY)
    assert torch.equal(found, still(model, x, y, ANY))
    assert moved.dtype == torch.float32
