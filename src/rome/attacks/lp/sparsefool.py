"""SparseFool: moves few coordinates, each as far as the box allows (paper 5.2, the column for l0).

Modas, Moosavi-Dezfooli and Frossard, "SparseFool: a few pixels make a big difference" (CVPR 2019), built on
"DeepFool" (Moosavi-Dezfooli et al., CVPR 2016). The variant is that of torchattacks 3.5.1, whose defaults the paper
uses; the authors' (github.com/LTS4/SparseFool) starts every round from the previous image instead of the clean one.
"""

from __future__ import annotations

from copy import copy
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.base import NOT_EVALUATED, AttackResult, Group, Steps
from rome.attacks.engine import Model, at_least_float32, logits_of
from rome.attacks.free import FreeAttack
from rome.core.component import Number
from rome.threats.projections import signs

BEYOND = 1e-3
"""How far beyond the plane the last coordinate aims, in units of the unit normal."""
TINY = 1e-30


class SparseFool(FreeAttack):
    """Linearises the decision boundary where DeepFool finds it, and crosses it in as few coordinates as the box allows.

    A round, for an image x' that is still classified y: DeepFool walks from x' over the boundary to x_D;
    x_B = x + lam (x_D - x); w is the unit normal, the gradient of z_t - z_y at x_B, with t the class predicted there
    (DeepFool's last target if that is y); :func:`cross_plane` gives x_P from x; x' becomes x + (1 + overshoot)
    (x_P - x), clipped. There is no budget: what is small is the number of coordinates (C H W, not pixels), and
    :func:`rome.attacks.free.changed_pixels` counts pixels.

    Each image goes through its rounds at its own pace: a forward looks at the next point of every image that is not
    done, be it DeepFool's or x_B, and each backward after it takes one more gradient for those that need one. A step of
    DeepFool needs at most ``candidates`` - 1, fewer where ``spread`` and ``drift`` rule classes out. Every backward
    waits for the device once.
    """

    kind = "sparsefool"
    starts_at_random: ClassVar[bool] = False
    untrained: ClassVar[str] = "has no budget, and how long it takes depends on the images"
    steps: Steps = 10
    """Rounds."""
    lam: Number = Field(default=3, gt=0)
    """How far beyond DeepFool's point the boundary is linearised; the authors' 3."""
    overshoot: Number = Field(default=0.02, ge=0)
    """How much further than the boundary a round goes, as a share of the way."""
    deepfool_steps: Steps = 50
    """Of DeepFool in each round, at most."""
    deepfool_overshoot: Number = Field(default=0.02, ge=0)
    """How much further than the boundary DeepFool goes, as a share of the way."""
    candidates: int | None = Field(default=10, ge=2)
    """How many classes DeepFool looks at: those with the highest logits, y among them (the authors' 10). None: all."""
    spread: Number | None = Field(default=3, ge=1)
    """Spares the gradients of classes that cannot be nearest: none is taken to be more than this many times as long as
    the longest at the same point. None: all are computed. See docs/decisions/sparsefool.md."""
    drift: Number = Field(default=1.5, ge=1)
    """The same for a class whose gradient was needed before, at another point of the image's search: it is taken to be
    no more than this many times as long as it was at most."""
    solve_from: Literal["clean", "previous"] = "clean"
    """Where the solver starts: from the image itself, or from the last round's as the authors' does. From the image the
    plane often lies behind it, and then every coordinate changes: see docs/decisions/sparsefool.md."""

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        images = x.clone()
        now = _Searches(x, y)
        with torch.compiler.set_stance("force_eager"):  # compiled graphs allow one backward each
            while self.steps and self.deepfool_steps and len(now.rows):
                done = self._advance(model, now)
                images[now.rows] = now.image
                now = now.without(done)
        return AttackResult(images, images, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)

    def _advance(self, model: Model, now: _Searches) -> Tensor:
        """One forward for all; those that then know enough of their points go on to others. Who is done: bool (b,)."""
        predicted, ready = self._look(model, now)
        right, solving, at = predicted == now.y, now.beyond, now.point
        walking = right & ~solving & ready
        fooled = ~right & ~solving & (now.walked == 0)

        # DeepFool is over where the class has changed, after the last step, and where rounding swallows the step and
        # so those that would follow; then comes x_B
        there = (at + (1 + self.deepfool_overshoot) * (_wide(now.distance) * now.normal)).clamp_(0, 1)
        there = torch.where(_wide(walking), there, at)
        now.walked = now.walked + walking.long()
        still = (there - at).abs().flatten(1).amax(dim=1) <= torch.finfo(at.dtype).eps
        arrived = ready & ~solving & ~fooled & (~right | still | (now.walked == self.deepfool_steps))
        now.target = torch.where(solving, now.target, torch.where(right, now.nearest, predicted))
        now.point = torch.where(_wide(arrived), now.origin + self.lam * (there - now.origin), there)
        now.beyond = arrived | (solving & ~ready)

        rows = (solving & ready).nonzero().flatten()
        origin = now.origin[rows]
        crossed = cross_plane(origin.flatten(1), now.normal[rows].flatten(1), at[rows].flatten(1)).view_as(origin)
        now.point[rows] = (origin + (1 + self.overshoot) * (crossed - origin)).clamp_(0, 1)
        now.image[rows] = now.point[rows]
        now.walked[rows] = 0
        now.rounds[rows] += 1
        if self.solve_from == "previous":
            now.origin = now.image
        now.forget(ready)
        return fooled | (now.rounds == self.steps)

    def _look(self, model: Model, now: _Searches) -> tuple[Tensor, Tensor]:
        """Classes predicted at the points (b,), and whose nearest linearised boundary is known or not needed (b,).

        The boundary with class k is |f_k| / ||w_k|| away, f_k = z_k - z_y and w_k its gradient. DeepFool needs the
        nearest; at x_B there is one. A backward takes the next class of every search that wants one. Where no more than
        half do, these wait for the next forward, which costs less than backwards through the others.
        """
        leaf = now.point.detach().requires_grad_()
        with torch.enable_grad():
            logits = at_least_float32(logits_of(model, leaf))
        z, own = logits.detach(), now.y.unsqueeze(1)
        predicted = z.argmax(dim=1)
        right = predicted == now.y
        count = z.shape[1] if self.candidates is None else min(self.candidates, z.shape[1])
        classes = z.scatter(1, own, torch.inf).topk(count, dim=1).indices[:, 1:]
        classes[:, 0] = torch.where(now.beyond, torch.where(right, now.target, predicted), classes[:, 0])
        gaps = (z.gather(1, classes) - z.gather(1, own)).abs()
        first = torch.arange(count - 1, device=z.device) == 0
        needed = _tall(right & ~now.beyond) | (_tall(now.beyond) & first)
        now.make_room(z.shape[1])
        while True:
            wanted = needed & ~now.taken.gather(1, classes)
            if self.spread is not None:
                before = now.lengths.gather(1, classes)
                most = torch.where(before > 0, self.drift * before, self.spread * _tall(now.longest))
                near = gaps < most * _tall(now.distance)
                wanted = wanted & torch.where(_tall(now.distance.isinf()), first, near)
            wants = wanted.any(dim=1)
            if 2 * int(wants.sum()) <= len(wants):  # waits for the device
                return predicted, ~wants
            chosen = classes.gather(1, wanted.int().argmax(dim=1, keepdim=True))
            with torch.enable_grad():
                gap = logits.gather(1, chosen) - logits.gather(1, own)
            (w,) = torch.autograd.grad(gap, leaf, torch.ones_like(gap), retain_graph=True)
            now.learn(wants, chosen, gap.detach().abs().squeeze(1), w)


class _Searches:
    """Where the searches of b images are that are not done: tensors whose first dimension is b."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.rows = torch.arange(len(y), device=y.device)
        """Places in the batch."""
        self.y = y
        self.origin = x
        """(b, C, H, W): where the solver starts."""
        self.image = x.clone()
        """(b, C, H, W): after the last round."""
        self.rounds = torch.zeros_like(y)
        """Rounds that are over."""
        self.walked = torch.zeros_like(y)
        """DeepFool's steps in this round."""
        self.target = y
        """The class that DeepFool found or last aimed at."""
        self.lengths = x.new_zeros(len(x), 0)
        """(b, classes): length of z_k - z_y's gradient, at most, in DeepFool's steps; 0 where not needed."""
        self.point = x
        """(b, C, H, W): what the next forward looks at."""
        self.beyond = torch.zeros_like(y, dtype=torch.bool)
        """Whether that is x_B, and not where DeepFool is."""
        self.taken = torch.zeros_like(self.lengths, dtype=torch.bool)
        """(b, classes): whose gradients are known at this point."""
        self.longest = x.new_zeros(len(x))
        """The longest of them."""
        self.nearest = y
        """The class beyond the nearest of their boundaries."""
        self.distance = self.longest + torch.inf
        """Of that boundary; infinite before the first."""
        self.normal = torch.zeros_like(x)
        """(b, C, H, W): the direction there, of length 1."""

    def make_room(self, classes: int) -> None:
        """Room for what is known of each class, once their number is."""
        if not self.taken.shape[1]:
            self.taken, self.lengths = (part.new_zeros(len(part), classes) for part in (self.taken, self.lengths))

    def learn(self, which: Tensor, chosen: Tensor, gap: Tensor, w: Tensor) -> None:
        """Take note of a boundary for some (b,): the class beyond it (b, 1), |f| (b,) and its gradient (b, C, H, W)."""
        length = torch.linalg.vector_norm(w.flatten(1), dim=1).clamp(min=TINY)
        distance = gap.to(length.dtype) / length
        nearer = which & ~(distance >= self.distance)  # NaN is nearer than anything, so that it does not go unnoticed
        self.nearest = torch.where(nearer, chosen.squeeze(1), self.nearest)
        self.distance = torch.where(nearer, distance, self.distance)
        self.normal = torch.where(_wide(nearer), w / _wide(length), self.normal)
        self.longest = torch.maximum(self.longest, length.masked_fill(~which, 0))
        self.lengths.scatter_reduce_(1, chosen, _tall(length.masked_fill(~which | self.beyond, 0)), "amax")
        self.taken.scatter_(1, chosen, self.taken.gather(1, chosen) | _tall(which))

    def forget(self, which: Tensor) -> None:
        """What was known of the points of some (b,), which have others now."""
        self.taken = self.taken & ~_tall(which)
        self.longest = self.longest.masked_fill(which, 0)
        self.distance = self.distance.masked_fill(which, torch.inf)

    def without(self, done: Tensor) -> _Searches:
        """The others."""
        rest, others = (~done).nonzero().flatten(), copy(self)
        if len(rest) < len(done):
            vars(others).update({name: values[rest] for name, values in vars(self).items()})
        return others


def _tall(values: Tensor) -> Tensor:
    """(B,) to (B, 1)."""
    return values.unsqueeze(1)


def _wide(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)


def cross_plane(x: Tensor, normal: Tensor, point: Tensor) -> Tensor:
    """From x over the plane through ``point`` with this normal, within [0, 1] and in few coordinates. (B, D) -> (B, D).

    The published loop takes the unused coordinate with the largest |w_j| and moves it by |w'(x_i - x_B) + beta| / |w_j|
    along sign(w_j), clipped to the box, until the plane is crossed; beta = +-0.001 carries it across. So while x lies
    below the plane every coordinate but the last moves as far as the box allows, and one sort and one cumulative sum
    show how many are needed. If x lies above the plane already (the boundary is curved) the loop moves away from it and
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
    return (x + moves * signs(normal)).clamp_(0, 1)


def _before(values: Tensor) -> Tensor:
    """Sum of the values left of each: (B, D) -> (B, D)."""
    return values.cumsum(dim=1) - values
