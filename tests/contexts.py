"""What methods work with, made without a run."""

from __future__ import annotations

from torch import nn

from rome.attacks import Attack
from rome.core.randomness import stream
from rome.experts import Regularizer
from rome.methods import Method, TrainContext
from rome.runs.optim import AdamW
from rome.threats import CIFAR10


def context_of(method: Method, model: nn.Module, regularizer: Regularizer | None, attack: Attack) -> TrainContext:
    """What a method works with, under CIFAR-10's threats and without a run."""
    return TrainContext(
        model=model,
        threats=method.trained(tuple(CIFAR10), attack),
        attack=attack,
        regularizer=regularizer,
        attack_stream=stream(0, "attack"),
        threat_stream=stream(0, "threats"),
        new_optimizer=AdamW(lr=1e-3).build,
        lr=1e-3,
        epochs=range(2),
    )
