"""SparseFool: changes few coordinates, each as far as the box allows (paper 5.2, the column for l0).

Modas, Moosavi-Dezfooli and Frossard, "SparseFool: a few pixels make a big difference" (CVPR 2019), built on
"DeepFool" (Moosavi-Dezfooli et al., CVPR 2016). This is the variant of torchattacks 3.5.1, whose defaults the paper
uses; the authors' code (github.com/LTS4/SparseFool) starts every round from the previous image, not the clean one.
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
"""How far beyond the plane the last coordinate goes, as a distance along the unit normal."""
TINY = 1e-30


class SparseFool(FreeAttack):
    """Linearises the decision boundary where DeepFool finds it, and crosses it in as few coordinates as the box allows.

    A round for an image x' that is still classified as y: DeepFool goes from x' across the boundary to x_D;
    x_B = x + lam (x_D - x); the unit normal w is the direction of the gradient of z_t - z_y at x_B, where t is the
    class predicted there (DeepFool's last target if that is y); :func:`cross_plane` leads from x to x_P; x' becomes
    x + (1 + overshoot) (x_P - x), clipped. There is no budget: the attack keeps the number of changed coordinates small
    (out of C H W; :func:`rome.attacks.free.changed_pixels` counts pixels instead).

    Each image goes through its rounds at its own pace: a forward evaluates the next point of every unfinished image,
    which is a point of DeepFool or x_B, and each backward after it computes one more gradient for the images that need
    one. A step of DeepFool needs at most ``candidates`` - 1 gradients, fewer where ``spread`` and ``drift`` rule
    classes out. Every backward waits for the device once.
    """

    kind = "sparsefool"
    starts_at_random: ClassVar[bool] = False
    not_for_training: ClassVar[str] = "has no budget, and how long it takes depends on the images"
    steps: Steps = 10
    """Number of rounds."""
    lam: Number = Field(default=3, gt=0)
    """Where the boundary is linearised: at this multiple of the way to DeepFool's point; the authors use 3."""
    overshoot: Number = Field(default=0.02, ge=0)
    """How far a round goes beyond the boundary, as a share of the way to it."""
    deepfool_steps: Steps = 50
    """Largest number of DeepFool's steps in a round."""
    deepfool_overshoot: Number = Field(default=0.02, ge=0)
    """How far DeepFool goes beyond the boundary, as a share of the way to it."""
    candidates: int | None = Field(default=10, ge=2)
    """Number of classes that DeepFool considers: y and those with the highest logits (the authors: 10). None: all."""
    spread: Number | None = Field(default=3, ge=1)
    """Skip the gradients of classes whose boundary cannot be nearest, assuming that no gradient is more than this many
    times as long as the longest one computed at the same point. None: compute all. See docs/decisions/sparsefool.md."""
    drift: Number = Field(default=1.5, ge=1)
    """The same for a class whose gradient was computed at an earlier point of the image's search: it is assumed to be
    at most this many times as long as the longest one so far."""
    solve_from: Literal["clean", "previous"] = "clean"
    """Where the solver starts: at the clean image, or at the previous round's result as in the authors' code. The clean
    image is often already beyond the plane, and then every coordinate changes: see docs/decisions/sparsefool.md."""

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        images = x.clone()
        state = _Searches(x, y)
        with torch.compiler.set_stance("force_eager"):  # compiled graphs allow one backward each
            while self.steps and self.deepfool_steps and len(state.rows):
                done = self._advance(model, state)
                images[state.rows] = state.image
                state = state.without(done)
        return AttackResult(images, images, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)

    def _advance(self, model: Model, state: _Searches) -> Tensor:
        """Run one forward for all searches and move on those that know enough about their current points; return which
        are done: bool (b,)."""
        predicted, ready = self._evaluate(model, state)
        right, solving, at = predicted == state.y, state.at_boundary, state.point
        walking = right & ~solving & ready
        fooled = ~right & ~solving & (state.walk_steps == 0)

        # DeepFool ends when the class has changed, after its last step, or when a step (and so every later one) is lost
        # in rounding; x_B is next
        there = (at + (1 + self.deepfool_overshoot) * (_wide(state.distance) * state.normal)).clamp_(0, 1)
        there = torch.where(_wide(walking), there, at)
        state.walk_steps = state.walk_steps + walking.long()
        still = (there - at).abs().flatten(1).amax(dim=1) <= torch.finfo(at.dtype).eps
        arrived = ready & ~solving & ~fooled & (~right | still | (state.walk_steps == self.deepfool_steps))
        state.target = torch.where(solving, state.target, torch.where(right, state.nearest, predicted))
        state.point = torch.where(_wide(arrived), state.origin + self.lam * (there - state.origin), there)
        state.at_boundary = arrived | (solving & ~ready)

        rows = (solving & ready).nonzero().flatten()
        origin = state.origin[rows]
        crossed = cross_plane(origin.flatten(1), state.normal[rows].flatten(1), at[rows].flatten(1)).view_as(origin)
        state.point[rows] = (origin + (1 + self.overshoot) * (crossed - origin)).clamp_(0, 1)
        state.image[rows] = state.point[rows]
        state.walk_steps[rows] = 0
        state.rounds[rows] += 1
        if self.solve_from == "previous":
            state.origin = state.image
        state.forget(ready)
        return fooled | (state.rounds == self.steps)

    def _evaluate(self, model: Model, state: _Searches) -> tuple[Tensor, Tensor]:
        """Evaluate the current points; return the predicted classes (b,) and which searches are ready (b,): their
        nearest linearised boundary is known or not needed.

        The boundary with class k is |f_k| / ||w_k|| away, where f_k = z_k - z_y and w_k is its gradient. DeepFool needs
        the nearest boundary; at x_B there is only one. Each backward computes the next class of every search that needs
        one. Once at most half of them do, these wait for the next forward, because that costs less than running
        backwards through the others too.
        """
        leaf = state.point.detach().requires_grad_()
        with torch.enable_grad():
            logits = at_least_float32(logits_of(model, leaf))
        z, own = logits.detach(), state.y.unsqueeze(1)
        predicted = z.argmax(dim=1)
        right = predicted == state.y
        count = z.shape[1] if self.candidates is None else min(self.candidates, z.shape[1])
        classes = z.scatter(1, own, torch.inf).topk(count, dim=1).indices[:, 1:]
        classes[:, 0] = torch.where(state.at_boundary, torch.where(right, state.target, predicted), classes[:, 0])
        gaps = (z.gather(1, classes) - z.gather(1, own)).abs()
        first = torch.arange(count - 1, device=z.device) == 0
        needed = _tall(right & ~state.at_boundary) | (_tall(state.at_boundary) & first)
        state.allocate(z.shape[1])
        while True:
            wanted = needed & ~state.known.gather(1, classes)
            if self.spread is not None:
                before = state.lengths.gather(1, classes)
                most = torch.where(before > 0, self.drift * before, self.spread * _tall(state.longest))
                near = gaps < most * _tall(state.distance)
                wanted = wanted & torch.where(_tall(state.distance.isinf()), first, near)
            wants = wanted.any(dim=1)
            if 2 * int(wants.sum()) <= len(wants):  # waits for the device
                return predicted, ~wants
            chosen = classes.gather(1, wanted.int().argmax(dim=1, keepdim=True))
            with torch.enable_grad():
                gap = logits.gather(1, chosen) - logits.gather(1, own)
            (w,) = torch.autograd.grad(gap, leaf, torch.ones_like(gap), retain_graph=True)
            state.record(wants, chosen, gap.detach().abs().squeeze(1), w)


class _Searches:
    """State of the b unfinished searches: tensors whose first dimension is b."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.rows = torch.arange(len(y), device=y.device)
        """Positions in the batch."""
        self.y = y
        self.origin = x
        """(b, C, H, W): the image from which the solver starts."""
        self.image = x.clone()
        """(b, C, H, W): the result of the latest round."""
        self.rounds = torch.zeros_like(y)
        """Number of completed rounds."""
        self.walk_steps = torch.zeros_like(y)
        """Number of DeepFool's steps in this round."""
        self.target = y
        """The class that DeepFool reached or last aimed at."""
        self.lengths = x.new_zeros(len(x), 0)
        """(b, classes): largest length of the gradient of z_k - z_y in DeepFool's steps; 0 if it was never needed."""
        self.point = x
        """(b, C, H, W): the point that the next forward evaluates."""
        self.at_boundary = torch.zeros_like(y, dtype=torch.bool)
        """Whether that point is x_B instead of a point of DeepFool."""
        self.known = torch.zeros_like(self.lengths, dtype=torch.bool)
        """(b, classes): whether the gradient is known at this point."""
        self.longest = x.new_zeros(len(x))
        """Length of the longest of these gradients."""
        self.nearest = y
        """The class beyond the nearest known boundary."""
        self.distance = self.longest + torch.inf
        """Distance to that boundary; infinite if none is known."""
        self.normal = torch.zeros_like(x)
        """(b, C, H, W): unit vector towards that boundary."""

    def allocate(self, classes: int) -> None:
        """Allocate the tensors with a column for each class once the number of classes is known."""
        if not self.known.shape[1]:
            self.known, self.lengths = (part.new_zeros(len(part), classes) for part in (self.known, self.lengths))

    def record(self, which: Tensor, chosen: Tensor, gap: Tensor, w: Tensor) -> None:
        """Record a boundary for the searches ``which`` (b,): its class (b, 1), |f| (b,) and gradient (b, C, H, W)."""
        length = torch.linalg.vector_norm(w.flatten(1), dim=1).clamp(min=TINY)
        distance = gap.to(length.dtype) / length
        nearer = which & ~(distance >= self.distance)  # NaN counts as nearest, so that it is noticed
        self.nearest = torch.where(nearer, chosen.squeeze(1), self.nearest)
        self.distance = torch.where(nearer, distance, self.distance)
        self.normal = torch.where(_wide(nearer), w / _wide(length), self.normal)
        self.longest = torch.maximum(self.longest, length.masked_fill(~which, 0))
        self.lengths.scatter_reduce_(1, chosen, _tall(length.masked_fill(~which | self.at_boundary, 0)), "amax")
        self.known.scatter_(1, chosen, self.known.gather(1, chosen) | _tall(which))

    def forget(self, which: Tensor) -> None:
        """Forget the boundaries of the searches ``which`` (b,), whose points have changed."""
        self.known = self.known & ~_tall(which)
        self.longest = self.longest.masked_fill(which, 0)
        self.distance = self.distance.masked_fill(which, torch.inf)

    def without(self, done: Tensor) -> _Searches:
        """The searches that are not ``done`` (b,)."""
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
    """Move x (B, D) across the plane through ``point`` with this normal, within [0, 1] and in few coordinates: (B, D).

    The published loop takes the unused coordinate with the largest |w_j| and moves it by |w'(x_i - x_B) + beta| / |w_j|
    along sign(w_j), clipped to the box, until the plane is crossed; beta = +-0.001 carries it across. So if x is below
    the plane, every coordinate but the last moves as far as the box allows, and one sort and one cumulative sum show
    how many are needed. If x is already above the plane (the boundary is curved), the loop moves away from it and uses
    every coordinate; the remaining distance then doubles with each coordinate that the box does not stop, at most ten
    times before the box stops all others.
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
    """Sum of the values to the left of each: (B, D) -> (B, D)."""
    return values.cumsum(dim=1) - values
