"""What every layer with gated experts has: a gate, a projection for the diversification loss, and a place to record."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor, nn

from rome.experts.gates import GateModule, Gates, Layout, positions, select

MeanOver = Literal["layers", "blocks"]
"""What L counts in the means over l of Eq. 8 and of the paper's misrouting attack: the layers with gates, or their
blocks, within which layers are summed."""


class Recorded(NamedTuple):
    """One layer's gates in one forward pass; tokens that hold padding are left out."""

    layer: Gated
    gates: Gates


def count(layers: Collection[Gated], over: MeanOver) -> int:
    """L, what divides a sum over all these layers."""
    return len(layers) if over == "layers" else len({layer.block for layer in layers})


@dataclass
class Sink:
    """Where layers put their gates while they are recorded."""

    records: list[Recorded] = field(default_factory=list)
    detached: bool = False
    """Record gates computed anew from a detached input: a loss on them trains the gates and nothing before them."""


class Gated(nn.Module):
    """Base of the modules whose K experts are weighed by a gate. Subclasses call :meth:`equip` when they are made.

    Attributes:
        experts: K.
        block: the l = 1..L of Eq. 5 and 8; layers of one block share it.
        gate: turns scores into gate weights; missing where :meth:`equip` got none.
        projection: Linear(K, K') of Eq. 7, or None.
        layout: how the rows of the layer's input make up an image.
        scale: what multiplies the experts beside the gates: 1 (Eq. 2), or LoRA's alpha / r.
        fixed_weights, inverted: weights (K,) instead of the gates, or in which way they are inverted ("" for not at
            all); see :func:`rome.experts.set_routing`.
        sink: set while gates are recorded; see :func:`rome.experts.record_gates`.
        stacked: what :meth:`stack` gave, while weights do not change; see :func:`rome.experts.fused.joined`.
    """

    adds: ClassVar[bool] = True
    """Whether the experts add to what the layer gives without them; if not, they stand in its place."""
    biases: ClassVar[tuple[str, ...]] = ()
    """Its own parameters that are biases by role, whatever their shape: not decayed."""
    experts: int
    block: int
    gate: GateModule
    projection: nn.Linear | None
    layout: Layout
    sink: Sink | None
    real: Tensor | None
    stacked: Tensor | None
    fixed_weights: Tensor | None
    inverted: str
    scale: float = 1

    def equip(
        self, experts: int, gate: GateModule | None, layout: Layout, projection_dim: int, train_projection: bool
    ) -> None:
        """Set the attributes above.

        Args:
            gate: None for a module that finds its gates in another way and calls :meth:`record` itself.
            projection_dim: K', size to which the global gate is projected in the diversification loss; 0 for none.
            train_projection: learn that projection instead of keeping its random start.
        """
        self.experts, self.layout, self.sink, self.block = experts, layout, None, 1
        self.stacked = None
        self.inverted = ""
        self.register_buffer("fixed_weights", None, persistent=False)  # a buffer, so that it moves with the layer
        if gate is not None:
            self.gate = gate
        self.projection = nn.Linear(experts, projection_dim) if projection_dim else None
        if self.projection is not None:
            self.projection.requires_grad_(False)  # the bias cancels in every distance: a gradient never reaches it
            self.projection.weight.requires_grad_(train_projection)
        self.register_buffer("real", positions(layout), persistent=False)

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of its tensors that the model has without experts too."""
        return ("weight", "bias")

    def gate_parameters(self) -> list[nn.Parameter]:
        """What learns to weigh the experts."""
        parts = [self.gate, *([] if self.projection is None else [self.projection])]
        return [parameter for part in parts for parameter in part.parameters()]

    def stack(self) -> Tensor | None:
        """The weights that the layer multiplies its input by at once, one above the other; None where it does not."""
        return None

    @abstractmethod
    def plain(self, input: Tensor) -> Tensor:
        """What the layer gives without its experts; the first expert's answer where they stand in its place."""

    def weigh(self, scores: Tensor, rescore: Callable[[], Tensor]) -> Gates:
        """Gates for scores (B, T, R) of whole images, recorded if somebody asked.

        Args:
            rescore: computes the scores again from a detached input, for a sink that wants that.
        """
        gates: Gates = self.gate(scores)
        self.record(gates, lambda: self.gate(rescore()))
        return self.route(gates)

    def record(self, gates: Gates, anew: Callable[[], Gates]) -> None:
        """Record gates if somebody asked.

        Args:
            anew: computes them again from a detached input, for a sink that wants that.
        """
        if self.sink is not None:
            seen = anew() if self.sink.detached else gates
            local = seen.local if seen.local is None else select(seen.local, self.real)
            self.sink.records.append(Recorded(self, Gates(select(seen.weights, self.real), local, seen.whole)))

    def route(self, gates: Gates) -> Gates:
        """The gates, or what :func:`rome.experts.set_routing` put in their place, times the experts' scale."""
        weights = gates.weights
        if self.fixed_weights is not None:
            weights = self.fixed_weights.expand_as(weights)
        elif self.inverted:
            weights = (1 - weights) / (self.experts - 1 if self.inverted == "inverse" else 1)
        return gates._replace(weights=weights if self.scale == 1 else weights * self.scale)


def scale_groups(codes: Tensor, weights: Tensor) -> Tensor:
    """Codes (..., K r), each group of r multiplied by its expert's weight (..., K)."""
    grouped = codes.view(*codes.shape[:-1], weights.shape[-1], -1)
    return (grouped * weights.to(codes.dtype).unsqueeze(-1)).flatten(-2)
