"""The contract of a training method, which turns a batch and some threats into a loss.

A method has its own settings and state; the training loop treats all methods alike. The order of calls is

    prepare, load_state (when a run is resumed), then for each epoch
    epoch_start, { loss (once for each accumulation step), update_end } for each update, epoch_end

State that must survive a kill goes through :meth:`Method.state` and :meth:`Method.load_state` into the checkpoint.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rome.attacks import Attack
from rome.attacks.engine import Plan
from rome.core.component import Component
from rome.core.errors import UserError
from rome.core.randomness import Stream
from rome.core.wrappers import unwrapped
from rome.experts import Experts, Regularizer, record_gates
from rome.threats import Threat


@dataclass
class TrainContext:
    """The objects that a method works with, the same for every update of a run."""

    model: nn.Module
    """The model to train; its forward may be wrapped for several processes."""
    threats: tuple[Threat, ...]
    """The threats that the method trains on, as :meth:`Method.training_threats` derived them from the config's."""
    attack: Attack
    regularizer: Regularizer | None
    """The loss on the gates; None if the model has no experts, or the config no regularizer."""
    attack_stream: Stream
    """Random numbers of the attack, such as random starts."""
    threat_stream: Stream
    """Random numbers that assign threats to examples."""
    new_optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    """Builds the run's optimizer for another model, for methods that train further ones."""
    lr: float = 0.0
    """Learning rate of the current update."""
    epochs: range = range(1)
    """The epochs of the run in which the method trains: all except the natural ones, which come first."""
    epoch: int = 0
    """The current epoch, counted from 0."""

    @property
    def attacked(self) -> nn.Module:
        """The model without the wrapper for several processes, as attacks call it."""
        return unwrapped(self.model)


class Examples(NamedTuple):
    """The examples that an update trains on, made from a batch by the method's attack."""

    images: Tensor
    """(B', C, H, W)."""
    y: Tensor
    """(B',) int64, the classes."""
    labels: Tensor
    """(B',) int64, the threats, as positions in ``TrainContext.threats``."""
    more: tuple[Tensor, ...] = ()
    """Further tensors that the method's objective needs."""


class Planned(NamedTuple):
    """An attack whose random numbers are drawn, and how its results become the examples to train on."""

    attack: Plan
    more: tuple[Tensor, ...]
    """Further tensors of the examples: classes, threats ..."""
    examples: Callable[..., Examples]
    """Makes the examples from the attack's results and ``more``, without any other tensors."""

    def run(self) -> Examples:
        """Run the attack."""
        return self.examples(self.attack.run(), *self.more)


@dataclass
class Outcome:
    """The loss of one batch, and the values to log for it."""

    loss: Tensor
    """The scalar to call backward on."""
    labels: Tensor
    """(B',) int64, the threat of each training example, as a position in ``TrainContext.threats``."""
    correct: Tensor
    """(B',) bool, whether each example is classified correctly in the training forward."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """Named scalars, detached: ``cross_entropy``, ``regularizer`` ..."""

    def add(self, name: str, term: Tensor) -> None:
        """Add a term to the loss, and log it under this name."""
        self.loss = self.loss + term
        self.parts[name] = term.detach()


class Method(Component):
    """A training method: how adversarial examples for several threats become one loss."""

    default_kind = "random"
    papers: ClassVar[tuple[str, ...]] = ()
    """Keys of the papers to cite, in ``papers.bib``."""
    own_attack: ClassVar[str] = ""
    """The attack that it uses instead of the config's ``attack``, which then has no effect; empty: the config's."""
    own_experts: ClassVar[str] = ""
    """The only kind of experts that it can train; empty: any kind, or none."""
    own_natural: ClassVar[bool] = False
    """Whether it also trains in natural epochs, under a single threat without perturbations; if not, RANDOM does."""
    partial_gradients: ClassVar[bool] = False
    """Whether some parameters may have no gradient in an update (training on several processes depends on it)."""

    def training_threats(self, threats: tuple[Threat, ...], attack: Attack) -> tuple[Threat, ...]:
        """Return the threats that it trains on, given those of the config.

        Raises:
            UserError: it cannot train on these threats, or not with this attack.
        """
        for threat in threats:
            searcher, inside = threat.resolve_attack(attack)
            searcher.steps_for(inside)
        return threats

    def check(self, threats: tuple[Threat, ...], experts: Experts | None, epochs: range) -> None:
        """Check that it can train the model of a config.

        Args:
            threats: as returned by :meth:`training_threats`.
            experts: the model's experts, if any.
            epochs: as in :class:`TrainContext`.

        Raises:
            UserError: it cannot train such a model, or not in this number of epochs.
        """
        kind = "none" if experts is None else experts.kind
        if self.own_experts not in ("", kind):
            own = self.own_experts
            raise UserError(f"it trains experts of kind {own}, but the model has {kind}; set experts.kind={own}")
        if experts is not None and experts.own_method and not self.own_experts:
            able = [name for name, method in Method.members().items() if method.own_experts == kind]
            raise UserError(f"experts of kind {kind} have a method of their own; set method.kind={' or '.join(able)}")

    def stages(self, epochs: range) -> tuple[range, ...]:
        """Split the epochs into stages within which every update does the same kind of work."""
        return (epochs,)

    def prepare(self, context: TrainContext) -> None:
        """Create whatever is derived from the model, such as a copy. Called once, before everything else.

        ``context.model`` is not yet wrapped for several processes here; its weights are those at the start of the run.
        """

    @abstractmethod
    def loss(self, context: TrainContext, x: Tensor, y: Tensor) -> Outcome:
        """Attack the batch (B, C, H, W), run the training forward and return the loss."""

    def epoch_start(self, context: TrainContext, epoch: int) -> None:
        """Called before the first update of each epoch (counted from 0)."""

    def update_end(self, context: TrainContext) -> None:
        """Called after every step of the optimizer."""

    def epoch_end(self, context: TrainContext, epoch: int) -> None:
        """Called after the last update of each epoch."""

    def state(self) -> dict[str, Any]:
        """Return the tensors and plain values that must survive a kill."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""


class MinMaxMethod(Method):
    """A method in two parts: the attack (inner maximisation) and the training forward (outer minimisation)."""

    @abstractmethod
    def perturb(self, context: TrainContext, x: Tensor, y: Tensor) -> Examples:
        """Assign a threat to each example, and attack the batch (B, C, H, W)."""

    def objective(self, context: TrainContext, examples: Examples) -> Outcome:
        """Run the training forward and return the loss.

        It depends only on the examples and the weights and never waits for the device, so that it can be replayed as a
        CUDA graph (:mod:`rome.core.graphs`).
        """
        return training_forward(context, examples.images, examples.y, examples.labels)

    def loss(self, context: TrainContext, x: Tensor, y: Tensor) -> Outcome:
        return self.objective(context, self.perturb(context, x, y))


class PlannedMethod(MinMaxMethod):
    """A method that decides nothing once its attack has begun. On a GPU, an update is replayed as one CUDA graph, from
    the attack to the step of the optimizer (:mod:`rome.training.step`)."""

    @abstractmethod
    def plan(self, context: TrainContext, x: Tensor, y: Tensor) -> Planned:
        """Assign a threat to each example of a batch (B, C, H, W), and plan the attack."""

    def perturb(self, context: TrainContext, x: Tensor, y: Tensor) -> Examples:
        return self.plan(context, x, y).run()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times the group's ``lr_scale`` if it has one. For fused
    optimizers it is rounded to float32, the precision in which a CUDA graph reads it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group.get("fused"):
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32).item()


def named(threats: tuple[Threat, ...], names: Iterable[str], owner: str) -> tuple[Threat, ...]:
    """The threats with these names, in the order of the names.

    Args:
        owner: the kind of the method, for messages.

    Raises:
        UserError: there is no threat of one of these names.
    """
    found = {threat.name: threat for threat in threats}
    for name in names:
        if name not in found:
            raise UserError(f"{owner} trains on {name}, which is missing from threats (there are {', '.join(found)})")
    return tuple(found[name] for name in names)


def training_forward(
    context: TrainContext,
    images: Tensor,
    y: Tensor,
    labels: Tensor,
    join: Callable[[Tensor], Tensor] = torch.mean,
) -> Outcome:
    """One forward of the training model on adversarial images (B', C, H, W): cross-entropy plus the weighted
    regularizer (Eq. 9).

    Args:
        labels: (B',), the threat of each image.
        join: reduces the cross-entropies (B',) to a scalar loss.
    """
    logits, penalty = training_logits(context, images, labels)
    losses = F.cross_entropy(logits, y, reduction="none")
    return combine(join(losses), penalty, labels, logits.detach().argmax(dim=1) == y)


def training_logits(context: TrainContext, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
    """One forward of the training model, with the gates recorded.

    Args:
        images: (B', C, H, W).
        labels: the threats of the first ``len(labels)`` images; the regularizer ignores the remaining images.

    Returns:
        The logits (B', classes) in float32, and the weighted regularizer (scalar) or None.
    """
    regularizer = context.regularizer
    if regularizer is None:
        return context.model(images).float(), None
    with record_gates(context.attacked, detached=regularizer.gradient == "gates") as recorder:
        logits = context.model(images).float()
    records = recorder.complete()
    if len(labels) < len(images):
        records = [record._replace(gates=record.gates.first(len(labels))) for record in records]
    with torch.autocast(images.device.type, enabled=False):  # mean gates may differ by less than bf16 resolves
        penalty = regularizer.loss(records, labels, len(context.threats))
    learning = [record for record in records if any(p.requires_grad for p in record.layer.gate_parameters())]
    if torch.is_grad_enabled() and not all(record.gates.weights.requires_grad for record in learning):
        raise UserError(
            "the gates were recorded without gradients, so their loss would have no effect: reentrant gradient "
            "checkpointing hides them; use torch's other form (use_reentrant=False) or none"
        )
    return logits, regularizer.weight * penalty


def combine(loss: Tensor, penalty: Tensor | None, labels: Tensor, correct: Tensor) -> Outcome:
    """The outcome for a cross-entropy loss and a weighted regularizer."""
    outcome = Outcome(loss, labels, correct, {"cross_entropy": loss.detach()})
    if penalty is not None:
        outcome.add("regularizer", penalty)
    return outcome
