"""Statistics of updates: summed over accumulation steps and processes, averaged over an epoch, written to the log."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rome.methods import Outcome


@dataclass(frozen=True)
class Update:
    """Statistics of one update, over all processes."""

    number: int
    """Updates so far, including this one."""
    epoch: float
    """Epochs so far, including fractions."""
    loss: float
    parts: dict[str, float]
    accuracy: dict[str, float]
    """Training accuracy (0 to 1) under each threat that occurred in this update."""
    lr: float
    images_per_second: float


class Tally:
    """Sums over accumulation steps and processes, read once per update."""

    def __init__(self, threats: int, device: torch.device) -> None:
        self.threats, self.device = threats, device
        self.loss = torch.zeros((), device=device)
        self.parts: dict[str, Tensor] = {}
        self.correct = torch.zeros(2, threats, device=device)

    def add(self, outcome: Outcome) -> None:
        self.loss += outcome.loss.detach()
        for name, value in outcome.parts.items():
            self.parts[name] = self.parts.get(name, torch.zeros_like(self.loss)) + value
        labels = outcome.labels.to(self.device, non_blocking=True)
        ones = torch.ones_like(labels, dtype=self.correct.dtype)
        self.correct[0].index_add_(0, labels, outcome.correct.to(ones.dtype))
        self.correct[1].index_add_(0, labels, ones)

    def read(
        self, fabric: Any, accumulate: int, news: Sequence[int]
    ) -> tuple[float, dict[str, float], dict[int, float], list[int]]:
        """Mean loss, mean parts, accuracy by threat, and the elementwise maximum of ``news`` over all processes.

        Args:
            accumulate: number of outcomes that were added.
            news: numbers of this process that all processes are to know.
        """
        means = torch.stack([self.loss, *self.parts.values()]) / accumulate
        end = len(means) + self.correct.numel()
        row = torch.cat([means, self.correct.flatten(), torch.tensor([float(each) for each in news]).to(self.device)])
        if fabric.world_size > 1:
            gathered = [torch.empty_like(row) for _ in range(fabric.world_size)]
            torch.distributed.all_gather(gathered, row)
            rows = torch.stack(gathered)
            row = torch.cat([rows[:, : len(means)].mean(0), rows[:, len(means) : end].sum(0), rows[:, end:].amax(0)])
        values = row.tolist()
        right, seen = values[len(means) : end][: self.threats], values[len(means) : end][self.threats :]
        accuracy = {i: right[i] / seen[i] for i in range(self.threats) if seen[i]}
        parts = dict(zip(self.parts, values[1 : len(means)], strict=True))
        return values[0], parts, accuracy, [int(each) for each in values[end:]]


def log_line(update: Update) -> dict[str, Any]:
    """An update as a line of the log."""
    return {
        "update": update.number,
        "epoch": update.epoch,
        "loss": update.loss,
        **update.parts,
        "accuracy": update.accuracy,
        "lr": update.lr,
        "images_per_second": round(update.images_per_second, 2),
    }


def epoch_means(updates: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the log lines of an epoch's updates; for each threat, over the updates in which it occurred."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    threats = dict.fromkeys(name for update in updates for name in update["accuracy"])
    own = ("event", "update", "epoch", "accuracy", "lr", "images_per_second")
    return {
        **{name: mean([update[name] for update in updates]) for name in updates[0] if name not in own},
        "accuracy": {
            name: mean([update["accuracy"][name] for update in updates if name in update["accuracy"]])
            for name in threats
        },
        "lr": updates[-1]["lr"],
        "images_per_second": round(len(updates) / sum(1 / max(u["images_per_second"], 0.01) for u in updates), 2),
    }


def scalars(line: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The floats of a log line, with their keys; the keys of nested dicts are joined by ``/``."""
    for key, value in line.items():
        if isinstance(value, dict):
            yield from scalars(value, f"{prefix}{key}/")
        elif isinstance(value, float):
            yield prefix + key, value
