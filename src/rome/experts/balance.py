"""Losses on gates from conventional mixtures of experts, and gates as threat classifiers (paper Table 4)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from pydantic import Field
from torch import Tensor

from rome.core.component import Number
from rome.core.distributed import differentiable_sum
from rome.core.errors import UserError
from rome.experts.gated import Recorded
from rome.experts.regularizers import Regularizer


class MeanOverLayers(Regularizer):
    """Base of the losses that average one term per layer."""

    def loss(self, records: list[Recorded], labels: Tensor, threats: int) -> Tensor:
        return torch.stack([self.term(record, labels, threats) for record in records]).mean()

    @abstractmethod
    def term(self, record: Recorded, labels: Tensor, threats: int) -> Tensor:
        """Return the loss on one layer's gates, a scalar; arguments as in :meth:`loss`."""


class LoadBalancing(MeanOverLayers):
    """K sum_k f_k P_k, averaged over layers: f_k the share of tokens with k's gate the largest, P_k the mean gate.

    From Fedus et al. 2022, after Shazeer et al. 2017; the default weight is that of MoLE (Wu et al. 2024). The loss is
    1 if f or P is uniform, and at least 1 for one-hot gates; if f and P disagree, it can be lower. All tokens of all
    examples in the global batch count equally.
    """

    kind = "load-balancing"
    weight: Number = Field(default=0.5, ge=0)

    def term(self, record: Recorded, labels: Tensor, threats: int) -> Tensor:
        g = record.gates.weights.flatten(0, 1)
        first = torch.nn.functional.one_hot(g.argmax(dim=1), g.shape[1]).to(g.dtype)
        used, weight = differentiable_sum(torch.stack([first.sum(dim=0), g.sum(dim=0)])).unbind()
        return g.shape[1] * (used / used.sum() * weight / weight.sum()).sum()


class Importance(MeanOverLayers):
    """CV^2 of the experts' summed gates, averaged over layers (Shazeer et al. 2017); 0 if all sums are equal."""

    kind = "importance"

    def term(self, record: Recorded, labels: Tensor, threats: int) -> Tensor:
        weight = differentiable_sum(record.gates.weights.sum(dim=(0, 1)))
        return weight.var(unbiased=False) / weight.mean().square()


class Classification(MeanOverLayers):
    """Cross-entropy -log u_ip - log v_p of gates that classify the threat p: expert p for threat p (Table 4).

    Averaged over examples, tokens and layers; needs as many experts as threats. 0 if there is only one threat.
    """

    kind = "classification"

    def check(self, experts: int, threats: int) -> None:
        if experts != threats > 1:
            raise UserError(
                f"regularizer classification needs one expert for each of the {threats} threats, not {experts}; "
                f"set experts.experts={threats}"
            )

    def term(self, record: Recorded, labels: Tensor, threats: int) -> Tensor:
        self.check(record.layer.experts, threats)
        total = 0 * record.gates.weights.sum()
        if threats == 1:
            return total
        where = labels.to(total.device, non_blocking=True)
        for gates in (record.gates.local, record.gates.global_):
            if gates is not None:
                tokens = gates.reshape(len(where), -1, threats)
                named = tokens.gather(2, where.view(-1, 1, 1).expand(-1, tokens.shape[1], 1))
                total = total - named.clamp(min=1e-12).log().mean()
        return total
