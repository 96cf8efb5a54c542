"""RANDOM, AVG and MAX: three ways to combine the losses of several threats (paper 3, Eq. 1)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from rome.core.distributed import total
from rome.core.randomness import Stream
from rome.methods.base import Examples, Outcome, Planned, PlannedMethod, TrainContext, training_forward
from rome.threats import PerExample


class Random(PlannedMethod):
    """RANDOM (SAT): each example, or each batch, is attacked under one threat drawn uniformly (Madaan et al. 2021).

    ``per: example`` draws with stratification: every threat gets an equal share of the global batch, in random order,
    and the whole mixture is attacked at once (docs/decisions/random-per-example.md). ``per: batch`` is the original:
    one threat for all examples.
    """

    kind = "random"
    papers = ("madaan2021learning",)
    per: Literal["example", "batch"] = "example"
    """A threat for each example, or one for the whole batch."""
    _drawn: int | None = PrivateAttr(default=None)
    """The threat of all batches of the current update."""

    def plan(self, context: TrainContext, x: Tensor, y: Tensor) -> Planned:
        if self.per == "batch":
            if self._drawn is None:
                self._drawn = int(context.threat_stream.permutation(len(context.threats))[0])
            labels = torch.full((len(x),), self._drawn)
        else:
            labels = equal_shares(context.threat_stream, len(x), len(context.threats))
        return planned(context, x, y, PerExample(context.threats, labels))

    def update_end(self, context: TrainContext) -> None:
        self._drawn = None


def planned(context: TrainContext, x: Tensor, y: Tensor, mixture: PerExample) -> Planned:
    """Plan the context's attack on images (B, C, H, W), each under its threat in the mixture."""
    attack = context.attack.plan(context.attacked, x, y, mixture, generator=context.attack_stream, verdict=False)
    return Planned(attack, (y, mixture.labels), lambda found, y, labels: Examples(found.images, y, labels))


def equal_shares(stream: Stream, n: int, threats: int) -> Tensor:
    """Draw a threat for each of this process's n examples: every threat gets an equal share of the global batch, in
    random order; int64 (n,) on the CPU."""
    first = int(stream.permutation(threats)[0])  # decides which threats get the remainder of the division
    drawn = (stream.permutation(n * stream.world) + first) % threats
    return drawn[stream.rank * n : (stream.rank + 1) * n]


class _AllThreats(PlannedMethod):
    """Base of methods that attack every example under every threat, with one training forward over all of them."""

    def plan(self, context: TrainContext, x: Tensor, y: Tensor) -> Planned:
        threats = len(context.threats)
        # example by example, so that the random numbers of a process are a slice of those of the global batch
        mixture = PerExample(context.threats, torch.arange(threats).repeat(len(x)))
        return planned(context, x.repeat_interleave(threats, dim=0), y.repeat_interleave(threats), mixture)

    def objective(self, context: TrainContext, examples: Examples) -> Outcome:
        def join(losses: Tensor) -> Tensor:
            return self.join(losses.view(-1, len(context.threats)).t())

        return training_forward(context, examples.images, examples.y, examples.labels, join)

    @abstractmethod
    def join(self, losses: Tensor) -> Tensor:
        """Reduce the losses (threats, B) to a scalar."""


class Average(_AllThreats):
    """AVG: the mean of the losses under all threats (Tramèr and Boneh 2019)."""

    kind = "avg"
    papers = ("tramer2019adversarial",)

    def join(self, losses: Tensor) -> Tensor:
        return losses.mean()


class Maximum(_AllThreats):
    """MAX: for each example, or each batch, the threat with the largest loss (Tramèr and Boneh 2019).

    ``per: example`` is what the method's published code does, and Eq. 1 with its expectation over examples.
    ``per: batch`` takes the threat with the largest mean loss over the global batch ("the worst-case threat at each
    iteration"); with gradient accumulation, each accumulation step has its own.
    """

    kind = "max"
    papers = ("tramer2019adversarial",)
    per: Literal["example", "batch"] = "example"
    """A threat for each example, or one for the whole batch."""

    def join(self, losses: Tensor) -> Tensor:
        if self.per == "batch":
            worst = total(losses.detach().sum(dim=1)).argmax(dim=0, keepdim=True)
            return losses.mean(dim=1).gather(0, worst).squeeze(0)
        return losses.amax(dim=0).mean()
