"""Attacks inside a perceptual bound for evaluation: PPGD and LPA (Laidlaw et al. 2021, sections 4 and A.3).

The details follow the paper and the repository cassidylaidlaw/perceptual-advex, except that examples are searched
independently even where the failure of one affects the others in that code (the fallback of the projection). ``form:
published`` computes what that repository computes, including its defects: docs/decisions/perceptual.md.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rome.attacks.base import Attack, AttackResult, Group
from rome.attacks.checks import check_bound
from rome.attacks.engine import Model, margin
from rome.attacks.free import Form
from rome.attacks.perceptual.fast_lpa import START, among, gaussian, length
from rome.attacks.perceptual.features import Perception, distances, loaded
from rome.core.component import Number
from rome.threats import Perceptual

KAPPA = 1.0
"""Margins are raised up to this value."""
TOLERANCE = 1e-4
"""Relative tolerance on the bound, for rounding in distances."""


class _Bounded(Attack):
    """Common base of PPGD and LPA: Gaussian start, frozen networks, results projected into the bound and checked."""

    accepts = (Perceptual, "searches inside perceptual threats")
    draws_by_image: ClassVar[bool] = True
    full_precision: ClassVar[bool] = True
    steps: int = Field(default=20, ge=1)
    """Iterations of the search; in LPA, those of each round."""
    form: Form = "corrected"
    """``corrected`` searches each image independently, inside the bound; ``published`` reproduces the authors' code."""

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        start = x + START * gaussian(noise)
        published = self.form == "published"
        space = (_PublishedSpace if published else _Space)(model, x, groups)
        with space.perception.frozen():
            point, found = self.climb(space, start if published else start.clamp_(0, 1), y)
            logits, phi = space.perception(point)
            dist = distances(phi, space.origin)
            if not published:  # the published bisection may end beyond the bound
                check_bound(self.kind, dist <= space.bound * (1 + TOLERANCE), dist)
            robust = (logits.argmax(dim=1) == y) & ~found
            loss = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        return AttackResult(point, point, robust, loss)

    @abstractmethod
    def climb(self, space: _Space, point: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Search from the start ``point``; return points (B, C, H, W) inside the bound and which of them are known to
        be misclassified: bool (B,)."""


class PPGD(_Bounded):
    """Perceptual projected gradient descent: projected steps of steepest ascent of the margin in feature space.

    With J the Jacobian of phi, a step is v = (J^T J)^-1 grad margin from 5 conjugate-gradient iterations, scaled to
    ``|J v| = 2 bound / steps`` and followed by Newton's projection. A step costs about 7 forwards and 6 backwards, and
    the projection up to 11 forwards and 10 backwards, plus 10 forwards if it does not converge. Misclassified examples
    are done and leave the batch.
    """

    kind = "ppgd"
    iterations: int = Field(default=5, ge=1)
    """Number of conjugate-gradient iterations."""
    h: Number = Field(default=1e-3, gt=0)
    """Step length of the finite difference for J v."""

    def climb(self, space: _Space, point: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        published = self.form == "published"
        point = point if published else space.project(point)
        found = torch.zeros_like(y, dtype=torch.bool)
        part, live = space, torch.arange(len(y), device=y.device)
        for _ in range(self.steps):
            leaf = point[live].requires_grad_()
            with torch.enable_grad():
                logits, phi = part.perception(leaf)
                margins = margin(logits, y[live])
                (gradient,) = torch.autograd.grad(margins.clamp(max=KAPPA).sum(), leaf, retain_graph=True)
            found[live] = done = torch.zeros_like(live, dtype=torch.bool) if published else margins.detach() > 0
            if bool(done.all()):
                break
            moved = leaf.detach()
            if not published or bool(gradient.abs().max() >= 1e-4):  # published: the batch skips a step together
                move = self._direction(part, leaf, phi, gradient) * (2 * part.bound / self.steps).view(-1, 1, 1, 1)
                moved = (moved + move).clamp_(0, 1)
            if bool(done.any()):
                part, live, moved = part.among(~done), live[~done], moved[~done]
            point[live] = part.project(moved)
        return point, found

    def _direction(self, space: _Space, leaf: Tensor, phi: list[Tensor], gradient: Tensor) -> Tensor:
        """Direction v with |J v| = 1, or zero where the gradient is too small to follow."""
        point, fixed = leaf.detach(), [part.detach() for part in phi]
        published = self.form == "published"

        def along(v: Tensor) -> list[Tensor]:
            """J v by a finite difference, along the unit vector of v; in the published form, along v itself."""
            norm = torch.ones_like(v[:, :1, :1, :1]) if published else length(v).clamp(min=1e-30)
            ahead = space.perception.features(point + self.h * v / norm)
            scale = [norm.flatten()[rows].unsqueeze(1) / self.h for rows in space.rows]
            return [(a - f) * s for a, f, s in zip(ahead, fixed, scale, strict=True)]

        def squared(v: Tensor) -> Tensor:
            """J^T J v."""
            (back,) = torch.autograd.grad(phi, leaf, grad_outputs=along(v), retain_graph=True)
            return back

        v, residual = torch.zeros_like(gradient), gradient
        search, power = residual, _dot(residual, residual)
        for i in range(self.iterations):
            if published and i and bool(power.max() < 0.1):
                break
            product = squared(search)
            curve = _dot(search, product)  # not positive if the finite difference is lost in rounding: then no step
            alpha = power / curve if published else torch.where(curve > 0, power / curve.clamp(min=1e-20), 0)
            v, residual = v + alpha * search, residual - alpha * product
            before, power = power, _dot(residual, residual)
            search = residual + power / before.clamp(min=1e-30) * search
        speed = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in along(v)]).view(-1, 1, 1, 1)
        return torch.where(length(gradient) < 1e-4, 0, v / speed.clamp(min=1e-12))


class LPA(_Bounded):
    """Lagrangian perceptual attack: raises the margin under a penalty on the perceptual distance, whose weight adapts.

    It takes ``rounds`` x ``steps`` steps as in Fast-LPA, with a penalty on d beyond the bound; after each round an
    example's lambda, initially 0.01, grows tenfold if d is not inside the bound. Examples that are misclassified inside
    the bound are done and leave the batch; the others are projected at the end.
    """

    kind = "lpa"
    rounds: int = Field(default=5, ge=1)
    """Number of weights of the penalty that are tried."""
    h: Number = Field(default=0.1, gt=0)
    """Step length of the finite difference."""

    def climb(self, space: _Space, point: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        published = self.form == "published"
        weight = torch.full_like(space.bound, 0.01)
        found = torch.zeros_like(y, dtype=torch.bool)
        point = point.clone()
        part, live = space, torch.arange(len(y), device=y.device)
        for _ in range(self.rounds):
            before = torch.zeros_like(space.bound)  # distances of the live examples before a round's last step
            for i in range(self.steps):
                if not len(live):
                    break
                here, labels = point[live], y[live]
                leaf = here.detach().requires_grad_()
                with torch.enable_grad():
                    logits, phi = part.perception(leaf)
                    margins, dist = margin(logits, labels), distances(phi, part.origin)
                    loss = weight[live] * (dist - part.bound).relu() - margins.clamp(max=KAPPA)
                    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
                done = (margins > 0) & (dist <= part.bound)
                gradient = gradient / (length(gradient) + 1e-8)
                ahead = part.perception.features(here - self.h * gradient)
                rate = distances([one.detach() for one in phi], ahead) / self.h
                step = part.bound * 0.1 ** (i / self.steps) / (rate + 1e-8)
                moved = (here - step.view(-1, 1, 1, 1) * gradient).clamp_(0, 1)
                before = torch.zeros_like(before).index_copy(0, live, dist.detach())
                point[live] = moved if published else torch.where(done.view(-1, 1, 1, 1), here, moved)
                found[live] = done
                if bool(done.any()):
                    part, live = part.among(~done), live[~done]
            dist = before if published else space._distances(point)
            weight = torch.where(dist >= space.bound, 10 * weight, weight)
        if published:  # the result of the projection is not checked
            return space.project(point), torch.zeros_like(found)
        return torch.where(found.view(-1, 1, 1, 1), point, space.project(point)), found


class _Space:
    """The feature space of a batch: distances from the original images, and projection into the bounds."""

    def __init__(self, model: Model, x: Tensor, groups: list[Group], origin: list[Tensor] | None = None) -> None:
        self.model, self.x = model, x
        self.groups = [group._replace(threat=loaded(group.threat, x.device)) for group in groups]
        self.rows = [group.rows for group in groups]
        self.perception = Perception(model, self.groups, x.device)
        self.bound = self.perception.bounds(x)
        with self.perception.frozen():
            self.origin = self.perception.features(x) if origin is None else origin

    def among(self, chosen: Tensor) -> _Space:
        """The same for the chosen examples (bool (B,))."""
        parts = [part[chosen[rows]] for part, rows in zip(self.origin, self.rows, strict=True)]
        return _Space(self.model, self.x[chosen], among(self.groups, chosen.cpu()), [p for p in parts if len(p)])

    def _distances(self, point: Tensor) -> Tensor:
        """Distances of points (B, C, H, W) from the originals: (B,)."""
        return distances(self.perception.features(point), self.origin)

    def slope(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`_distances` (B,) and its gradient (B, C, H, W)."""
        leaf = point.detach().requires_grad_()
        with torch.enable_grad():
            dist = self._distances(leaf)
            (gradient,) = torch.autograd.grad(dist, leaf, torch.ones_like(dist))
        return dist.detach(), gradient

    def project(self, point: Tensor, *, rounds: int = 10, halvings: int = 10) -> Tensor:
        """Project points (B, C, H, W) into the bound; points inside it stay unchanged.

        Newton's method: x' -= 1.1 (d - bound + 0.1) grad d / |grad d|^2 where d exceeds the bound, up to ``rounds``
        times, clipped to the box; if d still exceeds the bound, bisection between the original and ``point``.
        """
        start, point = point, point.clone()
        part, live = self, torch.arange(len(point), device=point.device)  # points outside
        for left in reversed(range(rounds + 1)):
            dist, gradient = part.slope(point[live]) if left else (part._distances(point[live]), point[live])
            outside = dist > part.bound
            if not bool(outside.any()):
                return point
            if left:
                scale = 1.1 * (dist - part.bound + 0.1) / _dot(gradient, gradient).flatten().clamp(min=1e-12)
                moved = (point[live] - scale.view(-1, 1, 1, 1) * gradient).clamp_(0, 1)
                point[live[outside]] = moved[outside]
            if not bool(outside.all()):
                part, live = part.among(outside), live[outside]
        low, _ = part.bisected(start[live], halvings)
        point[live] = part.x + low.view(-1, 1, 1, 1) * (start[live] - part.x)
        return point

    def bisected(self, point: Tensor, halvings: int) -> tuple[Tensor, Tensor]:
        """Return the largest share found of the way from the originals to ``point`` that stays inside the bound (B,),
        and the last point tried (B, C, H, W)."""
        low, high, tried = torch.zeros_like(self.bound), torch.ones_like(self.bound), point
        for _ in range(halvings):
            middle = (low + high) / 2
            tried = self.x + middle.view(-1, 1, 1, 1) * (point - self.x)
            inside = self._distances(tried) <= self.bound
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        return low, tried


class _PublishedSpace(_Space):
    """The projection of perceptual-advex: Newton's steps follow the sum of all gradients so far, and the whole batch is
    then bisected between the originals and the points where these steps end."""

    def project(self, point: Tensor, *, rounds: int = 10, halvings: int = 10) -> Tensor:
        point, total = point.clone(), torch.zeros_like(point)
        part: _Space = self
        live = torch.arange(len(point), device=point.device)
        for _ in range(rounds):
            dist, gradient = part.slope(point[live])
            total[live] += gradient
            excess = dist - part.bound
            outside = excess > 0
            push = torch.where(outside, 1.1 * (excess + 0.1), 0).view(-1, 1, 1, 1)
            point[live] = (point[live] - push * (total[live] / length(total[live]) ** 2)).clamp_(0, 1)
            if not bool(outside.any()):
                return point
            part, live = part.among(outside), live[outside]
        return self.bisected(point, halvings)[1]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product for each example: (B, 1, 1, 1)."""
    return (a * b).flatten(1).sum(dim=1).view(-1, 1, 1, 1)
