"""The base of layers with gated experts: their gate, their projection for L_div, and the recording of gates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Hashable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from rome.experts.gates import PLAIN, GateModule, Gates, Layout, positions, select

MeanOver = Literal["layers", "blocks"]
"""What l indexes in the means of Eq. 8 and of the paper's misrouting attack: the layers with gates, or their blocks,
within which layers are summed."""

LEARNED = "learned"
"""The routing by the learned gates."""


class Recorded(NamedTuple):
    """One layer's gates in one forward pass, without padding tokens."""

    layer: MixtureLayer
    gates: Gates


def count_layers(layers: Collection[MixtureLayer], over: MeanOver) -> int:
    """Return L, by which a sum over all these layers is divided."""
    return len(layers) if over == "layers" else len({layer.block for layer in layers})


@dataclass
class Sink:
    """The records that layers append their gates to."""

    records: list[Recorded] = field(default_factory=list)
    detached: bool = False
    """Record gates recomputed from a detached input: a loss on them trains the gates and nothing before them."""


class MixtureLayer(nn.Module):
    """Base of the modules with K experts weighted by a gate. Subclasses call :meth:`init_gating`.

    Attributes:
        experts: K.
        block: the l = 1..L of Eq. 5 and 8; layers of one block share it.
        gate: turns scores into gate weights; absent if :meth:`init_gating` was given None.
        projection: Linear(K, K') of Eq. 7, or None.
        layout: how the rows of the layer's input make up an image.
        scale: factor of the experts besides the gates: 1 (Eq. 2), or LoRA's alpha / r.
        routing, fixed_weights: the kind of weights in use, and the weights (K,) themselves if they are neither the
            gates nor their inverse; see :func:`rome.experts.set_routing`.
        sink: where gates are recorded, or None; see :func:`rome.experts.record_gates`.
        stacked: the result of :meth:`stack`, kept while weights do not change; see :func:`rome.experts.fused.joined`.
    """

    additive: ClassVar[bool] = True
    """Whether the experts add to the output of the layer they adapt; otherwise they replace the layer."""
    biases: ClassVar[tuple[str, ...]] = ()
    """Names of the layer's own parameters that act as biases, whatever their shape, and get no weight decay."""
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
        """Set the attributes above, and the device, dtype and mode of ``replaced``; call it after creating the experts.

        Args:
            gate: None for a module that computes its gates in another way and calls :meth:`record` itself.
            projection_dim: K', the size that the global gate is projected to in L_div; 0 for no projection.
            train_projection: train the projection instead of keeping its random start.
        """
        self.experts, self.layout, self.block, self.routing = experts, layout, 1, LEARNED
        self.sink: Sink | None = None
        self.stacked: Tensor | None = None
        self.register_buffer("fixed_weights", None, persistent=False)  # a buffer, so that it moves with the layer
        if gate is not None:
            self.gate = gate
        self.projection = nn.Linear(experts, projection_dim) if projection_dim else None
        if self.projection is not None:
            self.projection.requires_grad_(False)  # the bias cancels in every distance, so it gets no gradient
            self.projection.weight.requires_grad_(train_projection)
        self.register_buffer("real", positions(layout), persistent=False)
        if gate is not None:
            like = next(replaced.parameters())
            self.to(device=like.device, dtype=like.dtype)
        self.train(replaced.training)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the layer's tensors that the model also has without experts."""
        return ("weight", "bias")

    @property
    def graph_state(self) -> Hashable:
        """State other than weights that changes the computation, for the graphs that replay it."""
        return self.routing, self.fixed_weights is None

    def gate_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the gate and of its projection."""
        parts = [self.gate, *([] if self.projection is None else [self.projection])]
        return [parameter for part in parts for parameter in part.parameters()]

    def stack(self) -> Tensor | None:
        """Return the weights that the layer stacks into one product with its input; None if it stacks none."""
        return None

    @abstractmethod
    def base_forward(self, input: Tensor) -> Tensor:
        """Return the output of the layer without experts, or of the first expert if the experts replace the layer."""

    def scores(self, h: Tensor) -> Tensor:
        """Return the scores (B, T, R) of an input h of whole images, from which the gate computes its weights."""
        return F.linear(h, self.gate.rows())

    def weigh(self, h: Tensor, scores: Tensor | None = None) -> Gates:
        """Return the weights of the experts for an input h of whole images, and record the gates if there is a sink.

        Args:
            scores: the scores of h, if they are already computed.
        """
        gates: Gates = self.gate(self.scores(h) if scores is None else scores)
        self.record(gates, h)
        return self.route(gates)

    def record(self, gates: Gates, h: Tensor | None = None) -> None:
        """Append gates to the sink, if there is one.

        Args:
            h: the gate's input, from which a detached sink recomputes the gates; None if nothing before the gates has
                parameters to train.
        """
        if self.sink is not None:
            seen: Gates = self.gate(self.scores(h.detach())) if self.sink.detached and h is not None else gates
            local = seen.local if seen.local is None else select(seen.local, self.real)
            self.sink.records.append(Recorded(self, Gates(select(seen.weights, self.real), local, seen.global_)))

    def route(self, gates: Gates) -> Gates:
        """Return the gates, or their replacement by :func:`rome.experts.set_routing`, times the experts' scale."""
        weights = gates.weights
        if self.fixed_weights is not None:
            weights = self.fixed_weights.expand_as(weights)
        elif self.routing != LEARNED:
            weights = (1 - weights) / (self.experts - 1 if self.routing == "inverse" else 1)
        return gates._replace(weights=weights if self.scale == 1 else weights * self.scale)


class NetworkMixture(MixtureLayer):
    """Base of mixtures whose experts, ``networks``, replace a network, which becomes the first of them."""

    additive = False
    networks: nn.ModuleList

    @property
    def shared(self) -> tuple[str, ...]:
        return tuple(f"networks.0.{name}" for name in self.networks[0].state_dict())

    def base_forward(self, input: Tensor) -> Tensor:
        answer: Tensor = self.networks[0](input)
        return answer
