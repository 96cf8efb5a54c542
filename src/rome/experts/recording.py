"""Recording the gates of forward passes inside a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from rome.core.errors import UserError, some
from rome.experts.gated import MixtureLayer, Recorded, Sink
from rome.experts.gates import Gates


def expert_layers(model: nn.Module) -> dict[str, MixtureLayer]:
    """Return the adapted layers of a model by name, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MixtureLayer)}


class GateRecorder:
    """Gates of the forward passes inside :func:`record_gates`, in the order the layers ran.

    Gates keep their gradient history, so a loss on them trains the gates.
    """

    def __init__(self, names: dict[MixtureLayer, str], sink: Sink) -> None:
        self._names, self._sink = names, sink

    @property
    def records(self) -> list[Recorded]:
        """All records, in the order the layers ran."""
        return self._sink.records

    @property
    def gates(self) -> dict[str, Gates]:
        """Gates in the latest forward pass, by the name of the layer.

        Raises:
            UserError: a layer did not run.
        """
        return {self._names[record.layer]: record.gates for record in self.complete()}

    def complete(self) -> list[Recorded]:
        """Return the latest record of every layer, in module order.

        Raises:
            UserError: a layer did not run: something reads its weight without calling it.
        """
        latest = {record.layer: record for record in self.records}
        missing = [name for layer, name in self._names.items() if layer not in latest]
        if missing:
            raise UserError(
                f"the experts of {some(missing)} were never called in this forward pass: the model uses the "
                "layer's weight without calling the layer. Adapt other layers (experts.layers)."
            )
        return [latest[layer] for layer in self._names]

    def check(self, images: int) -> None:
        """Check that all layers ran, and that each row of their input was an image.

        Args:
            images: number of images in each recorded forward pass.

        Raises:
            UserError: a layer did not run, or its gates would not be those of images.
        """
        self.complete()
        for record in self.records:
            if len(record.gates.weights) != images:
                raise UserError(
                    f"layer {self._names[record.layer]} gets {len(record.gates.weights)} inputs for {images} images, "
                    "so its global gate would not average over the image. Leave it out of experts.layers."
                )


@contextmanager
def record_gates(model: nn.Module, *, detached: bool = False) -> Iterator[GateRecorder]:
    """Record the gates of every adapted layer inside the context; the layers keep nothing afterwards.

    Args:
        detached: record gates recomputed from a detached input, so that a loss on them trains the gates alone and not
            the layers before them.

    Raises:
        UserError: the model has no experts, or its gates are already being recorded.
    """
    layers = expert_layers(model)
    if not layers:
        raise UserError("this model has no experts, so no gates to record: call rome.add_experts(model) first")
    if any(layer.sink is not None for layer in layers.values()):
        raise UserError("the gates of this model are being recorded already: leave the other record_gates first")
    sink = Sink(detached=detached)
    for layer in layers.values():
        layer.sink = sink
    try:
        yield GateRecorder({layer: name for name, layer in layers.items()}, sink)
    finally:
        for layer in layers.values():
            layer.sink = None
