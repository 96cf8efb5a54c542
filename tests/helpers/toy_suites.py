"""Attacks and a suite whose outcome is known, for tests of what goes on around them. Importing registers them."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rome.attacks.base import NOT_EVALUATED, Attack, AttackResult, Group
from rome.attacks.engine import Model
from rome.core.randomness import Stream
from rome.evaluation.evaluate import Case, Suite
from rome.evaluation.store import StorageError
from rome.threats import AnyImage, Threat


class Toy(Attack):
    """Changes images in a fixed way, or makes trouble."""

    kind = "toy"
    how: str = "negative"
    """``negative``: 1 - x; ``same``: nothing; ``noise``: what was drawn; ``raise``; ``raise-1``: in process 1;
    ``full-1``: its disk is full; ``kill-1``: ends process 1; ``usr1-1``: tells it that its time is over;
    ``kill:FILE``: ends the process and removes the file, if there is one."""
    type: str = ""
    severity: int = 0

    def steps_for(self, threat: Threat) -> int:
        return 1

    def search(self, model: Model, x: Tensor, y: Tensor, groups: list[Group], noise: Tensor) -> AttackResult:
        first = os.environ.get("RANK", "0") == "0"
        if self.how == "raise" or (self.how == "raise-1" and not first):
            raise RuntimeError("a toy that breaks")
        if self.how == "full-1" and not first:
            raise StorageError("it cannot be written")
        if self.how == "kill-1" and not first:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "usr1-1" and not first:
            os.kill(os.getpid(), signal.SIGUSR1)
        if self.how.startswith("kill:") and (flag := Path(self.how.removeprefix("kill:"))).exists():
            flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        images = {"negative": 1 - x, "noise": noise}.get(self.how, x)
        return AttackResult(images.clone(), images.clone(), torch.ones_like(y, dtype=torch.bool), NOT_EVALUATED)


class Numbered(Toy):
    """Known by their numbers, as images read from a file are: the negative of every second example."""

    kind = "numbered"
    path: str | None = None

    def images(self, x: Tensor, y: Tensor, numbers: Tensor, source: Stream) -> Tensor:
        return torch.where((numbers % 2 == 0).view(-1, 1, 1, 1), 1 - x, x)


class ToySuite(Suite):
    """A column for each way, named by its number: toy-0, toy-1 ..."""

    kind = "toys"
    how: tuple[str, ...] = ("negative",)
    on_all: bool = False
    group: str | None = None
    prefix: str = "toy"

    def cases(self, threats: Mapping[str, Threat], classes: int) -> list[Case]:
        names = [f"{self.prefix}-{i}" for i in range(len(self.how))]
        return [
            Case(
                name=name,
                threat=AnyImage(label=name),
                attacks=(Toy(how=how),),
                group=self.group,
                on_all=self.on_all,
            )
            for name, how in zip(names, self.how, strict=True)
        ]


class Brightness(nn.Module):
    """Two classes: dark (0) and bright (1) images, by the mean of their pixels; the logits are +-10 (mean - 1/2)."""

    def __init__(self, largest: int | None = None, error: Exception | None = None) -> None:
        super().__init__()
        self.largest, self.error = largest, error
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if self.largest is not None and len(x) > self.largest:
            raise self.error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        bright = 10 * (x.flatten(1).mean(dim=1) - 0.5)
        return torch.stack([-bright, bright], dim=1)


def shades(*values: float) -> Tensor:
    """An image 1x4x4 of one shade for each value."""
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).clone()
