"""SparseFool: moves few coordinates, each as far as the box allows (paper 5.2, the column for l0).

Modas, Moosavi-Dezfooli and Frossard, "SparseFool: a few pixels make a big difference" (CVPR 2019), built on
"DeepFool" (Moosavi-Dezfooli et al., CVPR 2016). The variant is that of torchattacks 3.5.1, whose defaults the paper
uses; the authors' (github.com/LTS4/SparseFool) starts every round from the previous image instead of the clean one.
"""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.base import UNSEEN, Found, Group, Model, at_least_float32
from rome.attacks.free import FreeAttack
from rome.attacks.pgd import Steps
from rome.component import Number

BEYOND = 1e-3
"""How far beyond the plane the last coordinate aims, in units of the unit normal."""
TINY = 1e-30


class SparseFool(FreeAttack):
    """Linearises the decision boundary where DeepFool finds it, and crosses it in as few coordinates as the box allows.

    A round, for the images x' that are still classified y: DeepFool walks from x' over the boundary to x_D;
    x_B = x + lam (x_D - x); w is the unit normal, the gradient of z_t - z_y at x_B, with t the class predicted there
    (DeepFool's last target if that is y); :func:`cross_plane` gives x_P from x; x' becomes x + (1 + overshoot)
    (x_P - x), clipped. There is no budget: what is small is the number of coordinates (C H W, not pixels), and
    :func:`rome.attacks.free.changed_pixels` counts pixels.

    The batch is searched as one, without the images that are done. An iteration of DeepFool costs a forward and at most
    ``candidates`` - 1 backwards, fewer where ``spread`` rules classes out, and waits for the device once for each.
    """

    kind = "sparsefool"
    untrained: ClassVar[str] = "has no budget, and how long it takes depends on the images"
    steps: Steps = 10
    """Rounds."""
    lam: Number = Field(default=3, gt=0)
    overshoot: Number = Field(default=0.02, ge=0)
    deepfool_steps: Steps = 50
    deepfool_overshoot: Number = Field(default=0.02, ge=0)
    candidates: int | None = Field(default=10, ge=2)
    """How many classes DeepFool looks at: those with the highest logits, y among them (the authors' 10). None: all."""
    spread: Number | None = Field(default=2, ge=1)
    """Spares the gradients of classes that cannot be nearest: in the order of the logits, none is taken to be more than
    this many times as long as the longest before it. None: all are computed. See docs/decisions/sparsefool.md."""
    solve_from: Literal["clean", "previous"] = "clean"
    """Where the solver starts: from the image itself, or from the last round's as the authors' does. From the image the
    plane often lies behind it, and then every coordinate changes: see docs/decisions/sparsefool.md."""

    @property
    def uses_noise(self) -> bool:
        return False

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> Found:
        with torch.compiler.set_stance("force_eager"):  # compiled graphs allow one backward each
            images = self._rounds(model, x, y)
        return Found(images, images, torch.ones_like(y, dtype=torch.bool), UNSEEN)

    def _rounds(self, model: Model, x: Tensor, y: Tensor) -> Tensor:
        images = x.clone()
        live = torch.arange(len(x), device=x.device)
        for _ in range(self.steps):
            walk = self._deepfool(model, images[live], y[live])
            live, point, target = live[walk.moved], walk.point[walk.moved], walk.target[walk.moved]
            if not len(live):
                break
            origin = (x if self.solve_from == "clean" else images)[live]
            beyond = origin + self.lam * (point - origin)
            normal = _normal(model, beyond, y[live], target)
            crossed = cross_plane(origin.flatten(1), normal.flatten(1), beyond.flatten(1)).view_as(origin)
            images[live] = (origin + (1 + self.overshoot) * (crossed - origin)).clamp_(0, 1)
        return images

    def _deepfool(self, model: Model, x: Tensor, y: Tensor) -> _Walk:
        """Over the nearest linearised boundary, again and again, until the class changes."""
        point, target, moved = x.clone(), y.clone(), torch.zeros_like(y, dtype=torch.bool)
        live = torch.arange(len(x), device=x.device)
        for _ in range(self.deepfool_steps):
            here, logits = _forward(model, point[live])
            predicted = logits.detach().argmax(dim=1)
            target[live] = predicted
            right = (predicted == y[live]).nonzero().flatten()
            if not len(right):
                break
            step, towards = self._nearest(model, here, logits, y[live], right)
            live, here = live[right], here.detach()[right]
            target[live] = towards
            there = (here + (1 + self.deepfool_overshoot) * step).clamp_(0, 1)
            point[live], moved[live] = there, True
            # on the boundary, as near as numbers get: rounding swallows this step and those that would follow
            live = live[(there - here).abs().flatten(1).amax(dim=1) > torch.finfo(x.dtype).eps]
            if not len(live):
                break
        return _Walk(point, target, moved)

    def _nearest(self, model: Model, here: Tensor, logits: Tensor, y: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """The shortest step to a linearised boundary, |f_k| w_k / ||w_k||^2 with f_k = z_k - z_y and w_k its gradient,
        and the class k beyond it, for the rows ``asked``. ``logits`` belong to ``here`` by a graph."""
        own = y.unsqueeze(1)
        count = logits.shape[1] if self.candidates is None else min(self.candidates, logits.shape[1])
        others = logits.detach().scatter(1, own, torch.inf).topk(count, dim=1).indices[:, 1:]
        gaps = (logits.gather(1, others) - logits.gather(1, own)).detach().abs()  # rising with k, as y is predicted
        nearest, longest = torch.full_like(gaps[:, 0], torch.inf), torch.zeros_like(gaps[:, 0])
        step, target = torch.zeros_like(here), y.clone()
        rows, held = asked, torch.arange(len(y), device=y.device)  # still to be looked at, and those in the graph
        leaf = here
        for k in range(count - 1):
            if k and self.spread is not None:
                rows = rows[gaps[rows, k] < self.spread * longest[rows] * nearest[rows]]
                if not len(rows):
                    break
            ahead = 1 if k == 0 and self.spread is not None else count - 1 - k
            if len(rows) < ahead * (len(held) - len(rows)):  # a forward costs less than backwards through the others
                (leaf, logits), held = _forward(model, here[rows]), rows
            with torch.enable_grad():
                gap = logits.gather(1, others[held, k, None]) - logits.gather(1, own[held])
            (gradient,) = torch.autograd.grad(gap, leaf, torch.ones_like(gap), retain_graph=True)
            w = torch.zeros_like(step).index_copy_(0, held, gradient)
            length = torch.linalg.vector_norm(w.flatten(1), dim=1).clamp(min=TINY)
            distance = gaps[:, k] / length
            nearer = distance < nearest
            nearest, longest = torch.where(nearer, distance, nearest), torch.maximum(longest, length)
            target = torch.where(nearer, others[:, k], target)
            step = torch.where(_wide(nearer), _wide(distance) * (w / _wide(length)), step)
        return step[asked], target[asked]


class _Walk(NamedTuple):
    """Where DeepFool got, the class it found or last aimed at, and whether it had to move at all."""

    point: Tensor
    target: Tensor
    moved: Tensor


def _forward(model: Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Images as a leaf, and their logits with the graph that leads back to it."""
    leaf = x.detach().requires_grad_()
    with torch.enable_grad():
        return leaf, at_least_float32(model(leaf))


def _normal(model: Model, x: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """The unit gradient of z_t - z_y, where t is the predicted class or, where that is y, ``target``."""
    here, logits = _forward(model, x)
    predicted = logits.detach().argmax(dim=1)
    aim = torch.where(predicted == y, target, predicted)
    with torch.enable_grad():
        gap = logits.gather(1, aim.unsqueeze(1)) - logits.gather(1, y.unsqueeze(1))
    (w,) = torch.autograd.grad(gap, here, torch.ones_like(gap))
    return w / _wide(torch.linalg.vector_norm(w.flatten(1), dim=1).clamp(min=TINY))


def _wide(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def cross_plane(x: Tensor, normal: Tensor, point: Tensor) -> Tensor:
    """From x over the plane through ``point`` with this normal, within [0, 1] and in few coordinates. (B, D) -> (B, D).

    The published loop takes the unused coordinate with the largest |w_j| and moves it by |w'(x_i - x_B) + beta| / |w_j|
    along sign(w_j), clipped to the box, until the plane is crossed; beta = +-0.001 carries it across. So while x lies
    below the plane every coordinate but the last moves as far as the box allows, and one sort and one cumulative sum
    tell how many are needed. If x lies above the plane already (the boundary is curved) the loop moves away from it and
    uses every coordinate; what is left then doubles with each coordinate that the box does not stop, at most ten times
    before the box stops all that follow.
    """
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    slope, order = normal.abs().to(exact).sort(dim=1, descending=True, stable=True)
    room = torch.where(normal > 0, 1 - x, x).gather(1, order).to(exact)
    offset = (normal.to(exact) * (x.to(exact) - point.to(exact))).sum(dim=1, keepdim=True)
    above = offset > 0
    gain = slope * room
    left = offset.abs() - _before(gain)
    used = (slope > 0) & (above | (left > 0))
    away, walked = offset.abs() + BEYOND, gain
    for _ in range(10):
        walked = torch.minimum(gain, away + _before(walked))
    reach = torch.where(above, away + _before(walked), left + BEYOND)
    move = torch.minimum(room, reach / slope.clamp(min=TINY)).masked_fill(~used, 0)
    moves = torch.zeros_like(x).scatter(1, order, move.to(x.dtype))
    return (x + moves * normal.sign()).clamp_(0, 1)


def _before(values: Tensor) -> Tensor:
    """Sum of the values left of each: (B, D) -> (B, D)."""
    return values.cumsum(dim=1) - values
