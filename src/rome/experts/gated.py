"""What every layer with gated experts has: a gate, a projection for the diversification loss, and a place to record."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from rome.experts.gates import PLAIN, GateModule, Gates, Layout, positions, select

MeanOver = Literal["layers", "blocks"]
"""What L counts in the means over l of Eq. 8 and of the paper's misrouting attack: the layers with gates, or their
blocks, within which layers are summed."""

LEARNED = "learned"
"""The routing by the gates themselves."""


class Recorded(NamedTuple):
    """One layer's gates in one forward pass; tokens that hold padding are left out."""

    layer: MixtureLayer
    gates: Gates


def count(layers: Collection[MixtureLayer], over: MeanOver) -> int:
    """L, what divides a sum over all these layers."""
    return len(layers) if over == "layers" else len({layer.block for layer in layers})


@dataclass
class Sink:
    """Where layers put their gates while they are recorded."""

    records: list[Recorded] = field(default_factory=list)
    detached: bool = False
    """Record gates computed anew from a detached input: a loss on them trains the gates and nothing before them."""


class MixtureLayer(nn.Module):
    """Base of the modules whose K experts are weighed by a gate. Subclasses call :meth:`init_gating`.

    Attributes:
        experts: K.
        block: the l = 1..L of Eq. 5 and 8; layers of one block share it.
        gate: turns scores into gate weights; missing where :meth:`init_gating` got none.
        projection: Linear(K, K') of Eq. 7, or None.
        layout: how the rows of the layer's input make up an image.
        scale: what multiplies the experts beside the gates: 1 (Eq. 2), or LoRA's alpha / r.
        routing, fixed_weights: what weighs the experts, and weights (K,) where it is neither the gates nor their
            inverse; see :func:`rome.experts.set_routing`.
        sink: set while gates are recorded; see :func:`rome.experts.record_gates`.
        stacked: what :meth:`stack` gave, while weights do not change; see :func:`rome.experts.fused.joined`.
    """

    additive: ClassVar[bool] = True
    """Whether the experts add to what the layer gives without them; if not, they stand in its place."""
    biases: ClassVar[tuple[str, ...]] = ()
    """Its own parameters that are biases by role, whatever their shape: not decayed."""
    gate: GateModule
    real: Tensor | None
    fixed_weights: Tensor | None
    scale: float = 1

    def init_gating(
        self,
        replaced: nn.Module,
        experts: int,
        gate: GateModule | None,
        layout: Layout = PLAIN,
        projection_dim: int = 0,
        train_projection: bool = False,
    ) -> None:
        """Set the attributes above, once the experts are there; device, type and mode are then those of the module that
        is replaced.

        Args:
            gate: None for a module that finds its gates in another way and calls :meth:`record` itself.
            projection_dim: K', size to which the global gate is projected in the diversification loss; 0 for none.
            train_projection: learn that projection instead of keeping its random start.
        """
        self.experts, self.layout, self.block, self.routing = experts, layout, 1, LEARNED
        self.sink: Sink | None = None
        self.stacked: Tensor | None = None
        self.register_buffer("fixed_weights", None, persistent=False)  # a buffer, so that it moves with the layer
        if gate is not None:
            self.gate = gate
        self.projection = nn.Linear(experts, projection_dim) if projection_dim else None
        if self.projection is not None:
            self.projection.requires_grad_(False)  # the bias cancels in every distance: a gradient never reaches it
            self.projection.weight.requires_grad_(train_projection)
        self.register_buffer("real", positions(layout), persistent=False)
        if gate is not None:
            like = next(replaced.parameters())
            self.to(device=like.device, dtype=like.dtype)
        self.train(replaced.training)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of its tensors that the model has without experts too."""
        return ("weight", "bias")

    @property
    def graph_state(self) -> Hashable:
        """What decides how it computes beside its weights, for graphs that replay it."""
        return self.routing, self.fixed_weights is None

    def gate_parameters(self) -> list[nn.Parameter]:
        """What learns to weigh the experts."""
        parts = [self.gate, *([] if self.projection is None else [self.projection])]
        return [parameter for part in parts for parameter in part.parameters()]

    def stack(self) -> Tensor | None:
        """The weights that the layer multiplies its input by at once, one above the other; None where it does not."""
        return None

    @abstractmethod
    def base_forward(self, input: Tensor) -> Tensor:
        """What the layer gives without its experts; the first expert's answer where they stand in its place."""

    def scores(self, h: Tensor) -> Tensor:
        """What the gate reads (B, T, R), of the input of whole images."""
        return F.linear(h, self.gate.rows())

    def weigh(self, h: Tensor, scores: Tensor | None = None) -> Gates:
        """What weighs the experts for the input h of whole images, whose scores are computed where they are missing;
        gates are recorded where there is a sink."""
        gates: Gates = self.gate(self.scores(h) if scores is None else scores)
        self.record(gates, h)
        return self.route(gates)

    def record(self, gates: Gates, h: Tensor | None = None) -> None:
        """Put gates into the sink, if there is one.

        Args:
            h: the gate's input, to compute them again from, detached, for a sink that wants that; None where nothing
                before the gates could learn.
        """
        if self.sink is not None:
            seen: Gates = self.gate(self.scores(h.detach())) if self.sink.detached and h is not None else gates
            local = seen.local if seen.local is None else select(seen.local, self.real)
            self.sink.records.append(Recorded(self, Gates(select(seen.weights, self.real), local, seen.global_)))

    def route(self, gates: Gates) -> Gates:
        """The gates, or what :func:`rome.experts.set_routing` put in their place, times the experts' scale."""
        weights = gates.weights
        if self.fixed_weights is not None:
            weights = self.fixed_weights.expand_as(weights)
        elif self.routing != LEARNED:
            weights = (1 - weights) / (self.experts - 1 if self.routing == "inverse" else 1)
        return gates._replace(weights=weights if self.scale == 1 else weights * self.scale)


class NetworkMixture(MixtureLayer):
    """Base of mixtures whose experts, ``networks``, stand in the place of the first one."""

    additive = False
    networks: nn.ModuleList

    @property
    def shared(self) -> tuple[str, ...]:
        return tuple(f"networks.0.{name}" for name in self.networks[0].state_dict())

    def base_forward(self, input: Tensor) -> Tensor:
        answer: Tensor = self.networks[0](input)
        return answer
