"""What methods work with, made without a run; and a small network that they train."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from rome.attacks import PGD, Attack
from rome.core.randomness import stream
from rome.experts import Diversification, Regularizer, add_experts, expert_layers, record_gates
from rome.methods import TrainContext
from rome.runs.optim import AdamW
from rome.threats import Threat, budgets

BUDGETS = budgets(1.6, 0.4, 0.07)  # about equally strong for :func:`network`
NO_ATTACK = PGD(steps=0, random_start=False)


def network(*, experts: bool) -> nn.Module:
    """Two layers on the digits, float64, so that attacking in another batch changes no digit that matters."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 10))
    if experts:
        add_experts(model, layers=("1", "4"), experts=3, rank=2)
        for layer in expert_layers(model).values():
            nn.init.normal_(layer.B, std=0.1)
    return model.double().train()


def context_of(
    model: nn.Module,
    *,
    threats: Iterable[Threat] = BUDGETS,
    attack: Attack | None = None,
    regularizer: Regularizer | None = None,
    rank: int = 0,
    world: int = 1,
    seed: int = 0,
    **more: Any,
) -> TrainContext:
    """What a method works with in one of ``world`` processes; ``more`` are further fields of the context."""
    return TrainContext(
        model=model,
        threats=tuple(threats),
        attack=attack or PGD(steps=3),
        regularizer=regularizer,
        attack_stream=stream(seed, "attack", rank=rank, world=world),
        threat_stream=stream(seed, "threats", rank=rank, world=world),
        new_optimizer=AdamW(lr=1e-3).build,
        **more,
    )


def gates_of_last_forward(model: nn.Module, images: Tensor, labels: Tensor, **settings: Any) -> Tensor:
    with record_gates(model) as recorder:
        model(images)
    return Diversification(**settings).loss(recorder.complete(), labels, 3)
