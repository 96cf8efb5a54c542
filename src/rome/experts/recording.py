"""Reading the gates of a forward pass, explicitly and for as long as a context lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rome.errors import UserError
from rome.experts.gating import Gates
from rome.experts.mixture import MixtureLinear, Recorded


def expert_layers(model: nn.Module) -> dict[str, MixtureLinear]:
    """The adapted layers of a model by name, in the order of its modules."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureLinear)}


class GateRecorder:
    """Gates of the forward passes made inside :func:`record_gates`, in the order the layers ran.

    Gates keep their gradient history, so a loss on them trains the gates.
    """

    def __init__(self, names: dict[MixtureLinear, str]) -> None:
        self._names = names
        self.records: list[Recorded] = []

    @property
    def gates(self) -> dict[str, Gates]:
        """Layer name to its gates in the latest forward pass.

        Raises:
            UserError: a layer did not run.
        """
        return {self._names[record.layer]: record.gates for record in self.complete()}

    def complete(self) -> list[Recorded]:
        """The latest record of every layer, in module order.

        Raises:
            UserError: a layer did not run: something reads its weight without calling it.
        """
        latest = {record.layer: record for record in self.records}
        missing = [name for layer, name in self._names.items() if layer not in latest]
        if missing:
            raise UserError(
                f"the experts of {', '.join(missing[:3])} were never called in this forward pass: the model reads the "
                "layer's weight around its forward. Adapt other layers (experts.layers)."
            )
        return [latest[layer] for layer in self._names]

    def clear(self) -> None:
        """Forget what was recorded so far."""
        self.records.clear()


@contextmanager
def record_gates(model: nn.Module) -> Iterator[GateRecorder]:
    """Record the gates of every adapted layer inside the context; layers keep nothing afterwards.

    Raises:
        UserError: the model has no experts, or is being recorded already.
    """
    layers = expert_layers(model)
    if not layers:
        raise UserError("this model has no experts, so no gates to record: call rome.add_experts(model) first")
    if any(layer.sink is not None for layer in layers.values()):
        raise UserError("the gates of this model are being recorded already: leave the other record_gates first")
    recorder = GateRecorder({layer: name for name, layer in layers.items()})
    for layer in layers.values():
        layer.sink = recorder.records
    try:
        yield recorder
    finally:
        for layer in layers.values():
            layer.sink = None
