"""RAMP: train on the worse of two threats, pair their logits, and fuse the weights with those of clean training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from rome.attacks import Attack
from rome.core.component import Number
from rome.core.distributed import average, follow_first, total, world_size
from rome.methods.base import Examples, MinMaxMethod, Outcome, TrainContext, combine, named, set_lr, training_logits
from rome.threats import PerExample, Threat


class RAMP(MinMaxMethod):
    """RAMP: the worse of two threats, paired logits, and weights fused with those of clean training.

    Jiang and Singh, "RAMP: Boosting adversarial robustness against multiple lp perturbations for universal robustness"
    (NeurIPS 2024; github.com/uiuc-focal-lab/RAMP). With x_s and x_t the example under source and target and x_w the
    one with the higher loss in the attack,

        loss = mean CE(f(x_w), y) + weight * mean over S of KL(softmax f(x_s) || softmax f(x_t))

    S are the examples of the global batch whose x_s the training forward classifies correctly; gradients flow through
    both sides of the KL divergence. Once per epoch the weights are fused (:func:`fuse`) with those of a copy that
    started from the same weights and was trained on the same batches, unperturbed. Fine-tuning uses a smaller weight
    and no fusion.
    """

    kind = "ramp"
    papers = ("jiang2024ramp",)
    source: str = "Linf"
    """Name of the threat, among the config's, with whose logits those of the target are paired."""
    target: str = "L1"
    """Name of the second threat, among the config's."""
    weight: Number = Field(default=5, ge=0)
    """lambda, the weight of the pairing loss. The authors' scripts use 5 from scratch (2 with ``trades``) and 1.5 for
    fine-tuning, their paper 2 and 0.5."""
    fusion: Number | None = Field(default=0.5, ge=0, le=1)
    """beta, the share of clean training in the fused weights; null or 0: no copy and no fusion."""
    trades: Number | None = Field(default=None, ge=0)
    """Unless null, CE(f(x), y) + trades * KL(softmax f(x) || softmax f(x_w)) replaces CE(f(x_w), y), as in Zhang et al.
    2019; the authors use this for wide residual networks, with 6."""
    _clean: _CleanCopy | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _distinct(self) -> RAMP:
        if self.source == self.target:
            raise ValueError(f"source and target are both {self.source}; name two threats")
        return self

    def training_threats(self, threats: tuple[Threat, ...], attack: Attack) -> tuple[Threat, ...]:
        return super().training_threats(named(threats, (self.source, self.target), self.kind), attack)

    def prepare(self, context: TrainContext) -> None:
        self._clean = _CleanCopy(context.model, context.new_optimizer) if self.fusion else None

    def perturb(self, context: TrainContext, x: Tensor, y: Tensor) -> Examples:
        # the copy first: its activations are freed before the attack starts
        clean_loss = () if self._clean is None else (self._clean.backward(x, y),)
        # example by example, so that the random numbers of a process are a slice of those of the global batch
        pairs, labels = PerExample(context.threats, torch.arange(2).repeat(len(x))), y.repeat_interleave(2)
        found = context.attack.run(
            context.attacked, x.repeat_interleave(2, dim=0), labels, pairs, generator=context.attack_stream
        )
        return Examples(found.images, labels, pairs.labels, (x, y, found.loss, *clean_loss))

    def objective(self, context: TrainContext, examples: Examples) -> Outcome:
        images, labels, threats, (x, y, attack_loss, *clean_loss) = examples
        images = images if self.trades is None else torch.cat([images, x])
        logits, penalty = training_logits(context, images, threats)
        logits, clean = logits[: len(labels)], logits[len(labels) :]
        losses = F.cross_entropy(logits, labels, reduction="none")
        # NaN: the attack maximizes another loss
        attack_loss = torch.where(attack_loss.isnan(), losses.detach(), attack_loss)
        worse = attack_loss.view(-1, 2).argmax(dim=1, keepdim=True)
        correct = logits.detach().argmax(dim=1) == labels
        both, right = logits.view(len(x), 2, -1), correct.view(-1, 2)[:, 0]
        if self.trades is None:
            outcome = combine(losses.view(-1, 2).gather(1, worse).mean(), penalty, threats, correct)
        else:
            outcome = combine(F.cross_entropy(clean, y), penalty, threats, correct)
            worst = both.gather(1, worse.unsqueeze(2).expand(-1, 1, both.shape[2])).squeeze(1)
            outcome.add("trades", self.trades * divergence(clean, worst).mean())
        # the mean over S of the global batch: gradients and logged parts are averaged over processes
        share = world_size() / total(right.sum()).clamp(min=1)
        outcome.add("pairing", self.weight * share * (divergence(both[:, 0], both[:, 1]) * right).sum())
        if clean_loss:
            outcome.parts["clean_copy"] = clean_loss[0]
        return outcome

    def epoch_start(self, context: TrainContext, epoch: int) -> None:
        if self._clean is not None:
            self._clean.restart(context.attacked)

    def update_end(self, context: TrainContext) -> None:
        if self._clean is not None:
            self._clean.step(context.lr)

    def epoch_end(self, context: TrainContext, epoch: int) -> None:
        if self._clean is not None and self.fusion:
            self._clean.fuse_into(context.attacked, self.fusion)

    def state(self) -> dict[str, Any]:
        return self._clean.state() if self._clean is not None else {}

    def load_state(self, state: dict[str, Any]) -> None:
        if self._clean is not None:
            self._clean.load_state(state)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(softmax p || softmax q) for each row, differentiable in both: (B, classes), (B, classes) -> (B,)."""
    log_p, log_q = p.log_softmax(dim=1), q.log_softmax(dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def fuse(start: Tensor, clean: Tensor, robust: Tensor, share: float) -> Tensor:
    """RAMP's gradient projection for one tensor: w + (1 - b) (w_a - w) + b max(0, cos(w_n - w, w_a - w)) (w_n - w).

    Args:
        start: w, the tensor at the start of the epoch.
        clean: w_n, after the epoch on clean images.
        robust: w_a, after the epoch on adversarial images.
        share: b, the share of clean training.

    Returns:
        The fused tensor; a copy of ``robust`` if that is a scalar or not of floating point.
    """
    if not start.ndim or not start.is_floating_point():
        return robust.clone()
    by_clean, by_robust = clean - start, robust - start
    agreement = F.cosine_similarity(by_clean.flatten(), by_robust.flatten(), dim=0).clamp(min=0)
    return start + (1 - share) * by_robust + share * agreement * by_clean


class _CleanCopy:
    """A copy of the model that takes the same updates on clean images and starts each epoch from the fused weights.

    It is updated together with the model, so that a run can stop and resume between any two updates.
    """

    def __init__(self, model: nn.Module, new_optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
        self.model = copy.deepcopy(model).train()
        self.optimizer = new_optimizer(self.model)
        self.start: dict[str, Tensor] = {}
        """Weights and buffers at the start of the epoch; empty between epochs."""
        self.parts = 0
        """Accumulation steps of the current update."""

    def restart(self, model: nn.Module) -> None:
        """Start an epoch from the model's weights."""
        self.start = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.model.load_state_dict(self.start)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Add the gradients of the mean cross-entropy, and return the latter."""
        loss = F.cross_entropy(self.model(x).float(), y)
        with torch.autocast(x.device.type, enabled=False):
            torch.autograd.backward(loss)
        self.parts += 1
        return loss.detach()

    def step(self, lr: float) -> None:
        """Take an optimizer step with the mean gradient over accumulation steps and processes."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]  # the same in every process
        for gradient in gradients:
            gradient /= self.parts
        average(gradients)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.parts = 0

    def fuse_into(self, model: nn.Module, share: float) -> None:
        """End an epoch: set the model's weights to the fusion (:func:`fuse`) of both."""
        clean, robust = self.model.state_dict(), model.state_dict()
        fused = {name: fuse(start, clean[name], robust[name], share) for name, start in self.start.items()}
        follow_first(fused.values())  # BatchNorm's statistics differ between processes
        model.load_state_dict(fused)
        self.start = {}

    def state(self) -> dict[str, Any]:
        return {"copy": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "start": self.start}

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["copy"])
        self.optimizer.load_state_dict(state["optimizer"])
        own = self.model.state_dict()
        self.start = {name: value.to(own[name].device) for name, value in state["start"].items()}
