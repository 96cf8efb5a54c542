"""Auto-PGD as used in training (E-AT, RAMP): no random start, and step sizes that adapt to each example.

Croce and Hein, "Reliable evaluation of adversarial robustness" (ICML 2020) for L2 and Linf, "Mind the box" (ICML 2021)
for L1; the training variant is that of github.com/fra31/robust-finetuning.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rome.attacks.base import Attack, AttackResult, Group, Steps
from rome.attacks.engine import Model, log_odds, logits_of, loss_and_gradient
from rome.core.component import Number
from rome.threats import Threat
from rome.threats.lp import Norm
from rome.threats.projections import signs, unit


class APGD(Attack):
    """APGD on the cross-entropy; returns the iterate with the highest loss, the clean image included.

    The paper trains from scratch with 15 steps. The attack costs ``steps`` + 1 forwards and ``steps`` backwards.
    """

    kind = "apgd"
    starts_at_random: ClassVar[bool] = False
    steps: Steps | dict[Norm, Steps] = 15
    """Iterations: one number for all norms, or one for each norm."""
    l1_share: Number | None = Field(default=None, gt=0, le=1)
    """L1: share of the coordinates that the first step moves. None: 0.05, as published for training, but at least 12
    coordinates, which matters only for tiny images. AutoAttack's evaluation starts with 0.2."""

    def steps_for(self, threat: Threat) -> int:
        return int(self.accepted(threat).setting(self.steps, 15))

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        state = _State(model, x, y, gradient=groups[0].steps > 0)
        walkers = [self._walker(group, x, state) for group in groups]
        for step in range(groups[0].steps):
            alive = [walker for walker in walkers if walker.steps > step]
            for walker in alive:
                walker.move(state, step)
            end = alive[-1].rows.stop
            more = any(walker.steps > step + 1 for walker in alive)
            state.evaluate(model, end, gradient=more)
            state.record(end)
            for walker in alive:
                if walker.steps > step + 1:
                    walker.adapt(state)
        adversarial = torch.where(state.robust.view(-1, 1, 1, 1), state.best, state.last_wrong)
        return AttackResult(state.best, adversarial, state.robust, F.softplus(state.best_loss).float())

    def _walker(self, group: Group, x: Tensor, state: _State) -> _Walker:
        if group.threat.norm == "L1":
            share = max(0.05, 12 / x[0].numel()) if self.l1_share is None else self.l1_share
            return _Sparse(group, x[group.rows], min(share, 1.0))
        return _Momentum(group, x[group.rows], state.best_loss[group.rows].clone())


class _State:
    """State of the search for the whole sorted batch, read and written by all walkers."""

    def __init__(self, model: Model, x: Tensor, y: Tensor, *, gradient: bool) -> None:
        self.y = y
        self.point = x.clone()
        self.before = x.clone()
        self.gradient = torch.zeros_like(x)
        self.loss = torch.zeros_like(y, dtype=x.dtype)
        self.correct = torch.ones_like(y, dtype=torch.bool)
        self.evaluate(model, len(x), gradient=gradient)
        self.best, self.best_gradient, self.best_loss = x.clone(), self.gradient.clone(), self.loss.clone()
        self.robust, self.last_wrong = self.correct.clone(), x.clone()

    def evaluate(self, model: Model, end: int, *, gradient: bool) -> None:
        """Evaluate log odds against the label, correctness and gradient at the current points [:end]."""
        if gradient:
            self.loss[:end], self.correct[:end], self.gradient[:end] = loss_and_gradient(
                model, self.point[:end], self.y[:end]
            )
        else:  # no example moves again, so the last backward is not needed
            logits = logits_of(model, self.point[:end])
            self.loss[:end] = log_odds(logits, self.y[:end])
            self.correct[:end] = logits.argmax(1) == self.y[:end]

    def record(self, end: int) -> None:
        """Update the best points, verdicts and last misclassified points of examples [:end]."""
        better = ~(self.loss[:end] <= self.best_loss[:end])  # NaN counts as better, so that the final check finds it
        wide = better.view(-1, 1, 1, 1)
        self.best[:end] = torch.where(wide, self.point[:end], self.best[:end])
        self.best_gradient[:end] = torch.where(wide, self.gradient[:end], self.best_gradient[:end])
        self.best_loss[:end] = torch.where(better, self.loss[:end], self.best_loss[:end])
        self.robust[:end] &= self.correct[:end]
        wide = self.correct[:end].view(-1, 1, 1, 1)
        self.last_wrong[:end] = torch.where(wide, self.last_wrong[:end], self.point[:end])

    def restart(self, rows: slice, which: Tensor) -> None:
        """Go back to the best point and its gradient where ``which`` (B,) is True."""
        wide = which.view(-1, 1, 1, 1)
        self.point[rows] = torch.where(wide, self.best[rows], self.point[rows])
        self.gradient[rows] = torch.where(wide, self.best_gradient[rows], self.gradient[rows])


class _Walker(ABC):
    """Moves the examples of one threat and adapts their step sizes every ``period`` steps."""

    period: int

    def __init__(self, group: Group, x: Tensor) -> None:
        self.threat, self.rows, self.steps = group
        self.x = x
        self.steps_since_check = 0

    def due(self) -> bool:
        """Count a step; return whether it completes a period."""
        self.steps_since_check = (self.steps_since_check + 1) % self.period
        return self.steps_since_check == 0

    @abstractmethod
    def move(self, state: _State, step: int) -> None:
        """Take step number ``step`` (from 0) by updating ``state.point`` and ``state.before``."""

    @abstractmethod
    def adapt(self, state: _State) -> None:
        """At the end of a period, adapt the step size to the progress made and perhaps go back to the best point."""

    def full(self, value: float) -> Tensor:
        return torch.full((len(self.x),), value, dtype=self.x.dtype, device=self.x.device)


class _Momentum(_Walker):
    """L2 and Linf: projected steps with momentum; the step size is halved where the loss oscillates or stalls."""

    def __init__(self, group: Group, x: Tensor, start_loss: Tensor) -> None:
        super().__init__(group, x)
        self.size = self.full(2 * self.threat.eps)
        self.period = max(int(0.22 * self.steps), 1)
        self.shorter, self.shortest = max(int(0.03 * self.steps), 1), max(int(0.06 * self.steps), 1)
        self.rises = torch.zeros_like(self.size)
        # the published code compares the first loss with a row of zeros, which counts as a rise
        self.previous_loss = torch.full_like(self.size, -torch.inf)
        self.halved = torch.ones_like(self.size, dtype=torch.bool)
        self.checked_loss = start_loss

    def move(self, state: _State, step: int) -> None:
        point, gradient = state.point[self.rows], state.gradient[self.rows]
        drift = point - state.before[self.rows]
        direction = signs(gradient) if self.threat.norm == "Linf" else unit(gradient)
        target = self.threat.project(point + self.size.view(-1, 1, 1, 1) * direction, self.x)
        a = 0.75 if step > 0 else 1.0
        state.before[self.rows] = point
        state.point[self.rows] = self.threat.project(point + a * (target - point) + (1 - a) * drift, self.x)

    def adapt(self, state: _State) -> None:
        loss, best_loss = state.loss[self.rows], state.best_loss[self.rows]
        self.rises += loss > self.previous_loss
        self.previous_loss = loss.clone()
        if not self.due():
            return
        stalled = ~self.halved & (self.checked_loss >= best_loss)
        self.halved = (self.rises <= 0.75 * self.period) | stalled
        self.checked_loss = best_loss.clone()
        self.size = torch.where(self.halved, self.size / 2, self.size)
        state.restart(self.rows, self.halved)
        self.rises = torch.zeros_like(self.rises)
        self.period = max(self.period - self.shorter, self.shortest)


class _Sparse(_Walker):
    """L1: sign steps on the coordinates with the largest gradients, whose number follows the best point's sparsity.

    Three things differ from the published code, each so that the search ends at fewer coordinates where fewer are
    better (docs/decisions/l1-projection.md): a change of the size of rounding errors does not count as moved, a
    coordinate that is already at the border of the box gets no share of a step, and the search can go from two
    coordinates down to one.
    """

    def __init__(self, group: Group, x: Tensor, share: float) -> None:
        super().__init__(group, x)
        self.period = max(int(0.04 * self.steps), 1)
        self.size = self.full(self.threat.eps)
        self.dimensions = x[0].numel()
        self.moving = self.full(math.ceil(round(share * self.dimensions, 6)))
        self.previous_count = self.full(float(self.dimensions))
        # at ties in the projection onto the ball, rounding decides between 0 and a change of this size
        self.residue = 1e-6 * self.threat.eps + 4 * torch.finfo(x.dtype).eps

    def move(self, state: _State, step: int) -> None:
        gradient, point, x = (each.flatten(1) for each in (state.gradient[self.rows], state.point[self.rows], self.x))
        room = torch.where(gradient > 0, 1 - x, x)
        gradient = gradient.masked_fill((room == 0) & (point == x), 0)
        magnitude = gradient.abs()
        rank = self.dimensions - self.moving.long()
        threshold = magnitude.sort(dim=1).values.gather(1, rank.unsqueeze(1))
        direction = signs(gradient) * (magnitude >= threshold)
        step_by = self.size.unsqueeze(1) * direction / (direction.abs().sum(dim=1, keepdim=True) + 1e-10)
        state.point[self.rows] = self.threat.project(state.point[self.rows] + step_by.view_as(self.x), self.x)

    def adapt(self, state: _State) -> None:
        if not self.due():
            return
        moved = (state.best[self.rows] - self.x).abs() > self.residue
        count = moved.flatten(1).sum(dim=1).to(self.size.dtype)
        sparser = count / self.previous_count < 0.95
        self.moving = (count / 1.5).ceil().minimum(count - 1).clamp(min=1)
        self.size = torch.where(sparser, self.threat.eps, (self.size / 1.5).clamp(min=self.threat.eps / 10))
        self.previous_count = count
        state.restart(self.rows, sparser)
