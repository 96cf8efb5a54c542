"""MORE: train one expert for each threat, then their gate."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rome.core.errors import UserError
from rome.experts import Experts, ModelMixture, Networks
from rome.methods.base import Method, Outcome, TrainContext
from rome.methods.mixing import Random
from rome.threats import PerExample, Threat


class MORE(Method):
    """MORE: a network for each threat, trained on that threat only; then a gate network and the experts' last layers.

    Cheng et al., "Mixture of robust experts (MORE)" (arXiv 2104.10586), in the form that the paper compares with:
    experts for L1, L2 and Linf and none for clean images. First stage: in every update, expert p trains on the whole
    batch, attacked under threat p through expert p alone. The loss is the sum of the experts' cross-entropies, so each
    expert gets the gradient of adversarial training on its own threat. Second stage: the experts' bodies are frozen, in
    evaluation mode; the gate and the experts' classifiers are trained like RANDOM, per example, on attacks against the
    mixture itself. (The authors' code attacks an untrained network instead.) A regularizer on the gates is used in the
    second stage only.

    Natural epochs train the first expert, and all experts then start from its weights. For a learning-rate curve in
    each stage, give the config a single schedule with two ramps.
    """

    kind = "more"
    papers = ("cheng2021mixture",)
    own_experts = "more"
    own_natural = True
    partial_gradients = True
    expert_epochs: int | None = Field(default=None, ge=1)
    """Epochs of the first stage, after the natural ones; null: half of the non-natural epochs, rounded down."""

    def stages(self, epochs: range) -> tuple[range, ...]:
        first = len(epochs) // 2 if self.expert_epochs is None else self.expert_epochs
        return epochs[:first], epochs[first:]

    def check(self, threats: tuple[Threat, ...], experts: Experts | None, epochs: range) -> None:
        super().check(threats, experts, epochs)
        _check_one_each(threats, experts.experts if isinstance(experts, Networks) else 0)
        if not all(self.stages(epochs)):
            raise UserError(
                f"it needs epochs for the experts and epochs for the gate, but has {len(epochs)} (epochs minus "
                f"natural_epochs) with expert_epochs {self.expert_epochs or 'null'}; raise epochs or lower the others"
            )

    def prepare(self, context: TrainContext) -> None:
        _check_one_each(context.threats, mixture_of(context.attacked).experts)

    def loss(self, context: TrainContext, x: Tensor, y: Tensor) -> Outcome:
        mixture = mixture_of(context.attacked)
        if context.epoch < context.epochs.start:
            with mixture.separate_experts(0):
                return Random().loss(replace(context, regularizer=None), x, y)
        if context.epoch in self.stages(context.epochs)[0]:
            return self._expert_loss(context, mixture, x, y)
        mixture.freeze_bodies()
        return Random().loss(context, x, y)

    def epoch_start(self, context: TrainContext, epoch: int) -> None:
        if 0 < epoch == context.epochs.start:
            mixture_of(context.attacked).follow_first()

    def _expert_loss(self, context: TrainContext, mixture: ModelMixture, x: Tensor, y: Tensor) -> Outcome:
        """The loss of all experts, each under its own threat, in one forward, so that processes synchronize once."""
        images = []
        for expert, threat in enumerate(context.threats):
            with mixture.separate_experts(expert):
                images.append(context.attack(context.attacked, x, y, threat, generator=context.attack_stream))
        with mixture.separate_experts(*range(len(images))):
            logits = context.model(torch.cat(images)).float()
        labels, y = PerExample.repeated(context.threats, len(x)).labels, y.repeat(len(images))
        loss = F.cross_entropy(logits, y)  # the mean over experts and examples
        parts = {"cross_entropy": loss.detach()}
        return Outcome(len(images) * loss, labels, logits.detach().argmax(dim=1) == y, parts)


def mixture_of(model: nn.Module) -> ModelMixture:
    """The mixture of networks in a model.

    Raises:
        UserError: the model has none.
    """
    found = next((module for module in model.modules() if isinstance(module, ModelMixture)), None)
    if found is None:
        raise UserError("method more trains a mixture of networks, but this model has none; set experts.kind=more")
    return found


def _check_one_each(threats: tuple[Threat, ...], experts: int) -> None:
    """Raise UserError unless there is one expert for each threat."""
    if len(threats) != experts:
        raise UserError(
            f"it trains one expert for each of the {len(threats)} threats, not {experts}; "
            f"set experts.experts={len(threats)}"
        )
