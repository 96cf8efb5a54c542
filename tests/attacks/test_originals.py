"""The unseen attacks beside the packages they were published in, from the same random numbers: `make test-originals`.

Where an original does something else than it says, the test mends that one thing and asks for equality; what was mended
is what ``docs/decisions/unseen-transforms.md`` and ``perceptual.md`` list.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.attacks import JPEG, LPA, PPGD, Attack, Elastic, FastLPA, Fog, Gabor, ReColorAdv, Snow, SparseFool, StAdv
from rome.attacks.base import Group
from rome.attacks.free import Form
from rome.attacks.perceptual.fast_lpa import gaussian
from rome.attacks.perceptual.features import measure
from rome.attacks.perceptual.ppgd_lpa import _Space
from rome.attacks.transforms.base import TransformAttack
from rome.attacks.transforms.gabor import DRAWS as GABOR_DRAWS
from rome.attacks.transforms.gabor import gabor_kernels
from rome.attacks.transforms.recolor import NODES
from rome.attacks.transforms.snow import DRAWS as SNOW_DRAWS
from rome.attacks.transforms.snow import line_kernels
from rome.threats import AnyImage, Perceptual, Threat

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from originals import OnCPU, installed, original

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        not all(map(installed, ("advex_uar", "perceptual_advex", "recoloradv", "torchattacks"))),
        reason="the originals are not installed (make test-originals)",
    ),
]
ANY = AnyImage(label="any")
N = 4


class Net(nn.Module):
    """A smooth network with the interface of perceptual-advex's ``FeatureModel``, and layers that ours finds."""

    feature_layers = ("one", "two")

    def __init__(self, seed: int = 0, scale: float = 3.0, side: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.one = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Softplus())
            self.two = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Softplus())
            self.head = nn.Linear(2 * side * side, 4)
        self.scale = scale
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.one(8 * (x - 0.5))
        return first, self.two(first)

    def features_logits(self, x: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        found = self.features(x)
        return found, self.scale * self.head(found[1].flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.features_logits(x)[1]


@pytest.fixture
def batch() -> tuple[nn.Module, Tensor, Tensor]:
    """A network and smooth images of 32 pixels that it classifies as labelled."""
    model = Net()
    coarse = torch.rand(N, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    x = F.interpolate(coarse, size=32, mode="bicubic").clamp(0.02, 0.95)
    return model, x, model(x).argmax(1)


@pytest.fixture(autouse=True)
def same_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both convolve in the layout that the images have: another one rounds otherwise, and the sign of a gradient that
    is nearly zero moves a variable by a whole step."""
    monkeypatch.setattr("rome.attacks.engine.channels_last_pays", lambda *_: False)


@pytest.fixture
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Kang et al. ----------------------------------------------------------------------------------------------------------


def published(
    name: str,
    attack: TransformAttack,
    batch: tuple[nn.Module, Tensor, Tensor],
    start: Callable[[slice], Any],
    **mend: Any,
) -> Tensor:
    """advex-uar's attack as perceptual-advex calls it, image by image, from the start given for each; in its published
    form the whole batch at once.

    ``mend``: other methods to replace, name to what is called with the rows first; ``corners`` and ``roll`` go to
    :class:`OnCPU`.
    """
    wrapper = original("perceptual_advex.attacks")
    module = original(f"advex_uar.attacks.{name.split('_')[0]}_attack")
    (kind,) = (value for key, value in vars(module).items() if key.lower() == f"{name.split('_')[0]}attack")
    model, x, y = batch
    mode, found = OnCPU(corners=mend.pop("corners", False), roll=mend.pop("roll", False)), []
    size = len(x) if attack.form == "published" else 1
    for rows in (slice(i, i + size) for i in range(0, len(x), size)):
        with ExitStack() as stack:
            stack.enter_context(mode)
            stack.enter_context(mock.patch.object(kind, "_init", lambda *_, rows=rows: start(rows)))
            for key, replacement in mend.items():
                where = kind if hasattr(kind, key) else module
                stack.enter_context(mock.patch.object(where, key, replacement(rows, getattr(where, key))))
            step = attack.default_step() if attack.step_size is None else attack.step_size
            theirs = wrapper.UARAttack(model, "cifar", name, attack.bound, num_iterations=attack.steps, step=step)
            found.append(theirs(x[rows].clone(), y[rows]))
    return torch.cat(found)


def noise_for(attack: TransformAttack, x: Tensor) -> Tensor:
    return torch.rand(len(x), *attack.noise_shape(x.shape[1:]), generator=torch.Generator().manual_seed(2)).to(x)


forms = pytest.mark.parametrize("form", ["corrected", "published"])
"""The published form equals the original as it is; the corrected one once it is mended."""


@forms
@pytest.mark.parametrize("steps", [1, 5])
def test_elastic(steps: int, form: Form, batch: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Mended: corners are aligned, as they were in its torch."""
    attack, (model, x, y) = Elastic(steps=steps, form=form), batch
    noise = noise_for(attack, x)
    flow = (2 * noise - 1) * attack.bound * 2 / 32
    corners = form == "corrected"
    theirs = published("elastic", attack, batch, lambda rows: flow[rows].clone().requires_grad_(), corners=corners)
    torch.testing.assert_close(attack.last(model, x, y, noise), theirs, rtol=0, atol=1e-5)


@forms
@pytest.mark.parametrize("steps", [1, 5])
def test_jpeg(steps: int, form: Form, batch: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Mended: its first forward, too, is at the start, which it multiplies by the bound a second time there."""
    attack, (model, x, y) = JPEG(steps=steps, form=form), batch
    noise = noise_for(attack, x)

    def start(rows: slice) -> Tensor:
        """Theirs goes through the columns of a transposed image."""
        planes = zip(torch.split(2 * noise[rows] - 1, [1024, 256, 256], dim=1), (4, 2, 2), strict=True)
        blocks = [plane.view(-1, side, side, 8, 8).permute(0, 2, 1, 4, 3).flatten(1) for plane, side in planes]
        return (attack.bound * torch.cat(blocks, dim=1)).requires_grad_()

    def at_the_start(rows: slice, compressed: Any) -> Any:
        calls = iter([True])

        def call(self: Any, images: Tensor, variables: Tensor, eps: Tensor, *rest: int) -> Any:
            return compressed(self, images, variables / eps[:, None] if next(calls, False) else variables, eps, *rest)

        return call

    mend = {"_jpeg_cat": at_the_start} if form == "corrected" else {}
    theirs = published("jpeg_linf", attack, batch, start, **mend)
    torch.testing.assert_close(attack.last(model, x, y, noise), theirs, rtol=0, atol=1e-5)


@forms
@pytest.mark.parametrize("steps", [1, 5])
def test_fog(steps: int, form: Form, batch: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Mended: image by image, and rolled by one."""
    attack, (model, x, y) = Fog(steps=steps, form=form), batch
    noise = noise_for(attack, x)
    sides = [2**level for level in range(6) for _ in range(3)]

    def start(rows: slice) -> list[Tensor]:
        parts = torch.split(noise[rows], [side * side for side in sides], dim=1)
        return [part.view(-1, side, side).clone().requires_grad_() for part, side in zip(parts, sides, strict=True)]

    theirs = published("fog", attack, batch, start, roll=form == "corrected")
    torch.testing.assert_close(attack.last(model, x, y, noise), theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
def test_gabor(steps: int, batch: tuple[nn.Module, Tensor, Tensor], doubles: None) -> None:
    """With its inverted mask."""
    attack = Gabor(steps=steps, form="published")
    model, x, y = batch[0].double(), batch[1].double(), batch[2]
    noise = noise_for(attack, x)
    sparse = attack.prepare(x, noise).start[:, None]
    theirs = published(
        "gabor",
        attack,
        (model, x, y),
        lambda rows: (sparse[rows].clone().requires_grad_(), (sparse[rows] == 0).double()),
        _get_gabor_kernel=lambda rows, _: lambda *_: gabor_kernels(noise[rows, :GABOR_DRAWS])[:, None],
    )
    torch.testing.assert_close(attack.last(model, x, y, noise), theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("angle", [0.3, 1.1])
def test_gabor_kernels(angle: float) -> None:
    """Their 23 x 23 numbers, for 3 sides."""
    theirs = original("advex_uar.attacks.gabor").get_gabor_with_sides(
        23, torch.tensor([0.25]), torch.tensor([4.0]), torch.tensor([angle]), 3
    )
    draws = torch.tensor([[0.25, 0.5, 1 / 2.75, angle / math.pi]])
    torch.testing.assert_close(gabor_kernels(draws)[0], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("steps", [1, 5])
def test_snow(steps: int, batch: tuple[nn.Module, Tensor, Tensor], doubles: None) -> None:
    """Its forwards, the last one too, are at intensities not yet brought into their range; one draw of kernels a batch,
    so here one image."""
    attack = Snow(steps=steps, form="published")
    model, x, y = batch[0].double(), batch[1].double(), batch[2]
    noise = noise_for(attack, x)
    for rows in (slice(i, i + 1) for i in range(len(x))):
        start = attack.prepare(x[rows], noise[rows]).start
        kernels = line_kernels(noise[rows, :SNOW_DRAWS])
        theirs = published(
            "snow",
            attack,
            (model, x[rows], y[rows]),
            lambda _, start=start: start.clone().requires_grad_(),
            make_kernels=lambda *_, kernels=kernels: lambda: [kernels[:, j : j + 1] for j in range(7)],
        )
        torch.testing.assert_close(attack.last(model, x[rows], y[rows], noise[rows]), theirs, rtol=0, atol=1e-9)


# Functional attacks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_stadv(steps: int, batch: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = batch
    with OnCPU():
        theirs = original("perceptual_advex.attacks").StAdvAttack(model, num_iterations=steps)(x, y).detach()
    ours = StAdv(steps=steps)(model, x, y, ANY)
    assert (ours - x).abs().mean() > 0.02
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
    assert (ours - theirs).abs().mean() < 1e-5


def test_recoloradv(batch: tuple[nn.Module, Tensor, Tensor]) -> None:
    """Its matrix to sRGB is rounded to four digits, and Adam's first step is the sign of however small a gradient."""
    model, x, y = batch
    with OnCPU():
        theirs = original("perceptual_advex.attacks").ReColorAdvAttack(model, num_iterations=20)(x, y).detach()
    ours = ReColorAdv()(model, x, y, ANY)
    moved = (ours - x).abs().mean()
    assert (ours - theirs).abs().mean() < 0.1 * moved
    losses = [F.cross_entropy(model(images), y) for images in (x, ours, theirs)]
    assert abs(losses[1] - losses[2]) < 0.05 * (losses[1] - losses[0])


def test_the_colours_of_recoloradv() -> None:
    """The transform and its constraints alone."""
    spaces, transformers = original("recoloradv.color_spaces"), original("recoloradv.color_transformers")
    attack, space = ReColorAdv(), spaces.CIELUVColorSpace()
    g = torch.Generator().manual_seed(0)
    x = torch.rand(3, 3, 10, 10, generator=g)
    identity = attack.identity(x)
    shift = 0.1 * torch.randn(3, *identity.shape[1:], generator=g)
    sizes = dict(zip(("resolution_x", "resolution_y", "resolution_z"), NODES, strict=True))
    theirs = transformers.FullSpatial(shape=x.shape, manual_gpu=False, cspace=space, **sizes)
    theirs.xform_params.data.copy_(identity + shift)
    theirs.project_params("inf", attack.bound)
    shift = attack.prepare(x, x).project(shift)
    torch.testing.assert_close(identity + shift, theirs.xform_params.data, rtol=0, atol=2e-4)
    changed = space.to_rgb(theirs(space.from_rgb(x))).detach()
    difference = (attack.apply(x, identity + shift) - changed).abs()
    assert float(difference.max()) < 3e-3
    assert float(difference.mean()) < 2e-4


# Perceptual attacks ---------------------------------------------------------------------------------------------------

OWN, OTHER = Net(0, 30.0, 16).double(), Net(1, 30.0, 16).double()
"""Large logits, so that PPGD's conjugate gradients, which end there where a residual is small, do not end early."""
SMALL, FLAT = Net(0, 3.0, 16).double(), Net(0, 1e-6, 16).double()


@pytest.fixture
def seen(doubles: None) -> tuple[Tensor, Tensor, Tensor]:
    """Images inside the box that OWN gets right, labels, and noise for the start."""
    g = torch.Generator().manual_seed(1)
    x = 0.1 + 0.8 * torch.rand(N, 3, 16, 16, generator=g)
    return x, OWN(x).argmax(1), torch.rand(x.shape, generator=g)


def threats(bound: float) -> list[tuple[Perceptual, nn.Module]]:
    return [(Perceptual(bound=bound), OWN), (Perceptual(bound=bound, features="x").measured_by(OTHER), OTHER)]


def from_noise(
    make: Callable[[], nn.Module], x: Tensor, y: Tensor, noise: Tensor, size: int = 1, **mend: bool
) -> Tensor:
    """An attack of perceptual-advex on batches of so many images, started from this noise."""
    found = []
    for rows in (slice(i, i + size) for i in range(0, len(x), size)):
        draw = gaussian(noise[rows])
        normal = mock.patch.object(torch.Tensor, "normal_", lambda self, mean, std, d=draw: self.copy_(std * d))
        with OnCPU(**mend), normal:
            found.append(make()(x[rows].clone(), y[rows]).detach())
    return torch.cat(found)


def ours(attack: Attack, threat: Threat, x: Tensor, y: Tensor, noise: Tensor, model: nn.Module = OWN) -> Tensor:
    return attack.search(model, x, y, [Group(threat, slice(0, len(x)), attack.steps_for(threat))], noise).adversarial


@pytest.mark.parametrize("which", [0, 1], ids=["self", "other"])
def test_the_distance(which: int, seen: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, noise = seen
    threat, network = threats(0.5)[which]
    theirs = original("perceptual_advex.distances").LPIPSDistance(network)(x, noise)
    torch.testing.assert_close(measure(threat, OWN, noise, x), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1], ids=["self", "other"])
@pytest.mark.parametrize("bound", [0.02, 0.1, 0.5])
def test_fast_lpa(bound: float, which: int, seen: tuple[Tensor, Tensor, Tensor]) -> None:
    module, (threat, network) = original("perceptual_advex.perceptual_attacks"), threats(bound)[which]
    theirs = from_noise(
        lambda: module.FastLagrangePerceptualAttack(OWN, bound=bound, num_iterations=5, lpips_model=network), *seen
    )
    torch.testing.assert_close(ours(FastLPA(steps=5), threat, *seen), theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("which", [0, 1], ids=["self", "other"])
@pytest.mark.parametrize("bound", [0.1, 0.5])
def test_a_step_of_ppgd(bound: float, which: int, seen: tuple[Tensor, Tensor, Tensor]) -> None:
    """Once Newton's projection does not add up the gradients of its steps."""
    module, (threat, network) = original("perceptual_advex.perceptual_attacks"), threats(bound)[which]
    theirs = from_noise(
        lambda: module.PerceptualPGDAttack(OWN, bound=bound, num_iterations=1, h=1e-8, lpips_model=network),
        *seen,
        fresh=True,
    )
    found = ours(PPGD(steps=1, h=1e-7), threat, *seen)
    assert (found - seen[0]).abs().amax() > 0.1
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fresh", [True, False])
def test_newtons_projection(fresh: bool, seen: tuple[Tensor, Tensor, Tensor]) -> None:
    """Without mending, theirs arrives elsewhere, and further from where it began."""
    module = original("perceptual_advex.perceptual_attacks")
    x, _, noise = seen
    far = (x + 0.1 * gaussian(noise)).clamp(0, 1)
    space = _Space(OWN, x, [Group(Perceptual(bound=0.1), slice(0, len(x)), 1)])
    found = space.project(far)
    project = module.NewtonsPerceptualProjection(0.1, OWN)
    with OnCPU(fresh=fresh):
        theirs = torch.cat([project(x[i : i + 1], far[i : i + 1].clone()) for i in range(len(x))])
    if fresh:
        torch.testing.assert_close(found, theirs, rtol=0, atol=1e-12)
    else:
        assert ((theirs - far).flatten(1).norm(dim=1) > 1.2 * (found - far).flatten(1).norm(dim=1)).all()


@pytest.mark.parametrize("which", [0, 1], ids=["self", "other"])
@pytest.mark.parametrize("bound", [0.1, 0.5])
def test_a_round_of_lpa(bound: float, which: int, seen: tuple[Tensor, Tensor, Tensor]) -> None:
    """One round: theirs decides on the next lambda before the last step of a round, the paper and ours after it."""
    module, (threat, network) = original("perceptual_advex.perceptual_attacks"), threats(bound)[which]
    x, y, _ = seen
    theirs = from_noise(
        lambda: module.LagrangePerceptualAttack(
            OWN, bound=bound, num_iterations=4, binary_steps=1, lpips_model=network
        ),
        *seen,
        fresh=True,
    )
    found = ours(LPA(steps=4, rounds=1), threat, *seen)
    # Theirs moves an example once more after it is misclassified inside the bound.
    same = (found - theirs).abs().flatten(1).amax(dim=1) < 1e-9
    done = (OWN(found).argmax(1) != y) & (measure(threat, OWN, found, x) <= bound)
    assert (same | done).all()
    assert same.any()


@pytest.mark.parametrize("model", [OWN, SMALL, FLAT], ids=["large", "small", "flat"])
@pytest.mark.parametrize("bound", [0.05, 0.2, 0.5])
def test_the_published_ppgd(bound: float, model: nn.Module, seen: tuple[Tensor, Tensor, Tensor]) -> None:
    """Whole batches, nothing mended; with logits so small that conjugate gradients end early, or nothing moves."""
    module, (threat, network) = original("perceptual_advex.perceptual_attacks"), threats(bound)[1]
    theirs = from_noise(
        lambda: module.PerceptualPGDAttack(model, bound=bound, num_iterations=4, lpips_model=network), *seen, size=N
    )
    found = ours(PPGD(steps=4, form="published"), threat, *seen, model=model)
    assert ((found - seen[0]).abs().amax() > 0.05) == (model is not FLAT)
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("which", [0, 1], ids=["self", "other"])
@pytest.mark.parametrize("bound", [0.05, 0.2, 0.5])
def test_the_published_lpa(bound: float, which: int, seen: tuple[Tensor, Tensor, Tensor]) -> None:
    """Whole batches, nothing mended."""
    module, (threat, network) = original("perceptual_advex.perceptual_attacks"), threats(bound)[which]
    theirs = from_noise(
        lambda: module.LagrangePerceptualAttack(OWN, bound=bound, num_iterations=4, lpips_model=network),
        *seen,
        size=N,
    )
    found = ours(LPA(steps=4, form="published"), threat, *seen)
    assert (found - seen[0]).abs().amax() > 0.03
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-7)


# SparseFool -----------------------------------------------------------------------------------------------------------


def test_sparsefool(digits64: tuple[nn.Module, Tensor, Tensor]) -> None:
    reference = original("torchattacks").SparseFool
    model, x, y = digits64
    found = SparseFool().run(model, x[:20], y[:20], ANY)
    theirs = reference(model)(x[:20], y[:20])
    torch.testing.assert_close(found.images, theirs, rtol=0, atol=1e-7)
    assert torch.equal(found.robust, model(theirs).argmax(1) == y[:20])
