"""SparseFool: planes crossed in closed form as the published loop crosses them, the whole attack image by image."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from helpers.problems import recorded
from rome.attacks import SparseFool
from rome.attacks.free import changed_pixels
from rome.attacks.lp.sparsefool import _Searches, cross_plane
from rome.threats import AnyImage

L0 = AnyImage(label="l0")


def literal_cross_plane(x: Tensor, normal: Tensor, point: Tensor) -> Tensor:
    """The published loop, one image (D,): one coordinate after the other until the sign of the offset changes."""
    left, at = normal.clone(), x.clone()
    sign = torch.sign(normal @ (x - point))
    now = sign
    while now == sign and bool((left != 0).any()):
        j = int(left.abs().argmax())
        distance = (normal @ (at - point) + 0.001 * sign).abs() / left[j].abs()
        at[j] = (at[j] + distance.clamp(min=1e-4) * left[j].sign()).clamp(0, 1)
        now = torch.sign(normal @ (at - point))
        left[j] = 0
    return at


def literal_sparsefool(model: nn.Module, x: Tensor, y: int, attack: SparseFool) -> Tensor:
    """One image (1, C, H, W), every class gradient by a backward of its own."""

    def logits_and_jacobian(at: Tensor) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_()
        z = model(at)[0]
        return z.detach(), torch.stack([torch.autograd.grad(one, at, retain_graph=True)[0] for one in z])

    result = x.clone()
    for _ in range(attack.steps):
        if int(model(result).argmax()) != y:
            break
        at, target = result.clone(), y
        for _ in range(attack.deepfool_steps):
            z, jacobian = logits_and_jacobian(at)
            if int(z.argmax()) != y:
                target = int(z.argmax())
                break
            steps = {}
            for k in range(len(z)):
                if k != y:
                    w = jacobian[k] - jacobian[y]
                    steps[k] = ((z[k] - z[y]).abs() / w.norm(), (z[k] - z[y]).abs() * w / w.norm() ** 2)
            target = min(steps, key=lambda k: float(steps[k][0]))
            at = (at + (1 + attack.deepfool_overshoot) * steps[target][1]).clamp(0, 1)
        origin = x if attack.solve_from == "clean" else result
        beyond = origin + attack.lam * (at - origin)
        z, jacobian = logits_and_jacobian(beyond)
        aim = int(z.argmax()) if int(z.argmax()) != y else target
        w = jacobian[aim] - jacobian[y]
        crossed = literal_cross_plane(origin.flatten(), (w / w.norm()).flatten(), beyond.flatten()).view_as(x)
        result = (origin + (1 + attack.overshoot) * (crossed - origin)).clamp(0, 1)
    return result


# -- crossing the plane ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [-3.0, -0.3, -0.01, -1e-4, 1e-4, 0.01, 0.3, 3.0])
@pytest.mark.parametrize("heavy", [False, True])
def test_crossing_a_plane_is_the_published_loop(distance: float, heavy: bool) -> None:
    """Below and above the plane; a third of the coordinates at a bound; with heavy tails some weights are tiny."""
    g = torch.Generator().manual_seed(int(1000 * abs(distance)) + heavy)
    x = (1.6 * torch.rand(12, 40, generator=g, dtype=torch.float64) - 0.3).clamp(0, 1)
    w = torch.randn(12, 40, generator=g, dtype=torch.float64)
    w = w**5 if heavy else w
    w[:, ::11] = 0
    w = w / w.norm(dim=1, keepdim=True)
    point = x - distance * w
    found = cross_plane(x, w, point)
    expected = torch.stack([literal_cross_plane(*row) for row in zip(x, w, point, strict=True)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_cases_above_do_reach_all_ends_of_the_loop() -> None:
    """One coordinate, several, a plane out of reach, and above the plane coordinates that the box does not stop."""
    x = torch.full((5, 4), 0.5, dtype=torch.float64)
    w = torch.tensor([0.8, 0.5, -0.3, 0.1], dtype=torch.float64).expand(5, 4)
    w = w / w.norm(dim=1, keepdim=True)
    a = w[0].abs()
    offsets = torch.tensor([-0.2 * a[0], -0.5 * a[0] - 0.2 * a[1], -9.0, 0.01, 9.0], dtype=torch.float64)
    moves = (cross_plane(x, w, x - offsets[:, None] * w) - x) * w.sign()
    beyond = 0.001
    torch.testing.assert_close(moves[0], torch.stack([0.2 + beyond / a[0], *torch.zeros(3).double()]))
    second = torch.stack([torch.tensor(0.5).double(), 0.2 + beyond / a[1], *torch.zeros(2).double()])
    torch.testing.assert_close(moves[1], second)
    assert torch.equal(moves[2], torch.full_like(moves[2], 0.5))
    doubling = torch.tensor([0.011, 0.022, 0.044, 0.088], dtype=torch.float64) / a
    torch.testing.assert_close(moves[3], doubling.clamp(max=0.5))
    assert torch.equal(moves[4], torch.full_like(moves[4], 0.5))


def test_no_gradient_no_movement() -> None:
    x = torch.rand(2, 5)
    assert torch.equal(cross_plane(x, torch.zeros(2, 5), x + 1), x)


# -- the whole attack --------------------------------------------------------------------------------------------------


class TwoClasses(nn.Module):
    """Logits (0, <w, x> - <w, 1/2> - gap): label 0 where the image is grey."""

    def __init__(self, w: Tensor, gap: float) -> None:
        super().__init__()
        self.w, self.gap = nn.Parameter(w), gap

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) - 0.5) @ self.w - self.gap
        return torch.stack([torch.zeros_like(score), score], dim=1)


@pytest.mark.parametrize("lam", [1.0, 3.0])
def test_on_a_linear_model_it_changes_as_few_coordinates_as_can_be(lam: float) -> None:
    """A grey image: n coordinates move the score by at most half the sum of the n largest weights. With lambda = 1 (and
    DeepFool's overshoot) the count is the least that any attack needs; lambda aims that many times as far."""
    w = torch.linspace(1, 2, 64, dtype=torch.float64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    reach = w.sort(descending=True).values.cumsum(0) / 2
    for gap in (1.2, 2.4, 5.3):
        x, y = torch.full((1, 1, 8, 8), 0.5, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        found = SparseFool(lam=lam).run(TwoClasses(w, gap), x, y, L0)
        assert not found.robust.any()
        changed = int(changed_pixels(found.images, x))
        assert changed == int((reach < lam * 1.02 * gap).sum()) + 1
        if lam == 1:
            assert changed == int((reach < gap).sum()) + 1  # fewer cannot do
        else:
            assert changed > int((reach < gap).sum()) + 1


@pytest.mark.slow
@pytest.mark.parametrize("solve_from", ["clean", "previous"])
def test_a_batch_is_attacked_as_its_images_one_by_one_by_the_letter(
    digits64: tuple[nn.Module, Tensor, Tensor], solve_from: str
) -> None:
    model, x, y = digits64
    attack = SparseFool(steps=4, solve_from=solve_from)
    found = attack.run(model, x[:16], y[:16], L0)
    for i in range(16):
        expected = literal_sparsefool(model, x[i : i + 1], int(y[i]), attack)
        torch.testing.assert_close(found.images[i : i + 1], expected, rtol=0, atol=1e-7)
        assert bool(found.robust[i]) == (int(model(expected).argmax()) == int(y[i]))
    assert torch.equal(found.images[7], x[7])  # wrong from the start


def test_more_rounds_keep_what_is_fooled_and_fool_more(digits64: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits64
    robust = [SparseFool(steps=steps).run(model, x, y, L0).robust for steps in (0, 1, 2, 4, 8)]
    assert torch.equal(robust[0], model(x).argmax(1) == y)
    assert all(bool((~(later & ~earlier)).all()) for earlier, later in itertools.pairwise(robust))
    assert robust[-1].sum() < robust[0].sum()
    assert torch.equal(SparseFool(steps=0)(model, x, y, L0), x)


def test_from_the_previous_image_it_fools_as_many_in_fewer_pixels(digits64: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Planes then lie where the solver starts. From the clean image some lie behind it, and all pixels are used."""
    model, x, y = digits64
    sparse, clean = (SparseFool(steps=30, solve_from=origin).run(model, x, y, L0) for origin in ("previous", "clean"))
    assert sparse.robust.sum() <= clean.robust.sum()
    assert changed_pixels(sparse.images, x).sum() < changed_pixels(clean.images, x).sum()


def test_images_that_are_done_are_not_computed_again(digits64: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits64
    wrong = torch.tensor([7, 7, 7])
    with recorded(model) as calls:
        SparseFool()(model, x[wrong], y[wrong], L0)
    assert [len(images) for images in calls.forwards] == [3]
    assert not calls.backwards
    with recorded(model) as calls:
        SparseFool(steps=1, deepfool_steps=1, candidates=4, spread=None)(model, x[[0, 7]], y[[0, 7]], L0)
    assert [len(images) for images in calls.forwards] == [2, 1, 1]  # who is wrong, DeepFool's step, the normal
    assert calls.backwards == [1, 1, 1, 1]  # three other candidates, the normal


def test_a_walk_that_rounding_stops_ends() -> None:
    """Where no gradient leads on, all 50 steps would stand still."""

    class Flat(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 0 * x.flatten(1)[:, :3] + torch.tensor([1.0, 0.0, 0.5])

    model, x = Flat(), torch.rand(2, 1, 3, 3)
    with recorded(model) as calls:
        found = SparseFool(steps=1).run(model, x, torch.zeros(2, dtype=torch.int64), L0)
    assert torch.equal(found.images, x)
    assert found.robust.all()
    assert len(calls.forwards) == 3  # a step, the normal, the verdict


def test_candidates_are_the_classes_with_the_highest_logits(digits64: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits64
    every, ten = (SparseFool(steps=2, candidates=n)(model, x, y, L0) for n in (None, 10))
    assert torch.equal(every, ten)
    now = _Searches(x, model(x).argmax(1))
    _, ready = SparseFool(candidates=2)._evaluate(model, now)
    assert ready.all()
    assert torch.equal(now.nearest, model(x).topk(2, dim=1).indices[:, 1])


class Planes(nn.Module):
    """Three classes whose gradients are ``slopes`` long, at right angles; class 0 leads by 1 and by ``lead``."""

    def __init__(self, slopes: tuple[float, float], lead: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.diag(torch.tensor(slopes, dtype=torch.float64)))
        self.bias = torch.tensor([1, lead], dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        score = (x.flatten(1) - 0.5) @ self.w - self.bias
        return torch.cat([torch.zeros_like(score[:, :1]), score], dim=1)


@pytest.mark.parametrize(
    ("slopes", "lead", "spread", "backwards", "nearest"),
    [
        ((4.0, 4.0), 1.9, 2, 2, 1),  # could be nearer if its gradient were twice as long: looked at
        ((4.0, 4.0), 2.1, 2, 1, 1),  # not even then
        ((4.0, 4.0), 2.1, None, 2, 1),
        ((4.0, 7.9), 1.9, 2, 2, 2),  # and it is
        ((4.0, 7.9), 1.9, 1, 1, 1),  # a spread that is too small takes the wrong one
    ],
)
def test_only_gradients_of_classes_that_could_be_nearest_are_computed(
    slopes: tuple[float, float], lead: float, spread: float | None, backwards: int, nearest: int
) -> None:
    model, x = Planes(slopes, lead), torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    now = _Searches(x, torch.tensor([0]))
    with recorded(model) as calls:
        SparseFool(spread=spread)._evaluate(model, now)
    assert len(calls.backwards) == backwards
    assert now.nearest.tolist() == [nearest]
    expected = torch.zeros(2, dtype=torch.float64)
    expected[nearest - 1] = (1, lead)[nearest - 1] / slopes[nearest - 1]
    torch.testing.assert_close((now.distance.view(-1, 1, 1, 1) * now.normal).flatten(), expected)


@pytest.mark.parametrize(("length", "backwards"), [(0.0, 2), (5.0, 1), (6.3, 1), (6.4, 2), (9.0, 2)])
def test_a_gradient_that_was_needed_before_is_known_to_be_about_as_long(length: float, backwards: int) -> None:
    """The first boundary is 1/4 away, the second 2.4/4: nearer only if its gradient were 9.6 = 1.5 * 6.4 long."""
    model, x = Planes((4.0, 4.0), 2.4), torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    now = _Searches(x, torch.tensor([0]))
    now.allocate(3)
    now.lengths[0, 2] = length + 1e-6
    if not length:
        now.lengths[0, 2] = 0
    with recorded(model) as calls:
        SparseFool(spread=3, drift=1.5)._evaluate(model, now)
    assert len(calls.backwards) == backwards
    longest = [0, 4, max(length + 1e-6, 4) if length else 4]
    assert now.lengths[0].tolist() == pytest.approx(longest if backwards == 2 else [0, 4, length + 1e-6])


def test_classes_that_are_ruled_out_would_not_have_been_nearest(digits64: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = digits64
    passes, images = [], []
    for spread in (None, SparseFool().spread):
        with recorded(model) as calls:
            images.append(SparseFool(spread=spread)(model, x, y, L0))
        passes.append(sum(map(len, calls.forwards)) + sum(calls.backwards))
    torch.testing.assert_close(*images, rtol=0, atol=1e-7)
    assert passes[1] < passes[0]


def test_no_image_waits_for_the_slowest(digits64: tuple[nn.Module, Tensor, Tensor]) -> None:
    """A forward looks at one point of every search; no more than half of them wait there for another gradient."""
    model, x, y = digits64
    alone = []
    for i in range(20):
        with recorded(model) as calls:
            SparseFool()(model, x[i : i + 1], y[i : i + 1], L0)
        alone.append(len(calls.forwards))
    with recorded(model) as calls:
        SparseFool()(model, x[:20], y[:20], L0)
    assert max(alone) <= len(calls.forwards) < sum(alone)
    assert sum(map(len, calls.forwards)) <= 2 * sum(alone)


def test_gradients_that_are_not_finite_are_said_to_be() -> None:
    """Torch's sign of NaN is 0: the images would come back as if nothing could be found."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([x.flatten(1).sum(1), (x[:, 0, 0, 0] - x[:, 0, 0, 0]).sqrt()], dim=1)

    with pytest.raises(FloatingPointError, match="non-finite images for 2 of 2 examples"):
        SparseFool()(Broken(), torch.rand(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), L0)


def test_compiled_models_are_run_uncompiled() -> None:
    """Compiled graphs free their buffers in the first of the several backwards."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    compiled = copy.deepcopy(model)
    compiled.compile(backend="aot_eager")
    x = torch.rand(5, 3, 2, 2)
    y = model(x).argmax(1)
    assert torch.equal(SparseFool()(compiled, x, y, L0), SparseFool()(model, x, y, L0))
