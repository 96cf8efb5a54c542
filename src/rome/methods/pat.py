"""Perceptual adversarial training (PAT), and PAT with variation regularization (paper 5.2, Table 2)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr
from torch import Tensor

from rome.attacks import Attack, FastLPA
from rome.attacks.perceptual.fast_lpa import FastLPAWithPair
from rome.attacks.perceptual.features import ALL, Perception, loaded
from rome.core.component import Names, Number
from rome.core.errors import UserError
from rome.methods.base import Examples, MinMaxMethod, Outcome, TrainContext, combine, training_logits
from rome.methods.mixing import equal_shares
from rome.models import file_hash, weights_file
from rome.threats import Perceptual, PerExample, Threat


class PAT(MinMaxMethod):
    """PAT: cross-entropy on Fast-LPA examples (Laidlaw et al. 2021), each inside one of the perceptual threats.

    Only examples that the model classifies correctly in evaluation mode are attacked; it is trained on the others as
    they are. Every threat gets an equal share of the global batch, as in RANDOM, and all are attacked at once. The
    attack and the threats of the config have no effect on training; they are used to evaluate the model.
    """

    kind = "pat"
    papers: ClassVar[tuple[str, ...]] = ("laidlaw2021perceptual",)
    own_attack: ClassVar[str] = "fast-lpa"
    features: Names = Field(default=("self", "runs/alexnet"), min_length=1)
    """The networks that measure distances, one for each threat: ``self`` for the model being trained, otherwise the
    folder of a run or a safetensors file saved by rome. The paper uses ``self`` and an AlexNet."""
    layers: Names = ()
    """The modules of ``self`` whose activations are compared; empty: those of
    :func:`rome.attacks.perceptual.features.feature_layers`."""
    bound: Number = Field(default=0.5, gt=0)
    """The largest perceptual distance allowed; 0.5 on CIFAR-10, 0.25 on ImageNet-100."""
    steps: int = Field(default=10, ge=1)
    """Steps of Fast-LPA."""
    _threats: tuple[Perceptual, ...] = PrivateAttr(default=())
    """The threats with their networks loaded."""
    _hashes: dict[str, str] = PrivateAttr(default_factory=dict)
    """SHA-256 of each network's file."""

    def training_threats(self, threats: tuple[Threat, ...], attack: Attack) -> tuple[Threat, ...]:
        found = tuple(
            Perceptual(bound=self.bound, features=network, layers=self.layers if network == "self" else ())
            for network in self.features
        )
        names = [threat.name for threat in found]
        if len(set(names)) < len(names):
            raise UserError(
                f"features {', '.join(self.features)} give threats of the same name ({', '.join(names)}); name each "
                "network once, or rename a folder"
            )
        return found

    def prepare(self, context: TrainContext) -> None:
        device = next(context.attacked.parameters()).device
        found = []
        for threat in context.threats:
            assert isinstance(threat, Perceptual)
            try:
                found.append(loaded(threat, device))
            except UserError as error:
                raise UserError(f"{self.kind}: {error}, in a config by method.features=[self, PATH]") from error
        Perception(context.attacked, [(threat, ALL) for threat in found])  # raises UserError if layers do not exist
        self._threats = tuple(found)
        self._hashes = {name: file_hash(weights_file(name)) for name in self.features if name != "self"}

    def perturb(self, context: TrainContext, x: Tensor, y: Tensor) -> Examples:
        labels = equal_shares(context.threat_stream, len(x), len(self._threats))
        mixture = PerExample(self._threats, labels)
        attack = FastLPA(steps=self.steps, only_correct=True)
        images = attack(context.attacked, x, y, mixture, generator=context.attack_stream)
        return Examples(images, y, labels)

    def state(self) -> dict[str, Any]:
        return {"networks": self._hashes}

    def load_state(self, state: dict[str, Any]) -> None:
        for name, found in self._hashes.items():
            if state["networks"][name] != found:
                raise UserError(f"{name} is not the network that this run started with; restore it, or start anew")


class VR(PAT):
    """PAT+VR: PAT plus the variation of the logits inside the threat (Dai et al. 2022, "Formulating robustness against
    unforeseen attacks").

    ``loss = CE(f(x_adv), y) + weight * mean |f(x') - f(x'')|_2``, where x' and x'' are found by a Fast-LPA that
    increases this distance. The three images of an example share a threat and a search; RoME's regularizer uses only
    x_adv.
    """

    kind = "vr"
    papers = ("dai2022formulating", "laidlaw2021perceptual")
    weight: Number = Field(default=0.1, ge=0)
    """The weight of the variation, lambda."""

    def perturb(self, context: TrainContext, x: Tensor, y: Tensor) -> Examples:
        labels = equal_shares(context.threat_stream, len(x), len(self._threats))
        mixture = PerExample(self._threats, labels.repeat_interleave(3))
        images, classes = x.repeat_interleave(3, dim=0), y.repeat_interleave(3)
        attack = FastLPAWithPair(steps=self.steps, only_correct=True)
        images = attack(context.attacked, images, classes, mixture, generator=context.attack_stream)
        adversarial, *pair = images.view(-1, 3, *x.shape[1:]).unbind(1)
        return Examples(adversarial, y, labels, tuple(pair))

    def objective(self, context: TrainContext, examples: Examples) -> Outcome:
        adversarial, y, labels, (one, other) = examples
        logits, penalty = training_logits(context, torch.cat([adversarial, one, other]), labels)
        logits, one, other = logits.chunk(3)
        outcome = combine(F.cross_entropy(logits, y), penalty, labels, logits.detach().argmax(dim=1) == y)
        outcome.add("variation", self.weight * torch.linalg.vector_norm(one - other, dim=1).mean())
        return outcome
