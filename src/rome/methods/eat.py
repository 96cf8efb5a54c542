"""E-AT: attack more often under the threats to which the model is least robust."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, field_validator
from torch import Tensor

from rome.attacks import Attack
from rome.core.distributed import total
from rome.core.randomness import Stream
from rome.methods.base import Examples, MinMaxMethod, TrainContext, named
from rome.threats import PerExample, Threat


class EAT(MinMaxMethod):
    """E-AT: each batch, or each example, is attacked under one threat, drawn in proportion to its error so far.

    Croce and Hein, "Adversarial robustness against multiple and single lp-threat models via quick fine-tuning of robust
    classifiers" (ICML 2022). The probability of threat p is proportional to 1 - acc_p, where acc_p is the share of
    training examples that the model classified correctly under attack (APGD: at all iterates), among all those attacked
    under p since the beginning, in all processes. The draw is uniform until every threat has fooled the model at least
    once: otherwise, a threat whose error is 0 by chance would never be drawn again.
    """

    kind = "eat"
    papers = ("croce2022adversarial",)
    threats: tuple[str, ...] = Field(default=("Linf", "L1"), min_length=2)
    """Names of the threats to train on, among the config's. Linf and L1 are the extremes, with L2 between them."""
    per: Literal["example", "batch"] | None = None
    """A threat for each example, drawn with stratification and the same probabilities, or one for the whole batch, as
    in the paper. None: per example if there is a regularizer, which needs several threats in a batch, otherwise per
    batch (docs/decisions/msd-eat-ramp.md)."""
    _seen: list[int] = PrivateAttr(default_factory=list)
    """Examples attacked so far, by threat."""
    _robust: list[int] = PrivateAttr(default_factory=list)
    """Those of them that the model classified correctly under attack."""
    _new: Tensor | None = PrivateAttr(default=None)
    """(2, threats), the counts that this process adds to both in the current update."""
    _drawn: int | None = PrivateAttr(default=None)
    """The threat of all batches of the current update."""

    @field_validator("threats")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"{', '.join(names)} are not distinct; name each threat once")
        return names

    def training_threats(self, threats: tuple[Threat, ...], attack: Attack) -> tuple[Threat, ...]:
        return super().training_threats(named(threats, self.threats, self.kind), attack)

    def prepare(self, context: TrainContext) -> None:
        self._seen, self._robust = [0] * len(context.threats), [0] * len(context.threats)

    def perturb(self, context: TrainContext, x: Tensor, y: Tensor) -> Examples:
        labels = self._draw(context, len(x))
        mixture = PerExample(context.threats, labels)
        found = context.attack.run(context.attacked, x, y, mixture, generator=context.attack_stream)
        member = F.one_hot(labels, len(context.threats)).to(x.device, non_blocking=True)
        new = torch.stack([member.sum(dim=0), (member * found.robust.unsqueeze(1)).sum(dim=0)])
        self._new = new if self._new is None else self._new + new
        return Examples(found.images, y, labels)

    def probabilities(self) -> Tensor:
        """The probability of each threat in the current update: float64 (threats,)."""
        seen, robust = torch.tensor([self._seen, self._robust], dtype=torch.float64)
        errors = (seen - robust) / seen.clamp(min=1)
        if not bool((errors > 0).all()):
            errors = torch.ones_like(errors)
        return errors / errors.sum()

    def _draw(self, context: TrainContext, n: int) -> Tensor:
        """Draw the threats of this process's n examples. All accumulation steps of an update have the same
        probabilities, or the same threat."""
        stream = context.threat_stream
        per = self.per or ("batch" if context.regularizer is None else "example")
        if per == "example":
            return stratified(self.probabilities(), n * stream.world, stream)[stream.rank * n : (stream.rank + 1) * n]
        if self._drawn is None:
            self._drawn = int(stratified(self.probabilities(), 1, stream))
        return torch.full((n,), self._drawn)

    def update_end(self, context: TrainContext) -> None:
        assert self._new is not None
        seen, robust = total(self._new).tolist()
        self._seen = [old + new for old, new in zip(self._seen, seen, strict=True)]
        self._robust = [old + new for old, new in zip(self._robust, robust, strict=True)]
        self._new = self._drawn = None

    def state(self) -> dict[str, Any]:
        return {"seen": self._seen, "robust": self._robust}

    def load_state(self, state: dict[str, Any]) -> None:
        self._seen, self._robust = state["seen"], state["robust"]


def stratified(probabilities: Tensor, n: int, stream: Stream) -> Tensor:
    """n draws in random order, the same in every process: i occurs n probabilities[i] times, rounded up or down.

    Systematic sampling: n equally spaced points with a common random offset, so that each single draw has the given
    probabilities.
    """
    points = (torch.arange(n, dtype=torch.float64) + stream.number()) / n
    drawn = torch.searchsorted(probabilities.cumsum(dim=0), points, right=True).clamp(max=len(probabilities) - 1)
    return drawn[stream.permutation(n)]
