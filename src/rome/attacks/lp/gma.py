"""The gating misrouting attack, which attacks the classifier and its gates together (paper 5.2, A1)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rome.attacks.base import NOT_EVALUATED, Attack, AttackResult, Group, Steps, StepSize
from rome.attacks.engine import Model, at_least_float32
from rome.attacks.lp.pgd import random_start
from rome.core.component import Number
from rome.core.errors import UserError
from rome.experts import Gates, expert_layers, record_gates
from rome.experts.gated import MeanOver, count_layers
from rome.threats import LpBall, Threat
from rome.threats.projections import signs


class GMA(Attack):
    """Gating misrouting attack: PGD in an Linf ball that also steers tokens to the experts that they use least.

    It ascends CE(f(x'), y) - weight * (1/L) sum_l (1/T) sum_i -log g_i^(l)(x')[k*_i], where k*_i is the expert with the
    least weight at token i of layer l on the clean image; it is chosen once. g are the gates' weights (Eq. 5), which
    are probabilities already. Every module with gates counts, whatever its experts; without any the attack is PGD on
    the cross-entropy. Steps, weight and radius (8/255, in the threat) are the paper's; the step size, the uniform start
    and returning the last iterate are ours.
    """

    kind = "gma"
    accepts = (LpBall, "searches inside Linf balls such as LpBall(norm='Linf', eps=8/255)")
    draws_by_image: ClassVar[bool] = True
    steps: Steps = 20
    """Iterations of the search."""
    step_size: StepSize = 2 / 255
    """How far a pixel moves in a step, on the scale [0, 1]."""
    weight: Number = Field(default=1, ge=0)
    """Weight of the misrouting term relative to the cross-entropy."""
    mean_over: MeanOver = "layers"
    """What L counts: layers with gates, or blocks (literal), which sum the terms of their ``qkv`` and ``proj``."""
    random_start: bool = True
    """Start at a random point of the ball instead of the image."""

    def accepted(self, threat: Threat) -> LpBall:
        ball: LpBall = super().accepted(threat)
        if ball.norm != "Linf":
            raise UserError(f"{self.kind} {self.accepts[1]}, not {ball.norm}")
        return ball

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        x_adv = x.clone()
        if self.random_start:
            for ball, rows, _ in groups:
                x_adv[rows] = random_start(ball, x[rows], noise[rows].to(x.dtype))
        layers = list(expert_layers(model).values()) if isinstance(model, nn.Module) else []
        weight = self.weight * len(layers) / max(count_layers(layers, self.mean_over), 1)
        targets = [gates.weights.argmin(dim=-1, keepdim=True) for gates in answer(model, x)[1]] if self.steps else []
        for _ in range(self.steps):
            here = x_adv.detach().requires_grad_()
            with torch.enable_grad():
                logits, gates = answer(model, here)
                gain = F.cross_entropy(logits, y, reduction="none") - weight * misrouting(gates, targets, logits)
                (gradient,) = torch.autograd.grad(gain.sum(), here)
            for ball, rows, _ in groups:
                x_adv[rows] = ball.project(x_adv[rows] + self.step_size * signs(gradient[rows]), x[rows])
        return AttackResult(x_adv, x_adv, torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)


def answer(model: Model, x: Tensor) -> tuple[Tensor, list[Gates]]:
    """Return the logits and the gates of every layer with experts (none if the model has no experts).

    Raises:
        UserError: the model's gates are already being recorded, or a layer did not run.
    """
    if not isinstance(model, nn.Module) or not expert_layers(model):
        logits, gates = model(x), []
    else:
        with record_gates(model) as recorder:
            logits = model(x)
        gates = [record.gates for record in recorder.complete()]
    return at_least_float32(logits), gates


def misrouting(gates: list[Gates], targets: list[Tensor], like: Tensor) -> Tensor:
    """(1/L) sum_l (1/T) sum_i -log g_i[k*_i] over L layers: (B,), zero without gates.

    Args:
        gates: one for each layer, weights (B, T, K).
        targets: k* for each layer, int64 (B, T, 1).
        like: a tensor (B, ...) with the result's device and dtype.
    """
    total = like.new_zeros(len(like))
    for layer, target in zip(gates, targets, strict=True):
        g = layer.weights.to(like.dtype).clamp(min=torch.finfo(like.dtype).tiny)
        total = total - g.gather(-1, target).log().mean(dim=(1, 2)) / len(gates)
    return total
